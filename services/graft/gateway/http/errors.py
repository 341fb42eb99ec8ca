"""Domain errors as OpenAI's error object with its HTTP status. The one place that knows the mapping."""

import json
import math

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from graft.domain.errors import GraftError

STATUSES = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "FAILED_PRECONDITION": 409,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "UNAVAILABLE": 503,
    "INTERNAL": 500,
}
_STATUSES_BY_REASON = {
    "BODY_TOO_LARGE": 413,
    "UPLOAD_TOO_LARGE": 413,
    "ENGINE_REQUEST_TOO_LARGE": 413,
    "DISK_FULL": 507,
}
"""Limits that trying again does not lift, unlike a rate."""

_TYPES = {403: "permission_error", 429: "rate_limit_error", 503: "service_unavailable_error"}
_CODES_BY_REASON = {"API_KEY_MISSING": "invalid_api_key", "API_KEY_UNKNOWN": "invalid_api_key"}
"""OpenAI's own codes where it has one; elsewhere the reason in lower case."""

_PERMANENT = frozenset({"FAILED_PRECONDITION", "ALREADY_EXISTS"})


def status_of(error: GraftError) -> int:
    """The HTTP status. What the engine's own OpenAI handler refused keeps the status that it chose."""
    if error.reason == "ENGINE_REFUSED":
        return int(error.metadata.get("http_status", STATUSES[error.code]))
    return _STATUSES_BY_REASON.get(error.reason, STATUSES[error.code])


def error_object(error: GraftError) -> dict[str, object]:
    """`{"error": {"message", "type", "param", "code"}}`."""
    status = status_of(error)
    return {
        "error": {
            "message": error.message,
            "type": _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
            "param": error.violations[0].field if error.violations else None,
            "code": _CODES_BY_REASON.get(error.reason, error.reason.lower()),
        }
    }


def error_response(error: GraftError) -> Response:
    """The error as a response, with `Retry-After` in whole seconds where the error says when to try again."""
    headers: dict[str, str] = {}
    if error.retry_after_seconds is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_seconds)))
    if error.code in _PERMANENT or error.reason in _STATUSES_BY_REASON:
        # The `openai` client repeats every 409 and 5xx unless told that it is in vain.
        headers["x-should-retry"] = "false"
    status = status_of(error)
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_object(error), status, headers)


def error_event(error: GraftError) -> bytes:
    """The error as a server-sent event, for a stream whose headers are already gone."""
    return b"data: " + json.dumps(error_object(error), ensure_ascii=False).encode() + b"\n\n"


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals, an unknown path or method, as OpenAI's error object."""
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        message, code = f"{asked} does not exist here. The API's paths start with /v1.", "unknown_url"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message, code = f"{asked} is not allowed; this path takes {allowed}.", "method_not_allowed"
    else:
        message, code = str(error.detail), "bad_request"
    told = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    return JSONResponse(told, error.status_code, error.headers)
