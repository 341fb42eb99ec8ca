"""Who works on a job: cancellation, restart and loss of the lease in every state, and the cluster's room."""

import asyncio
import time
from datetime import timedelta
from pathlib import Path

import pytest

from graft.domain.jobs import Job, JobState
from tests.support.orchestration import PROJECT, World, world

LIVE_STATES = [
    JobState.VALIDATING,
    JobState.QUEUED,
    JobState.STARTING,
    JobState.RUNNING,
    JobState.REGISTERING,
    JobState.EVALUATING,
]


async def _nothing_twice(it: World, job_id: str) -> None:
    events = await it.events(job_id)
    keys = [event.data["key"] for event in events if "key" in event.data]
    assert len(keys) == len(set(keys))
    reports = [event.data["report"] for event in events if "report" in event.data]
    assert reports == sorted(set(reports))
    assert reports == [1, 2, 3, 4, 5, 6]
    assert await it.states(job_id) == [*(state.value for state in LIVE_STATES), "SUCCEEDED"]
    assert len(await it.store.list_checkpoints(PROJECT, job_id)) == 1
    assert len(it.registry.versions) == 1
    assert it.runs.starts == [(job_id, 1)]


@pytest.mark.parametrize("crash", [False, True], ids=["stopped", "killed"])
@pytest.mark.parametrize("state", LIVE_STATES)
async def test_the_next_owner_goes_on_exactly_where_the_job_is(tmp_path: Path, state: JobState, crash: bool) -> None:
    async with world(tmp_path) as it:
        it.close_gate(state)
        await it.create_job("job-1")
        async with it.orchestrator(crash=crash):
            await it.until("job-1", state)
            await asyncio.sleep(0.05)
        assert (await it.job("job-1")).state is state
        assert (await it.job("job-1")).lease_owner is None or crash
        assert not it.runs.cancelled
        async with it.orchestrator() as second:
            while (await it.job("job-1")).lease_owner != second.owner:  # noqa: ASYNC110 - the database is watched
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            it.open_gate(state)
            await it.until("job-1", JobState.SUCCEEDED)
        await _nothing_twice(it, "job-1")


@pytest.mark.parametrize("state", LIVE_STATES)
async def test_a_cancel_wish_is_honoured_within_two_seconds(tmp_path: Path, state: JobState) -> None:
    async with world(tmp_path) as it:
        it.close_gate(state)
        await it.create_job("job-1")
        async with it.orchestrator():
            await it.until("job-1", state)
            asked = time.monotonic()
            await it.store.request_cancel(PROJECT, "job-1")
            await it.until("job-1", JobState.CANCELLED)
            assert time.monotonic() - asked < 2
            await asyncio.sleep(0.1)
        assert not it.runs.live
        if state in (JobState.STARTING, JobState.RUNNING):
            assert it.runs.cancelled == [("job-1", 1)]
            assert it.runs.released == [("job-1", 1)]
            assert it.registry.runs["run-default-job-1-1"]["status"] == "KILLED"


@pytest.mark.parametrize("state", [JobState.RUNNING, JobState.EVALUATING])
async def test_a_wish_made_while_nobody_ran_the_job_is_honoured_by_its_next_owner(
    tmp_path: Path, state: JobState
) -> None:
    async with world(tmp_path) as it:
        it.close_gate(state)
        await it.create_job("job-1")
        async with it.orchestrator():
            await it.until("job-1", state)
        await it.store.request_cancel(PROJECT, "job-1")
        async with it.orchestrator():
            await it.until("job-1", JobState.CANCELLED)
        assert not it.runs.live


async def _claim_nothing(*_: object) -> tuple[Job, ...]:
    return ()


@pytest.mark.parametrize("state", LIVE_STATES)
async def test_an_owner_that_lost_its_lease_does_nothing_more(tmp_path: Path, state: JobState) -> None:
    async with world(tmp_path) as it:
        it.close_gate(state)
        await it.create_job("job-1")
        async with it.orchestrator() as first:
            await it.until("job-1", state)
            claim = it.store.claim_jobs
            it.store.claim_jobs = _claim_nothing  # type: ignore[method-assign]
            await asyncio.sleep(0.05)  # a claim that is under way
            await it.store.release_leases(first.owner)
            assert [job.id for job in await claim("another", timedelta(seconds=60), 10)] == ["job-1"]
            await asyncio.sleep(0.1)
            assert not any(task.get_name() == "job job-1" for task in asyncio.all_tasks())
            before = len(await it.events("job-1"))
            it.open_gate(state)
            await asyncio.sleep(0.3)
            assert len(await it.events("job-1")) == before
            assert (await it.job("job-1")).state is state
            assert not it.runs.cancelled


async def test_jobs_run_side_by_side_within_the_clusters_cpus_oldest_first(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.cpus = 2
        it.close_gate(JobState.QUEUED)
        it.close_gate(JobState.RUNNING)
        for number in range(4):
            await it.create_job(f"job-{number}", suffix=f"a{number}")
        async with it.orchestrator():
            for number in range(4):
                await it.until(f"job-{number}", JobState.QUEUED)
            await asyncio.sleep(0.05)
            it.open_gate(JobState.QUEUED)
            await it.until("job-1", JobState.RUNNING)
            await asyncio.sleep(0.1)
            states = [(await it.job(f"job-{number}")).state for number in range(4)]
            assert states == [JobState.RUNNING, JobState.RUNNING, JobState.QUEUED, JobState.QUEUED]
            it.open_gate(JobState.RUNNING)
            for number in range(4):
                await it.until(f"job-{number}", JobState.SUCCEEDED)
        assert [job_id for job_id, _ in it.runs.starts][2:] == ["job-2", "job-3"]
        assert it.runs.most_live <= 2


async def test_the_limit_of_concurrent_jobs_is_kept(tmp_path: Path) -> None:
    async with world(tmp_path, GRAFT_ORCHESTRATOR_MAX_CONCURRENT_JOBS="1") as it:
        for number in range(3):
            await it.create_job(f"job-{number}", suffix=f"a{number}")
        async with it.orchestrator():
            for number in range(3):
                await it.until(f"job-{number}", JobState.SUCCEEDED)
        assert it.runs.most_live == 1


async def test_an_adopted_run_counts_before_a_queued_job_starts(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.cpus = 1
        it.close_gate(JobState.RUNNING)
        await it.create_job("job-1", suffix="a")
        async with it.orchestrator():
            await it.until("job-1", JobState.RUNNING)
        await it.create_job("job-2", suffix="b")
        async with it.orchestrator():
            await it.until("job-2", JobState.QUEUED)
            await asyncio.sleep(0.1)
            assert (await it.job("job-2")).state is JobState.QUEUED
            it.open_gate(JobState.RUNNING)
            await it.until("job-2", JobState.SUCCEEDED)
        assert it.runs.most_live == 1


async def test_a_job_that_is_evaluated_leaves_its_room_to_the_next(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.cpus = 1
        it.close_gate(JobState.EVALUATING)
        await it.create_job("job-1", suffix="a")
        await it.create_job("job-2", suffix="b")
        async with it.orchestrator():
            await it.until("job-1", JobState.EVALUATING)
            await it.until("job-2", JobState.EVALUATING)


async def test_a_job_that_can_never_fit_fails_with_a_sentence(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.cpus, it.preparer.workers = 2, 5
        await it.create_job("job-1")
        async with it.orchestrator():
            job = await it.until("job-1", JobState.FAILED)
        assert job.error is not None
        assert job.error.reason == "DOES_NOT_FIT"
        assert "5 workers" in job.error.message
        assert "has 2" in job.error.message
