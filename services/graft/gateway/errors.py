"""Domain errors as gRPC statuses with rich details (AIP-193), and unknown exceptions as INTERNAL without a trace.

The HTTP edge uses `known` too, so that both protocols tell a defect in the same words.
"""

from typing import Any, NoReturn
from urllib.parse import quote

import grpc
import structlog
from grpc_status import rpc_status

from graft.domain.errors import FieldViolation, GraftError, Internal
from graft.gateway.requests import current_request_id
from graft.internal.status import to_status

MAX_VIOLATIONS = 20
MAX_STATUS_BYTES = 7000
"""An error travels in trailing metadata, of which clients accept 8 KiB by default and beyond it fail at random."""
_TEXT_CHARACTERS = (160, 80, 40, 20)
"""Lengths to clip texts to, until the whole fits: what 20 violations take depends on their alphabet."""

_log = structlog.get_logger("graft.gateway")


def known(error: Exception) -> GraftError:
    """The error itself when it is Graft's; else INTERNAL with the request's id, the trace in the log only."""
    if isinstance(error, GraftError):
        return error
    request_id = current_request_id()
    _log.error("request failed unexpectedly", exc_info=error)
    return Internal(
        f"The gateway failed to answer. Its log has the reason under request id {request_id}.",
        reason="INTERNAL",
        metadata={"request_id": request_id},
    )


def clipped(error: GraftError) -> GraftError:
    """The same error, small enough for gRPC's trailing metadata: a request may name things megabytes long."""
    for most in _TEXT_CHARACTERS:
        shorter = _shortened(error, most)
        # Details are sent as base64, and the message a second time, percent-encoded.
        status_bytes = to_status(shorter).ByteSize() * 4 // 3 + len(quote(shorter.message))
        if status_bytes <= MAX_STATUS_BYTES:
            break
    return shorter


def _shortened(error: GraftError, most: int) -> GraftError:
    return type(error)(
        _clip(error.message, most * 6),
        reason=error.reason,
        metadata={_clip(key, 40): _clip(value, most) for key, value in list(error.metadata.items())[:10]},
        violations=tuple(
            FieldViolation(_clip(violation.field, most // 2), _clip(violation.description, most))
            for violation in error.violations[:MAX_VIOLATIONS]
        ),
        retry_after_seconds=error.retry_after_seconds,
    )


def _clip(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


async def abort(context: "grpc.aio.ServicerContext[Any, Any]", error: Exception) -> NoReturn:
    """Ends the call with the error's status and `grpc-status-details-bin`."""
    status = rpc_status.to_status(to_status(clipped(known(error))))
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort raises")
