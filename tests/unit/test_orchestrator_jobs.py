"""A job's way through the orchestrator: what it writes when all is well, and how it fails."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from graft.domain.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from graft.domain.jobs import EventLevel, JobState
from graft.training.spec import Report
from tests.support.orchestration import BASE, CHAMPION, KEY, PROJECT, good_reports, world

WHOLE_WAY = ["VALIDATING", "QUEUED", "STARTING", "RUNNING", "REGISTERING", "EVALUATING", "SUCCEEDED"]


async def test_a_job_goes_its_whole_way_and_says_each_thing_once_and_in_order(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        await it.create_job("job-1")
        async with it.orchestrator():
            job = await it.until("job-1", JobState.SUCCEEDED)
        assert await it.states("job-1") == WHOLE_WAY
        events = await it.events("job-1")
        told = [event.data.get("state") or event.data.get("key") or event.type for event in events]
        assert told == [
            *("VALIDATING", "data-training", "resolved", "QUEUED", "STARTING", "RUNNING"),
            *("message", "metrics", "metrics", "checkpoint", "metrics", "end-1"),
            *("REGISTERING", "registered", "EVALUATING", "loaded", "parity", "champion", "SUCCEEDED"),
        ]
        assert job.fine_tuned_model == f"{BASE}:reviews@1"
        assert [item.name for item in job.resolved] == ["num_workers", "lora.rank", "epochs"]
        assert job.progress is not None
        assert (job.progress.step, job.progress.loss, job.progress.trained_tokens) == (3, 0.0, 30)
        assert job.metrics["adapter_bytes"] == 1234
        assert job.metrics["load_seconds"] == 0.25
        assert job.metrics["parity_max_abs_difference"] == 0.0
        assert 0 <= job.metrics["publish_seconds"] < 10
        checkpoints = await it.store.list_checkpoints(PROJECT, "job-1")
        assert [(item.step, item.attempt, item.uri) for item in checkpoints] == [(2, 1, "checkpoint-2")]
        assert it.registry.aliases[KEY] == {CHAMPION: 1}
        assert (await it.store.get_adapter(*KEY)).aliases == {CHAMPION: 1}
        assert it.runs.released == [("job-1", 1)]


async def test_over_length_examples_are_told_in_a_warning_with_the_policy(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        await it.create_job("job-1")
        async with it.orchestrator():
            await it.until("job-1", JobState.SUCCEEDED)
        told = next(event for event in await it.events("job-1") if event.data.get("key") == "data-training")
        assert told.level is EventLevel.WARN
        assert "1 are longer than the context; policy: drop" in told.message
        assert told.data["over_length_count"] == 1


async def test_the_engine_scores_the_probes_tokens_with_the_loaded_version(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        await it.create_job("job-1")
        async with it.orchestrator():
            await it.until("job-1", JobState.SUCCEEDED)
        assert it.engine.bodies == [
            {
                "model": f"{BASE}:reviews@1",
                "prompt": [1, 2, 3, 4, 5],
                "max_tokens": 1,
                "temperature": 0,
                "prompt_logprobs": 0,
            }
        ]
        assert [(ref.registered_model, ref.version, ref.digest) for ref in it.engine.loaded] == [
            (f"{PROJECT}--{BASE}--reviews", 1, "sha256:job-1")
        ]


async def test_mlflow_gets_every_step_the_lineage_and_the_end(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        await it.create_job("job-1")
        async with it.orchestrator():
            job = await it.until("job-1", JobState.SUCCEEDED)
        assert job.mlflow_run_id == "run-default-job-1-1"
        run = it.registry.runs[job.mlflow_run_id]
        assert [step for step, metrics in run["metrics"] if "loss" in metrics] == [1, 2, 3]
        assert run["params"]["lora.rank"] == "8"
        assert run["tags"]["graft.dataset_digest"] == "sha256:data"
        assert run["tags"]["graft.base_model_digest"] == "sha256:base"
        assert run["status"] == "FINISHED"


async def test_data_that_cannot_be_trained_on_fails_the_job_with_the_reason(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.preparer.error = InvalidArgument("Nothing to train on.", reason="NO_EXAMPLES")
        await it.create_job("job-1")
        async with it.orchestrator():
            job = await it.until("job-1", JobState.FAILED)
        assert job.error is not None
        assert (job.error.code, job.error.reason, job.error.message) == (
            "INVALID_ARGUMENT",
            "NO_EXAMPLES",
            "Nothing to train on.",
        )
        assert not it.runs.starts


async def test_a_defect_fails_the_job_without_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret")

    async with world(tmp_path) as it:
        monkeypatch.setattr(it.preparer, "plan", broken)
        await it.create_job("job-1")
        async with it.orchestrator():
            job = await it.until("job-1", JobState.FAILED)
        assert job.error is not None
        assert job.error.reason == "INTERNAL"
        assert "ZeroDivisionError" in job.error.message
        assert "secret" not in job.error.message


async def test_a_failed_report_fails_the_job_with_its_reason_and_frees_the_run(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        failed = Report(3, "failed", 2.0, {"reason": "LOSS_NOT_FINITE", "message": "The loss is NaN at step 2."})
        it.runs.reports = [*good_reports()[:2], failed]
        await it.create_job("job-1")
        async with it.orchestrator():
            job = await it.until("job-1", JobState.FAILED)
            await asyncio.sleep(0.1)
        assert job.error is not None
        assert (job.error.reason, job.error.message) == ("LOSS_NOT_FINITE", "The loss is NaN at step 2.")
        assert it.runs.released == [("job-1", 1)]
        assert it.registry.runs["run-default-job-1-1"]["status"] == "FAILED"


async def test_a_run_that_dies_is_tried_again_as_the_next_attempt(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.runs.lost_attempts = {1}
        await it.create_job("job-1")
        async with it.orchestrator():
            job = await it.until("job-1", JobState.SUCCEEDED)
        assert job.attempt == 2
        assert it.runs.starts == [("job-1", 1), ("job-1", 2)]
        assert ("job-1", 1) in it.runs.released
        assert await it.states("job-1") == [*WHOLE_WAY[:4], *WHOLE_WAY[1:]]
        reports = [event.data["report"] for event in await it.events("job-1", "metrics") if event.data["attempt"] == 2]
        assert reports == [2, 3, 5]


async def test_a_run_that_dies_three_times_fails_the_job(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.runs.lost_attempts = {1, 2, 3}
        await it.create_job("job-1")
        async with it.orchestrator():
            job = await it.until("job-1", JobState.FAILED)
        assert job.error is not None
        assert job.error.reason == "RUN_LOST"
        assert [attempt for _, attempt in it.runs.starts] == [1, 2, 3]


async def test_a_run_that_loses_a_worker_is_tried_again_and_fails_with_that_reason_the_third_time(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as it:
        it.runs.worker_lost_attempts = {1}
        await it.create_job("job-1")
        async with it.orchestrator():
            job = await it.until("job-1", JobState.SUCCEEDED)
        assert job.attempt == 2
        assert ("job-1", 1) in it.runs.released
        assert it.registry.runs["run-default-job-1-1"]["status"] == "FAILED"
        assert any("lost a training worker" in event.message for event in await it.events("job-1"))
        it.runs.worker_lost_attempts = {1, 2, 3}
        await it.create_job("job-2")
        async with it.orchestrator():
            job = await it.until("job-2", JobState.FAILED)
        assert job.error is not None
        assert (job.error.code, job.error.reason) == ("UNAVAILABLE", "WORKER_DIED")
        assert [attempt for name, attempt in it.runs.starts if name == "job-2"] == [1, 2, 3]


async def test_a_cluster_that_is_away_when_a_run_is_to_be_cleared_costs_no_job(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.runs.worker_lost_attempts = {1}
        it.runs.away = 2  # before the next attempt
        await it.create_job("job-1")
        async with it.orchestrator():
            assert (await it.until("job-1", JobState.SUCCEEDED)).attempt == 2
            it.runs.worker_lost_attempts, it.runs.away = set(), 2  # beside the registration
            await it.create_job("job-2")
            await it.until("job-2", JobState.SUCCEEDED)
        assert it.runs.away == 0
        assert [version.job_id for version in it.registry.versions] == ["job-1", "job-2"]
        waited = [event.message for event in await it.events("job-2") if "training cluster" in event.message]
        assert len(waited) == 2


async def test_a_job_that_has_lost_a_host_waits_for_it(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.cpus, it.preparer.workers = 2, 2
        it.runs.worker_lost_attempts = {1}
        it.gates.close(JobState.STARTING)
        await it.create_job("job-1")
        async with it.orchestrator():
            await it.until("job-1", JobState.STARTING)
            it.gates.close(JobState.QUEUED)
            it.gates.open(JobState.STARTING)
            job = await it.until("job-1", JobState.QUEUED)
            assert job.attempt == 2
            it.cpus = 1
            it.gates.open(JobState.QUEUED)
            await asyncio.sleep(0.3)  # six times what a job that has never fitted is given
            assert (await it.store.get_job("default", "job-1")).state is JobState.QUEUED
            it.cpus = 2
            await it.until("job-1", JobState.SUCCEEDED)


async def test_an_engine_that_computes_something_else_fails_the_job_and_gets_no_alias(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.engine.logprob = -0.6
        await it.create_job("job-1")
        async with it.orchestrator():
            job = await it.until("job-1", JobState.FAILED)
        assert job.error is not None
        assert job.error.reason == "PARITY_FAILED"
        assert job.metrics["parity_max_abs_difference"] == pytest.approx(0.1)
        assert job.fine_tuned_model is None
        assert it.registry.aliases[KEY] == {}
        assert it.engine.unloaded == ["sha256:job-1"]


@pytest.mark.parametrize(("trainer", "engine"), [("bfloat16", "bfloat16"), ("float32", "bfloat16")])
async def test_sixteen_bits_on_either_side_are_allowed_their_rounding(
    tmp_path: Path, trainer: str, engine: str
) -> None:
    async with world(tmp_path) as it:
        it.runs.dtype, it.engine.dtype = trainer, engine
        it.engine.logprob = -0.6  # 0.1 off
        await it.create_job("job-1")
        async with it.orchestrator():
            await it.until("job-1", JobState.SUCCEEDED)
        it.engine.logprob = -0.8
        await it.create_job("job-2")
        async with it.orchestrator():
            job = await it.until("job-2", JobState.FAILED)
        assert job.error is not None
        assert job.error.reason == "PARITY_FAILED"


async def test_an_engine_that_answers_no_numbers_fails_the_job(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.engine.logprob = float("nan")
        await it.create_job("job-1")
        async with it.orchestrator():
            job = await it.until("job-1", JobState.FAILED)
        assert job.error is not None
        assert job.error.reason == "PARITY_FAILED"
        assert it.registry.aliases[KEY] == {}


async def test_a_loss_that_is_no_number_is_told_without_breaking_the_progress(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        broken = Report(6, "metrics", 4.0, {"step": 4, "total_steps": 4, "loss": float("nan")})
        it.runs.reports = [*good_reports()[:5], broken, Report(7, "finished", 4.1)]
        await it.create_job("job-1")
        async with it.orchestrator():
            job = await it.until("job-1", JobState.SUCCEEDED)
        assert job.progress is not None
        assert (job.progress.step, job.progress.loss) == (4, 0.0)
        assert (await it.events("job-1", "metrics"))[-1].data["loss"] == "nan"


async def test_an_adapter_that_the_engine_refuses_fails_the_job_with_the_engines_reason(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.engine.refusal = FailedPrecondition("Rank 128 is above 64.", reason="RANK_TOO_HIGH")
        await it.create_job("job-1")
        async with it.orchestrator():
            job = await it.until("job-1", JobState.FAILED)
        assert job.error is not None
        assert job.error.reason == "RANK_TOO_HIGH"


async def test_probes_that_are_longer_than_the_bases_own_context_are_not_put_to_the_engine(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        base = await it.store.get_base_model(BASE)
        await it.store.replace_base_models([replace(base, context_tokens=5)])
        await it.create_job("job-1")
        async with it.orchestrator():
            job = await it.until("job-1", JobState.FAILED)
        assert job.error is not None
        assert "None of the 1 probes" in job.error.message
        assert it.engine.bodies == []


async def test_an_engine_whose_queue_is_full_is_waited_for(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.engine.refusal = ResourceExhausted("Its queue is full.", reason="ENGINE_LIMIT")
        await it.create_job("job-1")
        async with it.orchestrator():
            await it.until("job-1", JobState.EVALUATING)
            while not any("not available yet" in event.message for event in await it.events("job-1", "message")):
                assert (await it.job("job-1")).state is JobState.EVALUATING
                await asyncio.sleep(0.02)
            it.engine.refusal = None
            await it.until("job-1", JobState.SUCCEEDED)


async def test_a_methods_own_metrics_and_an_early_end_reach_events_mlflow_and_the_job(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        told = {"step": 3, "total_steps": 9, "loss": 0.5, "accuracy": 0.75, "margin": 0.1, "validation_accuracy": 0.5}
        end = {"message": "Stopped early at step 3 of 9.", "best_step": 1, "best_validation_loss": 0.4}
        it.runs.reports = [Report(1, "started", 0.0), Report(2, "metrics", 1.0, told), Report(3, "finished", 1.1, end)]
        await it.create_job("job-1")
        async with it.orchestrator():
            job = await it.until("job-1", JobState.SUCCEEDED)
        assert (job.metrics["best_step"], job.metrics["best_validation_loss"]) == (1, 0.4)
        (event,) = await it.events("job-1", "metrics")
        assert event.message == "Step 3 of 9, loss 0.5000, accuracy 0.75."
        assert (event.data["margin"], event.data["validation_accuracy"]) == (0.1, 0.5)
        step, logged = it.registry.runs["run-default-job-1-1"]["metrics"][0]
        assert step == 3
        assert {"accuracy", "margin", "validation_accuracy"} <= set(logged)
        assert "Stopped early at step 3 of 9." in [event.message for event in await it.events("job-1")]


async def test_an_engine_that_is_away_is_waited_for_and_told_once(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.close_gate(JobState.EVALUATING)
        await it.create_job("job-1")
        async with it.orchestrator():
            await it.until("job-1", JobState.EVALUATING)
            await asyncio.sleep(0.2)
            it.open_gate(JobState.EVALUATING)
            await it.until("job-1", JobState.SUCCEEDED)
        messages = [event.message for event in await it.events("job-1") if event.message.startswith("The engine is")]
        assert len(messages) == 2
        assert "not available yet" in messages[0]
        assert messages[1] == "The engine is available."


async def test_an_engine_that_stays_away_fails_the_job_after_the_limit(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.parts = replace(it.parts, limits=replace(it.parts.limits, unavailable_seconds=0.1))
        it.close_gate(JobState.EVALUATING)
        await it.create_job("job-1")
        async with it.orchestrator():
            job = await it.until("job-1", JobState.FAILED)
        assert job.error is not None
        assert (job.error.code, job.error.reason) == ("UNAVAILABLE", "ENGINE_STARTING")


async def test_training_goes_on_while_mlflow_is_down_and_its_metrics_arrive_later(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.registry.down = True
        await it.create_job("job-1")
        async with it.orchestrator():
            await it.until("job-1", JobState.REGISTERING)
            await asyncio.sleep(0.1)
            it.registry.down = False
            await it.until("job-1", JobState.SUCCEEDED)
        warnings = [event for event in await it.events("job-1") if event.data.get("key") == "tracking-1"]
        assert len(warnings) == 1
        run = it.registry.runs["run-default-job-1-1"]
        assert [step for step, metrics in run["metrics"] if "loss" in metrics] == [1, 2, 3]


async def test_a_fast_run_writes_few_metrics_events_and_always_the_last(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        steps = [
            Report(number, "metrics", number / 100, {"step": number, "total_steps": 200, "loss": 1.0})
            for number in range(1, 201)
        ]
        it.runs.reports = [*steps, Report(201, "finished", 2.1)]
        await it.create_job("job-1")
        async with it.orchestrator():
            await it.until("job-1", JobState.SUCCEEDED)
        kept = [event.data["step"] for event in await it.events("job-1", "metrics")]
        assert len(kept) <= 10
        assert kept[-1] == 200
        logged = [step for step, metrics in it.registry.runs["run-default-job-1-1"]["metrics"] if "loss" in metrics]
        assert logged == list(range(1, 201))


async def test_a_second_version_does_not_take_the_champion_away(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        async with it.orchestrator():
            await it.create_job("job-1")
            await it.until("job-1", JobState.SUCCEEDED)
            await it.create_job("job-2")
            job = await it.until("job-2", JobState.SUCCEEDED)
        assert job.fine_tuned_model == f"{BASE}:reviews@2"
        assert it.registry.aliases[KEY] == {CHAMPION: 1}
