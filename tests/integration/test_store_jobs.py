"""The store's promises about jobs and leases, on SQLite and on a real PostgreSQL."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from graft.domain.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound
from graft.domain.jobs import (
    Checkpoint,
    EventLevel,
    Hyperparameters,
    Job,
    JobSpec,
    JobState,
    Lora,
    Memory,
    OverLengthPolicy,
    Progress,
    Resolved,
    Sharding,
)
from graft.store.protocol import Store
from graft.store.sql import SqlStore

pytestmark = pytest.mark.integration
LEASE = timedelta(seconds=30)
NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
SPEC = JobSpec(
    base_model="base",
    training_dataset="ds-1",
    validation_dataset="ds-2",
    suffix="reviews",
    lora=Lora(rank=8, target_modules=("q_proj",)),
    hyperparameters=Hyperparameters(epochs=1.5, over_length_policy=OverLengthPolicy.TRUNCATE, sharding=Sharding.ALWAYS),
    metadata={"team": "a"},
)


async def _claimed(store: Store, owner: str = "me") -> Job:
    await store.create_job("default", "ft-1", SPEC, None)
    (job,) = await store.claim_jobs(owner, LEASE, 10)
    return job


async def test_a_job_comes_back_as_it_was_given(store: SqlStore) -> None:
    created = await store.create_job("default", "ft-1", SPEC, None, Memory(4, 3, 2, 1))
    assert (created.spec, created.memory) == (SPEC, Memory(4, 3, 2, 1))
    assert created.state is JobState.VALIDATING
    assert created.create_time.tzinfo is UTC
    assert await store.get_job("default", "ft-1") == created
    (event,) = await store.list_events("default", "ft-1", 0, 10)
    assert (event.sequence, event.type, event.data) == (1, "state", {"state": "VALIDATING"})


async def test_a_retried_create_returns_the_first_job(store: SqlStore) -> None:
    made = await asyncio.gather(*(store.create_job("default", f"ft-{n}", SPEC, "request") for n in range(5)))
    assert len({job.id for job in made}) == 1
    assert len((await store.list_jobs("default", 10, "")).items) == 1
    assert (await store.create_job("other", "ft-9", SPEC, "request")).id == "ft-9"


async def test_a_created_job_is_answered_as_it_was_stored_however_quick_the_orchestrator_is(store: SqlStore) -> None:
    async def orchestrate() -> None:
        claimed = 0
        while claimed < 20:
            claimed += len(await store.claim_jobs("me", LEASE, 10))

    orchestrating = asyncio.create_task(orchestrate())
    made = [await store.create_job("default", f"ft-{n}", SPEC, None) for n in range(20)]
    await orchestrating
    assert {job.lease_owner for job in made} == {None}


async def test_jobs_are_counted_by_state_whatever_their_project(store: SqlStore) -> None:
    assert await store.count_jobs() == {}
    job = await _claimed(store)
    await store.create_job("team", "job-of-a-team", job.spec, None)
    await store.transition(job, "me", JobState.QUEUED, message="It waits.")
    assert await store.count_jobs() == {JobState.QUEUED: 1, JobState.VALIDATING: 1}


async def test_two_claimers_never_get_the_same_job(store: SqlStore) -> None:
    for number in range(20):
        await store.create_job("default", f"ft-{number}", SPEC, None)
    rounds = await asyncio.gather(*(store.claim_jobs(f"owner-{n % 4}", LEASE, 3) for n in range(12)))
    claimed = [job.id for jobs in rounds for job in jobs]
    assert len(claimed) == len(set(claimed)) == 20
    held = [await store.leased_jobs(f"owner-{n}") for n in range(4)]
    assert sorted(job.id for jobs in held for job in jobs) == sorted(claimed)


async def test_a_lapsed_lease_is_taken_over_and_the_old_owner_is_refused(store: SqlStore) -> None:
    await store.create_job("default", "ft-1", SPEC, None)
    (mine,) = await store.claim_jobs("old", timedelta(milliseconds=1), 1)
    await asyncio.sleep(0.02)
    (theirs,) = await store.claim_jobs("new", LEASE, 1)
    assert theirs.id == mine.id
    for write in (
        store.transition(mine, "old", JobState.QUEUED, message="x"),
        store.record(mine, "old", metrics={"a": 1.0}),
    ):
        with pytest.raises(Aborted):
            await write
    assert await store.renew_leases("old", LEASE) == frozenset()
    assert await store.renew_leases("new", LEASE) == {"ft-1"}
    assert await store.claim_jobs("other", LEASE, 1) == ()
    await store.release_leases("new")
    assert len(await store.claim_jobs("other", LEASE, 1)) == 1


async def test_a_superseded_attempt_is_refused(store: SqlStore) -> None:
    job = await _claimed(store)
    for state in (JobState.QUEUED, JobState.STARTING):
        job = await store.transition(job, "me", state, message="x")
    retried = await store.transition(job, "me", JobState.QUEUED, message="again", next_attempt=True)
    assert retried.attempt == 2
    with pytest.raises(Aborted, match="attempt 1"):
        await store.record(job, "me", metrics={"a": 1.0})


async def test_an_illegal_move_changes_nothing(store: SqlStore) -> None:
    job = await _claimed(store)
    with pytest.raises(FailedPrecondition):
        await store.transition(job, "me", JobState.RUNNING, message="x")
    assert (await store.get_job("default", "ft-1")).state is JobState.VALIDATING
    assert len(await store.list_events("default", "ft-1", 0, 10)) == 1


async def test_a_whole_life_is_recorded_in_order_without_gaps(store: SqlStore) -> None:
    job = await _claimed(store)
    resolved = (Resolved("epochs", 1.5, False, "given"), Resolved("lora.target_modules", ["q_proj"], True, "all"))
    job = await store.record(job, "me", resolved=resolved, event=(EventLevel.WARN, "message", "long", {"n": 1}))
    for state in (JobState.QUEUED, JobState.STARTING, JobState.RUNNING):
        job = await store.transition(job, "me", state, message=state.value)
    assert job.start_time is not None
    progress = Progress(step=1, total_steps=2, loss=0.5, remaining_seconds=3.0)
    checkpoint = Checkpoint(1, NOW, "/c", 1, {"train_loss": 0.5})
    for _ in range(2):
        job = await store.record(job, "me", progress=progress, metrics={"a": 1.0}, checkpoint=checkpoint)
    job = await store.record(job, "me", metrics={"b": 2.0}, mlflow_run_id="run")
    for state in (JobState.REGISTERING, JobState.EVALUATING):
        job = await store.transition(job, "me", state, message=state.value)
    job = await store.transition(job, "me", JobState.SUCCEEDED, message="done", fine_tuned_model="base:reviews@1")
    assert job.end_time is not None
    assert (job.resolved, job.progress, job.metrics) == (resolved, progress, {"a": 1.0, "b": 2.0})
    assert (job.fine_tuned_model, job.mlflow_run_id, job.lease_owner) == ("base:reviews@1", "run", None)
    assert await store.list_checkpoints("default", "ft-1") == (checkpoint,)
    events = await store.list_events("default", "ft-1", 0, 100)
    assert [event.sequence for event in events] == list(range(1, 9))
    assert [event.data["state"] for event in events if event.type == "state"] == [
        "VALIDATING", "QUEUED", "STARTING", "RUNNING", "REGISTERING", "EVALUATING", "SUCCEEDED",
    ]  # fmt: skip
    assert await store.list_events("default", "ft-1", 6, 1) == events[6:7]
    assert await store.claim_jobs("me", LEASE, 10) == ()


async def test_concurrent_writers_leave_no_gap_in_the_sequence(store: SqlStore) -> None:
    job = await _claimed(store)
    writes = (store.record(job, "me", event=(EventLevel.INFO, "message", str(n), {})) for n in range(30))
    await asyncio.gather(*writes)
    events = await store.list_events("default", "ft-1", 0, 100)
    assert [event.sequence for event in events] == list(range(1, 32))


async def test_a_cancel_is_asked_once_and_refused_after_another_end(store: SqlStore) -> None:
    job = await _claimed(store)
    for _ in range(2):
        assert (await store.request_cancel("default", "ft-1")).cancel_requested
    assert len(await store.list_events("default", "ft-1", 0, 10)) == 2
    await store.transition(job, "me", JobState.CANCELLED, message="x")
    assert (await store.request_cancel("default", "ft-1")).state is JobState.CANCELLED
    await store.create_job("default", "ft-2", SPEC, None)
    (second,) = await store.claim_jobs("me", LEASE, 1)
    await store.transition(second, "me", JobState.FAILED, message="x")
    with pytest.raises(FailedPrecondition, match="FAILED"):
        await store.request_cancel("default", "ft-2")


async def test_a_job_asked_to_stop_is_still_claimed_so_that_somebody_stops_it(store: SqlStore) -> None:
    await store.create_job("default", "ft-1", SPEC, None)
    await store.request_cancel("default", "ft-1")
    (job,) = await store.claim_jobs("me", LEASE, 1)
    assert job.cancel_requested


async def test_a_paused_job_is_claimed_by_nobody(store: SqlStore) -> None:
    job = await _claimed(store)
    await store.transition(job, "me", JobState.PAUSED, message="x")
    await store.release_leases("me")
    assert await store.claim_jobs("other", LEASE, 1) == ()


async def test_numbers_that_are_none_are_refused_alike_on_both_databases(store: SqlStore) -> None:
    job = await _claimed(store)
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(InvalidArgument, match="finite"):
            await store.record(job, "me", metrics={"loss": wrong})
    assert (await store.get_job("default", "ft-1")).metrics == {}


async def test_events_and_checkpoints_are_told_to_their_own_project_only(store: SqlStore) -> None:
    await _claimed(store)
    with pytest.raises(NotFound):
        await store.list_events("other", "ft-1", 0, 10)
    with pytest.raises(NotFound):
        await store.list_checkpoints("other", "ft-1")
