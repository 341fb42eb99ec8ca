import pickle
from itertools import pairwise

import pytest

from graft.domain.errors import FailedPrecondition, FieldViolation, GraftError, InvalidArgument, unknown
from graft.domain.jobs import FINAL, LIVE, TRANSITIONS, JobState, check_transition


def test_the_table_of_moves_is_the_designs() -> None:
    S = JobState
    forward = [S.VALIDATING, S.QUEUED, S.STARTING, S.RUNNING, S.REGISTERING, S.EVALUATING, S.SUCCEEDED]
    legal = set(pairwise(forward))
    legal |= {(live, end) for live in LIVE for end in (S.FAILED, S.CANCELLED, S.PAUSED)}
    legal |= {(state, S.QUEUED) for state in (S.STARTING, S.RUNNING, S.REGISTERING, S.EVALUATING, S.PAUSED)}
    legal |= {(S.PAUSED, S.CANCELLED)}
    assert {(before, after) for before, following in TRANSITIONS.items() for after in following} == legal


def test_a_final_state_is_never_left() -> None:
    for state in FINAL:
        for after in JobState:
            with pytest.raises(FailedPrecondition):
                check_transition(state, after)


def test_an_error_survives_pickling_with_its_details() -> None:
    error: GraftError = InvalidArgument(
        "bad", reason="R", metadata={"a": "b"}, violations=(FieldViolation("f", "d"),), retry_after_seconds=1.5
    )
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is InvalidArgument
    assert vars(copy) == vars(error)


def test_an_unknown_name_is_told_with_what_exists() -> None:
    error = unknown("base model", "nope", ["a", "b"])
    assert error.message == "base model 'nope' does not exist. Existing: a, b."
    assert error.reason == "BASE_MODEL_NOT_FOUND"
    assert "and 5 more" in unknown("base model", "nope", [str(n) for n in range(25)]).message
