"""Who asks, and under which id: set once at each edge, read wherever a request is logged or passed on.

Knows neither gRPC nor HTTP.
"""

import secrets
from contextvars import ContextVar

import structlog

_request_id: ContextVar[str] = ContextVar("graft_request_id", default="")


def begin_request(**logged: str) -> str:
    """Gives the current task a new request id, bound to every log line of it beside `logged`. Returns the id."""
    request_id = f"req-{secrets.token_hex(8)}"
    _request_id.set(request_id)
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(request_id=request_id, **logged)
    return request_id


def current_request_id() -> str:
    """The id of the request that this task answers; empty outside of one."""
    return _request_id.get()
