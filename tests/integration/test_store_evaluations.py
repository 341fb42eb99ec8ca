"""The store's promises about evaluations, on SQLite and on a real PostgreSQL."""

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy.exc import IntegrityError

from graft.domain.errors import Aborted, FailedPrecondition, NotFound
from graft.domain.evaluations import (
    Confusion,
    Contestant,
    ContestantResult,
    Difference,
    EvaluationSpec,
    EvaluationState,
    Figure,
)
from graft.domain.grading import GraderSpec
from graft.domain.jobs import JobError
from graft.domain.resources import Dataset, DatasetFormat
from graft.store.sql import SqlStore

pytestmark = pytest.mark.integration
LEASE = timedelta(seconds=30)
SPEC = EvaluationSpec(
    "ds-1",
    (Contestant("base"), Contestant("base:a@1", 4)),
    metrics=("accuracy",),
    grader=GraderSpec("numeric", {"field": "answer"}),
    shots_dataset="ds-2",
)
FIGURE = Figure("accuracy", 0.5, 0.25, 0.75, 40)
RESULT = ContestantResult(
    "base:a@1, 4-shot",
    "base:a@1",
    4,
    (FIGURE,),
    (Difference("base", FIGURE),),
    0.1,
    0.2,
    30.0,
    135,
    270,
    Confusion(("no", "yes"), (1, 2, 3, 4, 5, 6)),
)


async def test_a_retried_create_returns_the_first_evaluation(store: SqlStore) -> None:
    made = await asyncio.gather(*(store.create_evaluation("default", f"ev-{n}", SPEC, "request") for n in range(4)))
    assert len({found.id for found in made}) == 1
    assert made[0].spec == SPEC
    assert made[0].state is EvaluationState.QUEUED
    assert [found.id for found in (await store.list_evaluations("default", 10, "")).items] == [made[0].id]
    with pytest.raises(NotFound, match=r"'ev-9' does not exist\. Existing: ev-"):
        await store.get_evaluation("default", "ev-9")


async def test_a_created_evaluation_is_answered_as_it_was_stored_however_quick_the_orchestrator_is(
    store: SqlStore,
) -> None:
    async def orchestrate() -> None:
        claimed = 0
        while claimed < 20:
            claimed += await store.claim_evaluation("me", LEASE) is not None

    orchestrating = asyncio.create_task(orchestrate())
    made = [await store.create_evaluation("default", f"ev-{n}", SPEC, None) for n in range(20)]
    await orchestrating
    assert {found.state for found in made} == {EvaluationState.QUEUED}


async def test_evaluations_are_counted_by_state_whatever_their_project(store: SqlStore) -> None:
    assert await store.count_evaluations() == {}
    for number, project in enumerate(("default", "team", "team")):
        await store.create_evaluation(project, f"ev-{number}", SPEC, None)
    await store.claim_evaluation("me", LEASE)
    assert await store.count_evaluations() == {EvaluationState.QUEUED: 2, EvaluationState.RUNNING: 1}


async def test_an_id_that_is_taken_is_no_repeated_request(store: SqlStore) -> None:
    for number in (1, 2):
        await store.create_evaluation("default", f"ev-{number}", SPEC, None)
    for request_id in (None, "request"):
        with pytest.raises(IntegrityError):
            await store.create_evaluation("default", "ev-1", SPEC, request_id)


async def test_one_owner_takes_the_oldest_and_ends_it_with_what_was_found(store: SqlStore) -> None:
    for number in (1, 2):
        await store.create_evaluation("default", f"ev-{number}", SPEC, None)
    owners = await asyncio.gather(*(store.claim_evaluation(f"owner-{n}", LEASE) for n in range(3)))
    assert sorted(found.id for found in owners if found) == ["ev-1", "ev-2"]
    owner = next(f"owner-{n}" for n, found in enumerate(owners) if found and found.id == "ev-1")
    first = await store.get_evaluation("default", "ev-1")
    assert first.state is EvaluationState.RUNNING
    assert first.start_time is not None
    first = await store.renew_evaluation(first, owner, LEASE, 3, 80)
    assert (first.answered_requests, first.total_requests) == (3, 80)
    ended = await store.end_evaluation(
        first, owner, EvaluationState.SUCCEEDED, results=[RESULT], verdicts=["It wins."], mlflow_run_id="run-1"
    )
    assert (ended.results, ended.verdicts, ended.mlflow_run_id) == ((RESULT,), ("It wins.",), "run-1")
    assert ended.end_time is not None
    with pytest.raises(Aborted):
        await store.renew_evaluation(ended, owner, LEASE, 4, 80)
    with pytest.raises(FailedPrecondition, match="has already ended: SUCCEEDED"):
        await store.cancel_evaluation("default", "ev-1")


async def test_an_evaluation_whose_owner_is_gone_is_taken_by_another(store: SqlStore) -> None:
    await store.create_evaluation("default", "ev-1", SPEC, None)
    mine = await store.claim_evaluation("gone", timedelta(seconds=-1))
    assert mine is not None
    assert await store.claim_evaluation("next", LEASE) is not None
    with pytest.raises(Aborted):
        await store.end_evaluation(mine, "gone", EvaluationState.FAILED, error=JobError("INTERNAL", "X", "x"))
    await store.release_evaluation(mine, "next")
    again = await store.claim_evaluation("third", LEASE)
    assert again is not None
    assert (await store.cancel_evaluation("default", "ev-1")).cancel_requested
    await store.end_evaluation(again, "third", EvaluationState.CANCELLED)
    assert (await store.cancel_evaluation("default", "ev-1")).state is EvaluationState.CANCELLED
    assert await store.claim_evaluation("third", LEASE) is None


async def test_those_to_be_cancelled_end_at_once_unless_somebody_works_on_them(store: SqlStore) -> None:
    for number in (1, 2, 3, 4):
        await store.create_evaluation("default", f"ev-{number}", SPEC, None)
    assert await store.claim_evaluation("gone", timedelta(seconds=-1)) is not None
    assert await store.end_cancelled_evaluations() == ()
    for number in (1, 2, 3):
        await store.cancel_evaluation("default", f"ev-{number}")
    mine = await store.claim_evaluation("mine", LEASE)
    assert mine is not None
    assert mine.id == "ev-1"
    assert await store.end_cancelled_evaluations() == ("ev-2", "ev-3")
    assert await store.end_cancelled_evaluations() == ()
    states = [(await store.get_evaluation("default", f"ev-{number}")).state for number in (1, 2, 3, 4)]
    ended = EvaluationState.CANCELLED
    assert states == [EvaluationState.RUNNING, ended, ended, EvaluationState.QUEUED]
    assert (await store.get_evaluation("default", "ev-3")).end_time is not None


async def test_a_data_set_of_a_live_evaluation_is_not_deleted(store: SqlStore) -> None:
    for used in ("ds-1", "ds-2"):
        await store.create_dataset(
            Dataset(used, "default", used, DatasetFormat.FIELDS, 1, 1, f"sha256:{used}", "file", await store.now()),
            None,
        )
    made = await store.create_evaluation("default", "ev-1", SPEC, None)
    await store.create_evaluation("default", "ev-2", replace(SPEC, dataset="ds-3", shots_dataset=None), None)
    for used in ("ds-1", "ds-2"):
        with pytest.raises(FailedPrecondition, match="ev-1") as refused:
            await store.delete_dataset("default", used)
        assert refused.value.metadata == {"users": "ev-1"}
    await store.cancel_evaluation("default", made.id)
    await store.end_cancelled_evaluations()
    assert (await store.delete_dataset("default", "ds-1")).id == "ds-1"
