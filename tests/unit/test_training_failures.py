import errno
from typing import Any

import pytest

from graft.domain.errors import InvalidArgument
from graft.training.failures import failure, lost_worker

LOG = "runs/ft-1/1/error.log"


class UserExceptionWithTraceback(Exception):
    """As Ray Train wraps what a worker raised."""

    def __init__(self, inner: BaseException) -> None:
        super().__init__("Traceback (most recent call last): …")
        self._base_exc = inner


class WorkerGroupError(Exception):
    """As Ray Train's, one failure a rank."""

    def __init__(self, worker_failures: dict[int, Any]) -> None:
        super().__init__("Training failed due to worker errors:\n" + "…")
        self.worker_failures = worker_failures


class WorkerHealthCheckFailedError(Exception):
    """As Ray Train's when a worker's process is gone."""

    def __init__(self, inner: BaseException) -> None:
        super().__init__("A worker health check failed.")
        self.health_check_failure = inner


class ActorDiedError(Exception):
    """As Ray's."""


class DistBackendError(RuntimeError):
    """As torch's."""


LEFT_BY_A_COMPANION = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:16609. "
    "This is typically caused by a remote worker crashing."
)
"""What a worker's pass through a spread model raises when another worker has been killed."""


def test_what_a_worker_found_wrong_is_told_and_not_that_its_companion_lost_it() -> None:
    lost = UserExceptionWithTraceback(RuntimeError("Connection closed by peer [127.0.0.1]"))
    cause = UserExceptionWithTraceback(InvalidArgument("None of the rows fits.", reason="NO_EXAMPLES"))
    assert failure(WorkerGroupError({0: lost, 1: cause}), LOG) == {
        "code": "INVALID_ARGUMENT",
        "reason": "NO_EXAMPLES",
        "message": "None of the rows fits.",
    }


def test_a_worker_that_only_lost_its_companion_does_not_hide_what_that_one_found_wrong() -> None:
    lost = UserExceptionWithTraceback(lost_worker(LOG))
    cause = UserExceptionWithTraceback(InvalidArgument("None of the rows fits.", reason="NO_EXAMPLES"))
    assert failure(WorkerGroupError({0: lost, 1: cause}), LOG)["reason"] == "NO_EXAMPLES"
    alone = failure(WorkerGroupError({0: lost}), LOG)
    assert (alone["code"], alone["reason"]) == ("UNAVAILABLE", "WORKER_DIED")


@pytest.mark.parametrize(
    ("error", "reason", "words"),
    [
        (WorkerGroupError({0: WorkerHealthCheckFailedError(ActorDiedError())}), "WORKER_DIED", "memory"),
        (RuntimeError(LEFT_BY_A_COMPANION), "WORKER_DIED", "ended from outside"),
        (DistBackendError("NCCL communicator was aborted on rank 0."), "WORKER_DIED", "ended from outside"),
        (MemoryError(), "OUT_OF_MEMORY", "context_tokens"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), "OUT_OF_MEMORY", "context_tokens"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/adapter"), "DISK_FULL", "Free some space"),
        (KeyError("x"), "TRAINING_FAILED", LOG),
    ],
)
def test_a_failure_says_what_to_do_next(error: BaseException, reason: str, words: str) -> None:
    told = failure(error, LOG)
    assert told["reason"] == reason
    assert words in told["message"]
    assert "\n" not in told["message"]


def test_errors_that_name_each_other_as_their_cause_still_end() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert failure(first, LOG)["reason"] == "TRAINING_FAILED"


def test_an_autoscaler_that_may_not_add_what_is_asked_for_is_told_as_such() -> None:
    from ray.train.v2._internal.exceptions import InsufficientClusterResourcesError

    lines = "Insufficient cluster resources to launch training workers.\nThe worker group requires 8 GPUs.\nPlease"
    told = failure(InsufficientClusterResourcesError(lines), LOG)
    assert (told["code"], told["reason"]) == ("FAILED_PRECONDITION", "DOES_NOT_FIT")
    assert "may not add what the workers ask for: The worker group requires 8 GPUs. Ask for fewer" in told["message"]
