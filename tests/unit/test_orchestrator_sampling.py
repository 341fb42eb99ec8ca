"""What the orchestrator does for reinforcement around its run: the engine is there before, and empty after."""

import asyncio
from pathlib import Path

import pytest

from graft.domain.jobs import JobState, Method
from graft.internal.v1 import engine_pb2
from tests.support.orchestration import World, world


def hold(it: World, *models: str) -> None:
    for model in models:
        it.engine.held.adapters.append(engine_pb2.Resident(model=model, digest=f"sha256:{model}"))


async def test_a_killed_runs_policies_leave_the_engine_and_the_disk(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.close_gate(JobState.RUNNING)
        job = await it.create_job("ft-1", method=Method.REINFORCEMENT)
        async with it.orchestrator():
            await it.until("ft-1", JobState.RUNNING)
            hold(it, "tiny:ft-1-step-3", "tiny:ft-12-step-3", "tiny:reviews@1")
            folder = tmp_path / "runs" / "ft-1" / "1" / "policy" / "step-3"
            folder.mkdir(parents=True)
            await it.store.request_cancel(job.project, job.id)
            await it.until("ft-1", JobState.CANCELLED)
        assert it.engine.unloaded == ["sha256:tiny:ft-1-step-3"]
        assert not folder.parent.exists()


async def test_a_run_that_ended_well_is_looked_after_too(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        hold(it, "tiny:ft-1-step-9")
        await it.create_job("ft-1", method=Method.REINFORCEMENT)
        async with it.orchestrator():
            await it.until("ft-1", JobState.SUCCEEDED)
        assert it.engine.unloaded == ["sha256:tiny:ft-1-step-9"]


@pytest.mark.parametrize("method", [Method.REINFORCEMENT, Method.SUPERVISED])
async def test_only_reinforcement_waits_for_the_engine_before_it_trains(tmp_path: Path, method: Method) -> None:
    async with world(tmp_path) as it:
        it.engine.held.ready = False
        it.close_gate(JobState.RUNNING)
        await it.create_job("ft-1", method=method)
        async with it.orchestrator():
            if method is Method.REINFORCEMENT:
                for _ in range(2000):
                    if any("The engine is not available yet" in event.message for event in await it.events("ft-1")):
                        break
                    await asyncio.sleep(0.01)
                else:
                    raise AssertionError("nobody was told that the job waits")
                assert (await it.job("ft-1")).state is JobState.VALIDATING
                it.engine.held.ready = True
            await it.until("ft-1", JobState.RUNNING)


async def test_a_base_that_the_engine_does_not_serve_fails_the_job_before_it_trains(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.engine.held.base_model = "another"
        await it.create_job("ft-1", method=Method.REINFORCEMENT)
        async with it.orchestrator():
            await it.until("ft-1", JobState.FAILED)
        error = (await it.job("ft-1")).error
        assert error is not None
        assert error.reason == "BASE_MODEL_NOT_SERVED"
        assert not it.runs.starts
