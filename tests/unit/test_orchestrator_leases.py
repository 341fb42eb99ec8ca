"""Who works on a job: cancellation, restart and loss of the lease in every state, and the cluster's room."""

import asyncio
import threading
import time
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from graft.domain.jobs import Event, Job, JobState
from graft.domain.placement import Node
from graft.orchestrator.room import Room
from tests.support.orchestration import PATIENCE_SECONDS, PROJECT, World, world

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
async def test_a_cancel_wish_is_honoured_whatever_the_job_waits_for(tmp_path: Path, state: JobState) -> None:
    async with world(tmp_path) as it:
        it.close_gate(state)
        await it.create_job("job-1")
        async with it.orchestrator():
            await it.until("job-1", state)
            asked = time.monotonic()
            await it.store.request_cancel(PROJECT, "job-1")
            await it.until("job-1", JobState.CANCELLED)
            assert time.monotonic() - asked < PATIENCE_SECONDS / 2  # the gates would keep it for as long as that
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


async def test_nothing_of_the_orchestrator_is_at_work_once_it_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow_to_end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.5)  # as a transaction that is rolled back

    async with world(tmp_path) as it:
        before = asyncio.all_tasks()
        async with it.orchestrator() as orchestrator:
            monkeypatch.setattr(orchestrator.mirror, "run", slow_to_end)
            await asyncio.sleep(0.1)
        assert asyncio.all_tasks() == before, "the store is closed now"


async def _claim_nothing(*_: object) -> tuple[Job, ...]:
    return ()


async def _no_task_for(job_id: str) -> None:
    """Waits until the orchestrator has dropped the job; the test's own time limit is the only one."""
    while any(task.get_name() == f"job {job_id}" for task in asyncio.all_tasks()):  # noqa: ASYNC110 - tasks tell nobody
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("state", LIVE_STATES)
async def test_an_owner_that_lost_its_lease_does_nothing_more(tmp_path: Path, state: JobState) -> None:
    async with world(tmp_path) as it:
        it.close_gate(state)
        await it.create_job("job-1")
        async with it.orchestrator() as first:
            await it.until("job-1", state)
            claim = it.store.claim_jobs
            it.store.claim_jobs = _claim_nothing  # type: ignore[method-assign]
            taken: tuple[Job, ...] = ()
            while not taken:  # a claim of the first owner may have been under way
                await it.store.release_leases(first.owner)
                taken = await claim("another", timedelta(seconds=60), 10)
            assert [job.id for job in taken] == ["job-1"]
            await _no_task_for("job-1")
            before = len(await it.events("job-1"))
            it.open_gate(state)
            await asyncio.sleep(0.3)
            assert len(await it.events("job-1")) == before
            assert (await it.job("job-1")).state is state
            assert not it.runs.cancelled


async def _start_order(it: World, *job_ids: str) -> list[str]:
    """The jobs in the order in which they left the queue."""
    started = {
        job_id: event.create_time
        for job_id in job_ids
        for event in await it.events(job_id, "state")
        if event.data["state"] == JobState.STARTING
    }
    return sorted(started, key=lambda job_id: started[job_id])


async def test_jobs_run_side_by_side_within_the_clusters_cpus_oldest_first(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.cpus = 2
        it.close_gate(JobState.QUEUED)
        it.close_gate(JobState.RUNNING)
        jobs = [f"job-{number}" for number in range(4)]
        for number, job_id in enumerate(jobs):
            await it.create_job(job_id, suffix=f"a{number}")
        async with it.orchestrator():
            for job_id in jobs:
                await it.until(job_id, JobState.QUEUED)
            it.open_gate(JobState.QUEUED)
            for job_id in jobs[:2]:
                await it.until(job_id, JobState.RUNNING)
            await asyncio.sleep(0.1)
            states = [(await it.job(job_id)).state for job_id in jobs]
            assert states == [JobState.RUNNING, JobState.RUNNING, JobState.QUEUED, JobState.QUEUED]
            it.open_gate(JobState.RUNNING)
            for job_id in jobs:
                await it.until(job_id, JobState.SUCCEEDED)
        assert await _start_order(it, *jobs) == jobs
        assert it.runs.most_live <= 2


async def test_a_queued_job_that_takes_long_to_adopt_is_not_overtaken(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.cpus = 1
        it.close_gate(JobState.QUEUED)
        await it.create_job("job-1", suffix="a")
        await it.create_job("job-2", suffix="b")
        async with it.orchestrator():
            await it.until("job-1", JobState.QUEUED)
            await it.until("job-2", JobState.QUEUED)
        it.open_gate(JobState.QUEUED)
        read, readable = it.store.list_events, asyncio.Event()

        async def slow_for_the_first(project: str, job_id: str, after_sequence: int, limit: int) -> tuple[Event, ...]:
            if job_id == "job-1":
                await readable.wait()
            return await read(project, job_id, after_sequence, limit)

        it.store.list_events = slow_for_the_first  # type: ignore[method-assign]
        async with it.orchestrator() as second:
            while (await it.job("job-2")).lease_owner != second.owner:  # noqa: ASYNC110 - the database is watched
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert (await it.job("job-2")).state is JobState.QUEUED
            readable.set()
            await it.until("job-2", JobState.SUCCEEDED)
        assert await _start_order(it, "job-1", "job-2") == ["job-1", "job-2"]


async def test_a_queued_job_that_cannot_be_read_holds_nobody_up(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.cpus = 1
        it.close_gate(JobState.QUEUED)
        await it.create_job("job-1", suffix="a")
        await it.create_job("job-2", suffix="b")
        async with it.orchestrator():
            await it.until("job-1", JobState.QUEUED)
            await it.until("job-2", JobState.QUEUED)
        it.open_gate(JobState.QUEUED)
        read = it.store.list_events

        async def broken_for_the_first(project: str, job_id: str, after_sequence: int, limit: int) -> tuple[Event, ...]:
            if job_id == "job-1":
                raise KeyError("a row that no version of Graft wrote")
            return await read(project, job_id, after_sequence, limit)

        it.store.list_events = broken_for_the_first  # type: ignore[method-assign]
        async with it.orchestrator():
            await it.until("job-2", JobState.SUCCEEDED)
            assert (await it.job("job-1")).state is JobState.QUEUED
            it.store.list_events = read  # type: ignore[method-assign]
            await it.until("job-1", JobState.SUCCEEDED)


async def test_an_older_job_that_lines_up_while_the_cluster_answers_goes_first(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        older = await it.create_job("job-1", suffix="a")
        younger = await it.create_job("job-2", suffix="b")
        asked, answer = threading.Event(), threading.Event()

        def nodes() -> list[Node]:
            asked.set()
            assert answer.wait(PATIENCE_SECONDS)
            return [Node({"CPU": 2.0})]

        room, entered = Room(replace(it.parts, nodes=nodes)), list[str]()

        async def tell(_key: str, _message: str) -> None: ...

        async def enter(job: Job) -> None:
            async with room.turn(job, tell):
                entered.append(job.id)
                await asyncio.sleep(0.05)
                entered.append(job.id)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(enter(younger))
            await asyncio.to_thread(asked.wait, PATIENCE_SECONDS)
            tasks.create_task(enter(older))
            await asyncio.sleep(0)
            answer.set()
        assert entered == ["job-1", "job-1", "job-2", "job-2"]


async def test_a_waiting_job_does_not_look_at_all_others_at_every_poll(tmp_path: Path) -> None:
    looks = 0

    class Age(datetime):
        def __lt__(self, other: object) -> bool:
            nonlocal looks
            looks += 1
            return super().__lt__(other)  # type: ignore[operator]

    polls, waiting = 0, 64
    async with world(tmp_path) as it:

        def nodes() -> list[Node]:
            nonlocal polls
            polls += 1
            return []

        room = Room(replace(it.parts, nodes=nodes))
        job = await it.create_job("job-0")
        jobs = [replace(job, id=f"job-{n}", create_time=Age(2026, 1, 1, 0, n // 60, n % 60)) for n in range(waiting)]

        async def tell(_key: str, _message: str) -> None:
            pass

        async def enter(job: Job) -> None:
            async with room.turn(job, tell):
                raise AssertionError("the cluster has no CPUs")

        tasks = [asyncio.create_task(enter(job)) for job in jobs]
        while polls < 2:  # noqa: ASYNC110 - the first job's polls are what is counted
            await asyncio.sleep(0.01)
        lined_up = looks
        before = polls
        while polls < before + 10:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)
        assert looks - lined_up < waiting
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


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
