"""What surrounds every request: its id, authentication, error mapping, metrics and one log line.

Plain ASGI, so that streams pass through it piece by piece and in the request's own task. Knows no route.
"""

import time
from typing import Any

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from graft.gateway import auth
from graft.gateway.auth import Authenticator
from graft.gateway.errors import known
from graft.gateway.http.errors import error_response
from graft.gateway.metrics import REQUEST_SECONDS, REQUESTS
from graft.gateway.requests import begin_request

_log = structlog.get_logger("graft.gateway")

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})
"""Probes and scrapers hold no key; these paths tell nothing of any project."""

CLIENT_GONE = 499
"""nginx's status for a client that left before its answer; only metrics and the log ever see it."""


class Edge:
    """ASGI middleware around the router."""

    def __init__(self, app: ASGIApp, authenticator: Authenticator) -> None:
        self._app = app
        self._authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; never raises for an HTTP request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = begin_request(method=scope["method"], path=scope["path"])
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            if scope["path"] not in OPEN_PATHS:
                self._authenticator.check_local(_header(scope, b"host"), _header(scope, b"origin"))
                auth.begin(await self._authenticator.authenticate(_header(scope, b"authorization")))
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = status or CLIENT_GONE
        except Exception as error:  # noqa: BLE001 - the edge: everything becomes an error object
            told = known(error)
            if status == 0:
                await error_response(told)(scope, receive, send_with_id)
            # Otherwise the answer has begun: uvicorn closes the connection, so that it cannot look complete.
        finally:
            seconds = time.perf_counter() - started
            route = _route(scope)
            REQUESTS.labels("http", route, str(status or CLIENT_GONE)).inc()
            REQUEST_SECONDS.labels("http", route).observe(seconds)
            _log.debug("request", route=route, status=status, seconds=round(seconds, 4))


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def _route(scope: Scope) -> str:
    """`POST /v1/files`, as the route was written: a path with ids in it would make a time series of each."""
    route: Any = scope.get("route")
    return f"{scope['method']} {route.path}" if route is not None else "unmatched"
