"""A sweep as a job: through both doors, the store, the orchestrator and the command."""

import asyncio
import io
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from graft.api.v1.fine_tuning_job_pb2 import Hyperparameters as HyperparametersMessage
from graft.api.v1.fine_tuning_job_pb2 import Sweep as SweepMessage
from graft.cli.progress import Event, JobsProgress
from graft.cli.trials import trials_of
from graft.domain.errors import InvalidArgument
from graft.domain.jobs import EventLevel, Hyperparameters, Job, JobSpec, JobState, Resolved, Sweep
from graft.domain.stored import from_json, to_json
from graft.gateway import convert_jobs
from graft.gateway.http.job_spec import job_spec
from graft.training.spec import Report
from tests.support.gateways import BASE, Gateway, gateway, refused
from tests.support.orchestration import PROJECT, world
from tests.unit.test_cli_jobs import TO_RUNNING, TO_THE_END, TRAINED, ran
from tests.unit.test_gateway_jobs import claimed, created, moved, uploaded
from tests.unit.test_progress import job as shown

SWEEP = Sweep((1e-4, 5e-4), (4, 8), max_trials=3, grace_steps=5, reduction_factor=2.0, max_concurrent_trials=2)
TRIALS = [
    {
        "trial": number,
        "learning_rate": rate,
        "rank": 4,
        "steps": steps,
        "best_validation_loss": loss,
        "state": state,
    }
    for number, rate, steps, loss, state in (
        (1, 1e-4, 20, 0.75, "finished"),
        (2, 5e-4, 20, 0.5, "finished"),
        (3, 1.0, 3, None, "failed"),
    )
]
RESOLVED = (
    Resolved("learning_rate", 1e-4, True, "The sweep chooses."),
    Resolved("lora.alpha", 16.0, True, "Twice the rank."),
    Resolved("sweep.learning_rates", [1e-4, 5e-4], False, "Given by the job."),
    Resolved("sweep.ranks", [8], True, "Only learning rates are swept."),
    Resolved("sweep.max_trials", 3, True, "Three combinations."),
)
HELD_OUT = Hyperparameters(validation_fraction=0.1)


def test_a_stored_sweep_comes_back_and_a_job_of_before_has_none() -> None:
    spec = JobSpec("b", "ds", sweep=SWEEP)
    stored = to_json(spec)
    stored["sweep"] = {**asdict(SWEEP), "learning_rates": [1e-4, 5e-4], "ranks": [4, 8]}  # as JSON has them
    assert from_json(JobSpec, stored) == spec
    del stored["sweep"]
    assert from_json(JobSpec, stored) == JobSpec("b", "ds")


async def test_a_sweep_goes_through_the_grpc_door_as_it_was_sent_and_is_checked(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        sweep = SweepMessage(**asdict(SWEEP))
        made = await created(it, sweep=sweep, hyperparameters=HyperparametersMessage(validation_fraction=0.1))
        assert made.sweep == sweep
        (job,) = (await it.store.list_jobs("default", 10, "")).items
        assert job.spec.sweep == SWEEP
        assert not (await created(it)).HasField("sweep")
        error = await refused(created(it, sweep=SweepMessage(ranks=[4, 65])))
        assert isinstance(error, InvalidArgument)
        assert {fault.field for fault in error.violations} == {"sweep", "sweep.ranks[1]"}


def test_a_sweep_is_read_from_grafts_part_of_openais_form() -> None:
    body: dict[str, Any] = {"model": "b", "training_file": "ds", "graft": {"sweep": asdict(SWEEP)}}
    body["graft"]["sweep"] |= {"learning_rates": [1e-4, 5e-4], "ranks": [4, 8]}
    assert job_spec(body).sweep == SWEEP
    assert job_spec({**body, "graft": {"sweep": {}}}).sweep == Sweep()
    assert job_spec({**body, "graft": {}}).sweep is None
    with pytest.raises(InvalidArgument) as raised:
        job_spec({**body, "graft": {"sweep": {"ranks": [4.5], "learning_rates": 3, "trials": 1}}})
    told = {fault.field: fault.description for fault in raised.value.violations}
    assert set(told) == {"graft.sweep.ranks", "graft.sweep.learning_rates", "graft.sweep.trials"}


def test_resolved_lists_of_numbers_are_told_as_numbers() -> None:
    message = convert_jobs._resolved(RESOLVED[2])
    assert list(message.value.list_value) == [1e-4, 5e-4]


def _reports() -> list[Report]:
    def step(number: int, trial: int, **more: object) -> dict[str, object]:
        whole = {"step": number * 10, "total_steps": 60, "loss": 3.0 - number, "trained_tokens": 7}
        return {"step": number, "total_steps": 20, "loss": 3.0 - number, "trial": trial, "sweep": whole, **more}

    return [
        Report(1, "message", 0.0, {"message": "Trial 1 of 3 starts.", "trial": 1}),
        Report(2, "metrics", 1.0, step(1, 1)),
        # Within one interval: each trial's newest is kept, and every measurement.
        Report(3, "metrics", 1.01, step(2, 1)),
        Report(4, "metrics", 1.02, step(1, 2)),
        Report(5, "metrics", 1.03, step(2, 2, validation_loss=0.5)),
        Report(6, "metrics", 1.04, step(3, 2)),
        Report(
            7,
            "finished",
            2.0,
            {
                "message": "Trial 2 of 3 is the best.",
                "validation_loss": 0.5,
                "best_trial": 2,
                "chosen": {"learning_rate": 5e-4, "lora.rank": 4, "lora.alpha": 8.0},
                "trials": TRIALS,
            },
        ),
    ]


async def test_the_orchestrator_tells_trials_apart_and_registers_what_the_sweep_chose(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.cpus = 2
        it.preparer.also_resolves = RESOLVED
        it.runs.reports = _reports()
        await it.create_job("job-1", sweep=Sweep((1e-4, 5e-4)), hyperparameters=HELD_OUT)
        async with it.orchestrator():
            job = await it.until("job-1", JobState.SUCCEEDED)
        resolved = {item.name: item for item in job.resolved}
        assert (resolved["learning_rate"].value, resolved["lora.rank"].value) == (5e-4, 4)
        assert resolved["learning_rate"].reason == "Chosen by the sweep among 0.0001, 0.0005."
        assert resolved["sweep.max_concurrent_trials"].value == 2
        assert it.registry.published[0].rank == 4
        assert job.metrics["best_trial"] == 2
        metrics = await it.events("job-1", "metrics")
        assert [(event.data["trial"], event.data["step"]) for event in metrics] == [(1, 1), (1, 2), (2, 2), (2, 3)]
        assert metrics[-1].message == "Trial 2: step 3, loss 0.0000."
        assert job.progress is not None
        assert (job.progress.step, job.progress.total_steps, job.progress.trained_tokens) == (30, 60, 7)
        run = it.registry.runs[str(job.mlflow_run_id)]
        assert not run["params"].keys() & {"learning_rate", "lora.rank", "lora.alpha"}
        assert any("trial-2/validation_loss" in names for _, names in run["metrics"])
        (end,) = [event for event in await it.events("job-1") if "trials" in event.data]
        assert end.message == "Trial 2 of 3 is the best."


async def test_a_sweep_begins_with_the_cpus_that_are_free_and_younger_jobs_wait_for_them(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.cpus = 3
        it.close_gate(JobState.RUNNING)
        await it.create_job("job-1", "one")
        async with it.orchestrator():
            await it.until("job-1", JobState.RUNNING)
            it.preparer.also_resolves = RESOLVED
            await it.create_job("job-2", "two", sweep=Sweep((1e-4, 5e-4)), hyperparameters=HELD_OUT)
            job = await it.until("job-2", JobState.RUNNING)
            found = {item.name: item.value for item in job.resolved}
            assert found["sweep.max_concurrent_trials"] == 2
            await it.create_job("job-3", "three")
            await it.until("job-3", JobState.QUEUED)
            await asyncio.sleep(0.2)
            assert (await it.store.get_job(PROJECT, "job-3")).state is JobState.QUEUED
            it.gates.open(JobState.RUNNING)


async def _swept(it: Gateway) -> Job:
    while not (await it.store.list_jobs("default", 10, "")).items:  # noqa: ASYNC110 - a row, not an event
        await asyncio.sleep(0.01)
    job = await claimed(it)
    job = await moved(it, job, *TO_RUNNING)
    started: dict[str, object] = {"trial": 1, "state": "running"}
    job = await it.store.record(job, "test", event=(EventLevel.INFO, "message", "Trial 1 of 3 starts.", started))
    told: dict[str, object] = {"best_trial": 2, "trials": TRIALS}
    job = await it.store.record(job, "test", event=(EventLevel.INFO, "message", "Trial 2 is the best.", told))
    return await moved(it, job, *TO_THE_END, fine_tuned_model=TRAINED)


async def test_tune_sweep_asks_for_the_grid_follows_it_and_ends_with_a_table(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        dataset = (await uploaded(it)).rsplit("/", 1)[1]
        swept = asyncio.create_task(_swept(it))
        options = ["--learning-rate", "1e-4,5e-4", "--rank", "4,8", "--max-trials", "3", "--max-steps", "20"]
        options += ["--set", "validation_fraction=0.2", "--reduction-factor", "2", "--suffix", "reviews"]
        followed = await ran(it, "tune", "sweep", BASE, dataset, *options)
        job = await swept
        shown = await ran(it, "tune", "get", job.id)
        wrong = await ran(it, "tune", "sweep", BASE, dataset, "--rank", "4,many")
    assert job.spec.sweep == Sweep((1e-4, 5e-4), (4, 8), max_trials=3, reduction_factor=2.0)
    assert (job.spec.hyperparameters.max_steps, job.spec.hyperparameters.validation_fraction) == (20, 0.2)
    assert followed.code == 0, followed.err
    lines = followed.out.splitlines()
    assert lines[0] == f"Job {job.id} is created: supervised, LoRA, served as an adapter, the best of a sweep."
    assert any(line.endswith("Trial 1 of 3 starts.") for line in lines)
    table = [
        "TRIAL  LEARNING RATE  RANK  STEPS  HELD-OUT LOSS  HOW IT ENDED",
        "1      0.0001         4     20     0.7500         finished",
        "2      0.0005         4     20     0.5000         finished      best",
        "3      1              4     3                     failed",
    ]
    assert lines[-5:-1] == table
    assert shown.out.splitlines()[-4:] == table
    assert wrong.code != 0
    assert "--rank: '4,many' is no list of whole numbers" in wrong.err


def _events() -> Iterator[Event]:
    for kind, message, data in (
        ("message", "Trial 1 of 2 starts.", {"trial": 1, "state": "running"}),
        ("metrics", "", {"trial": 1, "step": 10, "total_steps": 20, "loss": 0.25, "validation_loss": 0.75}),
        ("metrics", "", {"trial": 2, "step": 5, "total_steps": 20, "loss": 2.5, "validation_loss": 4.5}),
        ("message", "Trial 2 of 2 ends early.", {"trial": 2, "state": "ended_early", "best_validation_loss": 4.5}),
        ("metrics", "", {"trial": 1, "step": 20, "total_steps": 20, "loss": 0.125}),
    ):
        event = Event(type=kind, message=message, level=Event.LEVEL_INFO)
        event.data.update(data)
        yield event


def test_a_terminal_shows_every_trial_as_one_living_line() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, record=True, _environ={"TERM": "xterm"})
    with JobsProgress(console) as progress:
        progress.add("ft-1", "reviews")
        for event in _events():
            progress.update("ft-1", shown("STATE_RUNNING", 10, 0.5), event)
    whole, first, second = [line.rstrip() for line in console.export_text().splitlines()][-3:]
    assert whole.endswith("10/40 loss 0.5000 153 tokens/s")
    assert first.startswith("  trial 1 running ")
    assert " ".join(first.split()).endswith("20/20 loss 0.1250 held-out 0.7500")
    assert second.startswith("  trial 2 ended early ")
    assert " ".join(second.split()).endswith("5/20 loss 2.5000 held-out 4.5000")


def test_a_log_gets_what_happens_to_a_trial_and_not_its_every_step() -> None:
    out = io.StringIO()
    with JobsProgress(Console(file=out, width=60), plain_seconds=1e9) as progress:
        progress.add("ft-1", "reviews")
        progress.update("ft-1", shown("STATE_RUNNING"))
        for event in _events():
            progress.update("ft-1", shown("STATE_RUNNING", 10, 0.5), event)
    assert out.getvalue().splitlines()[1:] == [
        "reviews  running      Trial 1 of 2 starts.",
        "reviews  running      Trial 2 of 2 ends early.",
    ]


def test_only_the_event_of_a_sweeps_end_tells_its_trials() -> None:
    assert all(trials_of(event) == [] for event in _events())
