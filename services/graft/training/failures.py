"""What a run that failed says: code, reason and one actionable sentence, from whatever was raised.

Ray's own layers of errors are taken off. Does not import Ray: only the names of its error types matter here.
"""

import errno
from typing import Any

from graft.domain.errors import GraftError, Unavailable

KILLED = frozenset({"ActorDiedError", "ActorUnavailableError", "RayActorError", "WorkerCrashedError", "NodeDiedError"})
WORKER_DIED = "WORKER_DIED"
"""Reason of a failure that the next attempt may not have."""
CUT_OFF = frozenset({"DistBackendError", "DistNetworkError"})
"""What torch raises when NCCL or a store cannot reach a companion; of gloo it passes a RuntimeError on, which names the
file."""
OUT_OF_MEMORY = frozenset({"OutOfMemoryError", "MemoryError"})


def failure(error: BaseException, log: str) -> dict[str, Any]:
    """Data of a `failed` report. `log` names the file that holds the trace."""
    root = root_cause(error)
    if isinstance(root, GraftError):
        return {"code": root.code, "reason": root.reason, "message": root.message}
    name = type(root).__name__
    if name in OUT_OF_MEMORY or "not enough memory" in str(root):
        return {
            "code": "RESOURCE_EXHAUSTED",
            "reason": "OUT_OF_MEMORY",
            "message": "A training worker ran out of memory. Lower context_tokens (the longest row decides), or give "
            f"the node more. {log} has the details.",
        }
    # A base that is spread over the workers loses its companions in the middle of a pass through the model.
    if name in KILLED or name in CUT_OFF or "gloo/transport" in str(root):
        lost = lost_worker(log)
        return {"code": lost.code, "reason": lost.reason, "message": lost.message}
    # safetensors has an error of its own for it, which is no OSError.
    if (isinstance(root, OSError) and root.errno == errno.ENOSPC) or "No space left on device" in str(root):
        filename = getattr(root, "filename", None)
        return {
            "code": "RESOURCE_EXHAUSTED",
            "reason": "DISK_FULL",
            "message": "The disk is full"
            + (f" at {filename}" if filename else "")
            + ". Free some space, then create the job again.",
        }
    lines = str(root).strip().splitlines()
    if name == "InsufficientClusterResourcesError":
        return {
            "code": "FAILED_PRECONDITION",
            "reason": "DOES_NOT_FIT",
            "message": f"Ray's autoscaler may not add what the workers ask for: {' '.join(lines[1:2])} Ask for fewer "
            "workers (num_workers), or let the cluster grow further.",
        }
    return {
        "code": "INTERNAL",
        "reason": "TRAINING_FAILED",
        "message": f"Training failed with {name}: {lines[0] if lines else 'no message'} ({log} has the trace.)",
    }


def lost_worker(log: str) -> Unavailable:
    """What a run says that has lost one of its workers."""
    return Unavailable(
        "A training worker was ended from outside: its node left, or the system killed it, most often for memory. Look "
        f"for it in the node's kernel log. {log} has the details.",
        reason=WORKER_DIED,
    )


def root_cause(error: BaseException) -> BaseException:
    """The error below Ray's, which keep theirs in attributes of different names. Our own errors are roots."""
    seen: set[int] = set()
    while not isinstance(error, GraftError) and id(error) not in seen:
        seen.add(id(error))
        inner = next((found for found in _below(error) if isinstance(found, BaseException)), None)
        if inner is None:
            return error
        error = inner
    return error


def _says_little(error: BaseException) -> bool:
    return not isinstance(error, GraftError) or error.reason == WORKER_DIED


def _below(error: BaseException) -> list[Any]:
    failures = getattr(error, "worker_failures", None)
    workers = list(failures.values()) if isinstance(failures, dict) else []
    # The worker with something to say first: its companions only tell that it has left them.
    workers.sort(key=lambda found: _says_little(root_cause(found)))
    names = ("_base_exc", "controller_failure", "health_check_failure", "cause", "__cause__")
    return [*workers, *(getattr(error, name, None) for name in names)]
