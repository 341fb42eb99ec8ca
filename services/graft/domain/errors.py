"""The errors that cross Graft's parts, each with a stable reason and what to do next.

Owns the kinds; does not know gRPC or HTTP: each edge maps a kind to its own status in one place
(`graft.gateway.errors`, `graft.internal.status`). Every class is picklable, since Ray carries them between processes.

How to add one: subclass `GraftError`, set `code` to the name of a google.rpc.Code, and give it a row in the edge's
table if its code is new. `reason` is UPPER_SNAKE_CASE (AIP-193) and never changes once released.
"""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class FieldViolation:
    """One field at fault. `field` is a dotted path, or `line 12: messages[0].role` inside a file."""

    field: str
    description: str


class GraftError(Exception):
    """Base of all. `message` is a sentence for people that names the fault and the fix."""

    code: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str = "INTERNAL",
        metadata: dict[str, str] | None = None,
        violations: tuple[FieldViolation, ...] = (),
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.metadata = metadata or {}
        self.violations = violations
        self.retry_after_seconds = retry_after_seconds

    def __reduce__(self) -> tuple[object, ...]:
        return (
            _rebuild,
            (type(self), self.message, self.reason, self.metadata, self.violations, self.retry_after_seconds),
        )


def _rebuild(
    kind: type[GraftError],
    message: str,
    reason: str,
    metadata: dict[str, str],
    violations: tuple[FieldViolation, ...],
    retry_after_seconds: float | None,
) -> GraftError:
    return kind(
        message, reason=reason, metadata=metadata, violations=violations, retry_after_seconds=retry_after_seconds
    )


class InvalidArgument(GraftError):
    """The request is wrong whatever the state of the system."""

    code = "INVALID_ARGUMENT"


class NotFound(GraftError):
    """What the request names does not exist. The message says what does."""

    code = "NOT_FOUND"


class AlreadyExists(GraftError):
    """A resource with that name exists, and differs."""

    code = "ALREADY_EXISTS"


class FailedPrecondition(GraftError):
    """The system is not in a state in which the request can be met."""

    code = "FAILED_PRECONDITION"


class ResourceExhausted(GraftError):
    """A limit was passed: size, rate, disk."""

    code = "RESOURCE_EXHAUSTED"


class Unauthenticated(GraftError):
    """No valid API key."""

    code = "UNAUTHENTICATED"


class PermissionDenied(GraftError):
    """The key may not do this."""

    code = "PERMISSION_DENIED"


class Unavailable(GraftError):
    """Try again after `retry_after_seconds`."""

    code = "UNAVAILABLE"


class Aborted(GraftError):
    """Somebody else changed the row first: a lost lease or a superseded attempt."""

    code = "ABORTED"


class Internal(GraftError):
    """A defect. The message carries a request id, never a trace."""

    code = "INTERNAL"


KINDS: dict[str, type[GraftError]] = {
    kind.code: kind
    for kind in (
        InvalidArgument,
        NotFound,
        AlreadyExists,
        FailedPrecondition,
        ResourceExhausted,
        Unauthenticated,
        PermissionDenied,
        Unavailable,
        Aborted,
        Internal,
    )
}


SHOWN = 20
"""Names of what exists that a refusal tells: as many as a person reads."""


def unknown(kind: str, name: str, existing: list[str], total: int = 0) -> NotFound:
    """NOT_FOUND that names what was asked for and what exists (SHOWN at most).

    `total`: how many exist, where `existing` is only the first of them.
    """
    shown = ", ".join(existing[:SHOWN]) or "none"
    others = max(total, len(existing)) - SHOWN
    more = f" and {others} more" if others > 0 else ""
    return NotFound(
        f"{kind} {name!r} does not exist. Existing: {shown}{more}.",
        reason=f"{kind.upper().replace(' ', '_')}_NOT_FOUND",
        metadata={"name": name, "existing": shown},
    )
