"""Domain errors as gRPC statuses with rich details (AIP-193), and unknown exceptions as INTERNAL without a trace.

The HTTP edge uses `known` too, so that both protocols tell a defect in the same words.
"""

from dataclasses import replace
from typing import Any, NoReturn

import grpc
import structlog
from grpc_status import rpc_status

from graft.domain.errors import GraftError, Internal
from graft.gateway.requests import current_request_id
from graft.internal.status import to_status

MAX_VIOLATIONS = 20
MAX_TEXT_CHARACTERS = 1000
MAX_FIELD_CHARACTERS = 160
"""Details travel in gRPC's trailing metadata, of which clients accept 8 KiB by default: 20 violations of 160 characters
twice would pass it, so names and descriptions share the allowance below."""

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
    return type(error)(
        _clip(error.message, MAX_TEXT_CHARACTERS),
        reason=error.reason,
        metadata={_clip(key, 64): _clip(value, MAX_FIELD_CHARACTERS) for key, value in error.metadata.items()},
        violations=tuple(
            replace(
                violation,
                field=_clip(violation.field, MAX_FIELD_CHARACTERS // 2),
                description=_clip(violation.description, MAX_FIELD_CHARACTERS),
            )
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
