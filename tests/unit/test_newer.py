"""What an orchestrator and a gateway make of jobs and evaluations that a newer Graft has written (ADR 12)."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update
from structlog.testing import capture_logs

from graft.api.v1 import fine_tuning_service_pb2 as pb
from graft.api.v1.fine_tuning_service_pb2_grpc import FineTuningServiceStub
from graft.data.prepare import DataStats
from graft.domain.deployments import DeploymentState
from graft.domain.evaluations import Contestant, EvaluationSpec, EvaluationState
from graft.domain.grading import GraderSpec
from graft.domain.jobs import (
    EventLevel,
    JobSpec,
    JobState,
    Lora,
    Method,
    Reinforcement,
    Resolved,
    ServedAs,
    Sweep,
    Tuning,
)
from graft.domain.resources import BaseModel, DatasetFormat
from graft.orchestrator.asking import Answer, Answers
from graft.orchestrator.evaluations import Evaluations
from graft.orchestrator.newer import HYPERPARAMETERS
from graft.store.sql import SqlStore
from graft.store.tables import jobs
from graft.training.derive import derive
from tests.support.gateways import BASE as SERVED
from tests.support.gateways import eventually, gateway
from tests.support.orchestration import BASE, PATIENCE_SECONDS, PROJECT, World, world

TASK = "name: t\nfields: {text: a text}\ncompletion: answer\nprompt: '{{ text }}'\n"


MOMENTUM = Resolved("momentum", 0.9, True, "A newer orchestrator says so.")


async def rewrite(store: SqlStore, job_id: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the stored specification of a job, as a newer Graft would have written it."""
    async with store._database.write() as connection:
        spec = (await connection.execute(select(jobs.c.spec).where(jobs.c.id == job_id))).scalar_one()
        change(spec)
        await connection.execute(update(jobs).where(jobs.c.id == job_id).values(spec=spec))


async def with_momentum(it: World, job_id: str, **asked: Any) -> None:
    await it.create_job(job_id, suffix=None, **asked)
    await rewrite(it.store, job_id, lambda spec: spec["hyperparameters"].update(momentum=0.9))


async def until_passed_on(it: World, job_id: str) -> list[Any]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (told := [event for event in await it.events(job_id) if "unknown" in event.data]) or (
        (await it.job(job_id)).lease_owner
    ):
        assert time.monotonic() < deadline, await it.events(job_id)
        await asyncio.sleep(0.01)
    return told


async def test_a_job_that_asks_for_what_only_a_newer_graft_knows_is_left_to_it_and_holds_nobody_up(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as it:
        await with_momentum(it, "job-1")
        await it.create_job("job-2")
        with capture_logs() as logs:
            # Two of the older version, as there are while one after the other is replaced.
            async with it.orchestrator(), it.orchestrator():
                (told,) = await until_passed_on(it, "job-1")
                await it.until("job-2", JobState.SUCCEEDED)
        assert (told.level, told.data["unknown"]) == (EventLevel.WARN, ["hyperparameters.momentum"])
        assert "hyperparameters.momentum" in told.message
        assert {line["job"] for line in logs if line["event"] == "job_passed_on"} == {"job-1"}
        left = await it.job("job-1")
        assert (left.state, left.lease_owner, left.attempt) == (JobState.VALIDATING, None, 1)
        # The newer one: here this version, once the job asks for nothing that it does not know.
        await rewrite(it.store, "job-1", lambda spec: spec["hyperparameters"].pop("momentum"))
        async with it.orchestrator():
            await it.until("job-1", JobState.SUCCEEDED)
        assert [spec.job_id for spec in it.runs.specs].count("job-1") == 1


async def test_a_newer_grafts_job_can_be_cancelled_and_its_run_is_ended(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.close_gate(JobState.RUNNING)
        await it.create_job("job-1")
        async with it.orchestrator():
            await it.until("job-1", JobState.RUNNING)
        await rewrite(it.store, "job-1", lambda spec: spec.update(method="distillation"))
        async with it.orchestrator():
            (told,) = await until_passed_on(it, "job-1")
            assert told.data["unknown"] == ["method: distillation"]
            assert (await it.job("job-1")).state is JobState.RUNNING
            assert it.runs.live == {("job-1", 1)}
            await it.store.request_cancel(PROJECT, "job-1")
            await it.until("job-1", JobState.CANCELLED)
        assert it.runs.live == set()


@pytest.mark.parametrize(
    ("asked", "unknown"),
    [
        ({"task": "t", "task_definition": f"{TASK}tools: []\n"}, "task_definition.tools"),
        ({"reinforcement": Reinforcement(GraderSpec("judge", {}))}, "reinforcement.grader.kind"),
        ({"reinforcement": Reinforcement(GraderSpec("numeric", {"unit": "m"}))}, "reinforcement.grader.settings.unit"),
    ],
)
async def test_tasks_and_graders_of_a_newer_graft_are_left_to_it_too(
    tmp_path: Path, asked: dict[str, Any], unknown: str
) -> None:
    async with world(tmp_path) as it:
        await it.create_job("job-1", **asked)
        async with it.orchestrator():
            (told,) = await until_passed_on(it, "job-1")
        assert told.data["unknown"] == [unknown]


@asynccontextmanager
async def newer_orchestrator(it: World, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """One that derives momentum, and knows it."""
    it.preparer.also_resolves = (MOMENTUM,)
    with monkeypatch.context() as patched:
        patched.setattr("graft.orchestrator.newer.HYPERPARAMETERS", {*HYPERPARAMETERS, MOMENTUM.name})
        async with it.orchestrator():
            yield
    it.preparer.also_resolves = ()


async def test_hyperparameters_that_a_newer_orchestrator_derived_are_derived_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as it:
        it.close_gate(JobState.QUEUED)
        await it.create_job("job-1")
        async with newer_orchestrator(it, monkeypatch):
            await it.until("job-1", JobState.QUEUED)
        it.open_gate(JobState.QUEUED)
        async with it.orchestrator():
            job = await it.until("job-1", JobState.SUCCEEDED)
        assert (job.attempt, "momentum" in {item.name for item in job.resolved}) == (1, False)
        assert any("without a newer version's momentum" in event.message for event in await it.events("job-1"))


@pytest.mark.parametrize(("started", "attempt"), [(True, 1), (False, 2)])
async def test_a_start_that_a_newer_orchestrator_left_is_followed_only_where_it_began_the_run(
    tmp_path: Path, started: bool, attempt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as it:
        it.close_gate(JobState.STARTING)
        await it.create_job("job-1")
        async with newer_orchestrator(it, monkeypatch):
            await it.until("job-1", JobState.STARTING)
            await eventually(lambda: bool(it.runs.starts), PATIENCE_SECONDS)
        if not started:
            it.runs.starts.clear()
            it.runs.live.clear()
        it.open_gate(JobState.STARTING)
        async with it.orchestrator():
            job = await it.until("job-1", JobState.SUCCEEDED)
        assert job.attempt == attempt
        assert [spec.attempt for spec in it.runs.specs] == ([1] if started else [1, 2])


async def test_an_evaluation_of_a_newer_graft_is_left_to_it_and_the_next_one_is_taken(tmp_path: Path) -> None:
    asked = (
        EvaluationSpec("ds-1", (Contestant(BASE),), grader=GraderSpec("judge", {})),
        EvaluationSpec("ds-none", (Contestant(BASE),)),
    )
    async with world(tmp_path) as it:
        for number, spec in enumerate(asked, start=1):
            await it.store.create_evaluation(PROJECT, f"ev-{number}", spec, None)
        with capture_logs() as logs:
            working = asyncio.create_task(Evaluations(it.parts, "old").run())
            deadline = time.monotonic() + PATIENCE_SECONDS
            while (await it.store.get_evaluation(PROJECT, "ev-2")).state is not EvaluationState.FAILED:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
            working.cancel()
            await asyncio.wait({working})
        (passed,) = [line for line in logs if line["event"] == "evaluation_passed_on"]
        assert (passed["evaluation"], passed["unknown"]) == ("ev-1", ("grader.kind",))
        newer = await it.store.claim_evaluation("newer", timedelta(seconds=5))
        assert newer is not None
        assert newer.id == "ev-1"


def test_answers_that_a_newer_orchestrator_kept_are_not_asked_for_again(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"row": 3, "texts": ["yes"], "cached_tokens": 5}) + "\n")
    assert Answers(file).found == {3: Answer(3, ("yes",))}


async def test_an_older_gateway_shows_and_cancels_a_job_of_a_newer_graft(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        assert isinstance(it.store, SqlStore)
        await it.store.create_job("default", "ft-1", JobSpec(SERVED, "ds-1"), None)
        await rewrite(it.store, "ft-1", lambda spec: spec["hyperparameters"].update(momentum=0.9))
        stub = FineTuningServiceStub(it.channel)
        (listed,) = (
            await stub.ListFineTuningJobs(pb.ListFineTuningJobsRequest(parent="projects/default"))
        ).fine_tuning_jobs
        assert listed.base_model.endswith(SERVED)
        cancelled = await stub.CancelFineTuningJob(pb.CancelFineTuningJobRequest(name=listed.name))
        assert cancelled.cancel_requested


@pytest.mark.parametrize("method", list(Method))
def test_every_hyperparameter_that_is_derived_is_known(method: Method) -> None:
    base = BaseModel("b", "/b", "sha256:b", 135_000_000, 1, 2048, "MIT", "folder", ("q_proj",), 64)
    lora = Lora(use_rslora=True, use_dora=True, modules_to_save=("lm_head",), base_quantization="nf4")
    asked = JobSpec("b", "ds", method=method, lora=lora, served_as=ServedAs.LOW_RANK_DELTA)
    others: list[dict[str, Any]] = [{"tuning": tuning} for tuning in Tuning] + [
        {"sweep": Sweep((1e-4, 1e-3))},
        {"sweep": Sweep(ranks=(4, 8))},
    ]
    for other in others:
        derived = derive(replace(asked, **other), base, DataStats(403, 400, 16_000, 800, 60, 40, 3))
        assert {item.name for item in derived} <= HYPERPARAMETERS


READ_SINCE = {
    JobState: "VALIDATING QUEUED STARTING RUNNING REGISTERING EVALUATING SUCCEEDED FAILED CANCELLED PAUSED",
    EvaluationState: "QUEUED RUNNING SUCCEEDED FAILED CANCELLED",
    DeploymentState: "STARTING READY FAILED STOPPING",
    EventLevel: "info warn error",
    ServedAs: "adapter low_rank_delta merged_model",
    DatasetFormat: "messages prompt_completion text question_answer alpaca sharegpt preference openai_preference "
    "graded_prompts fields",
}
"""Values that stand in columns of their own, which the Graft before can read."""


@pytest.mark.parametrize("kind", READ_SINCE, ids=lambda kind: kind.__name__)
def test_a_value_of_a_column_is_read_one_version_before_it_is_written(kind: type[StrEnum]) -> None:
    # A new value fails here: teach this version to read it, list it, and write it from the next version on (ADR 12).
    assert " ".join(kind) == READ_SINCE[kind]


def test_defaults_of_what_is_stored_never_change() -> None:
    # They are not written, so that a changed one would change the meaning of jobs that are there (ADR 12).
    names = (
        "epochs max_steps batch_size learning_rate learning_rate_multiplier warmup_ratio weight_decay max_grad_norm "
        "context_tokens seed num_workers checkpoint_steps validation_fraction early_stopping_patience eval_steps"
    )
    none = dict.fromkeys(names.split())
    grader = {"grader": None, "group_size": 0, "max_completion_tokens": 0, "temperature": 0.0, "beta": 0.0}
    lora = {"rank": 0, "alpha": 0.0, "dropout": 0.0, "target_modules": (), "use_rslora": False, "use_dora": False}
    assert asdict(JobSpec("b", "d")) == {
        "base_model": "b",
        "training_dataset": "d",
        **dict.fromkeys(("validation_dataset", "suffix", "from_adapter", "sweep")),
        "method": "supervised",
        "loss_on": "completion",
        "tuning": "lora",
        "served_as": "adapter",
        "preference": {"beta": 0.0},
        "reinforcement": {**grader, "epsilon": 0.0},
        "lora": {**lora, "modules_to_save": (), "base_quantization": ""},
        "last_layers": {"blocks": 0, "train_head": False},
        "delta_rank": 0,
        "task": "",
        "task_definition": "",
        "metadata": {},
        "hyperparameters": {**none, "over_length_policy": "drop", "sharding": "auto"},
    }
    assert asdict(EvaluationSpec("d", (Contestant("m"),))) == {
        "dataset": "d",
        "contestants": ({"model": "m", "shots": 0},),
        "metrics": (),
        "task": "",
        "task_definition": "",
        "grader": None,
        "shots_dataset": None,
        "max_rows": 0,
        "samples": 0,
        "max_tokens": 0,
        "display_name": "",
    }
