"""One gRPC interceptor around every call: request id, authentication, error mapping, a log line and metrics.

Knows no service.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import structlog

from graft.domain.errors import GraftError
from graft.gateway import auth
from graft.gateway.auth import Authenticator
from graft.gateway.errors import abort
from graft.gateway.metrics import REQUEST_SECONDS, REQUESTS
from graft.gateway.requests import begin_request

_log = structlog.get_logger("graft.gateway")

_OPEN = "/grpc.health."
"""Health checks come from probes that hold no key, and tell nothing but that the process answers."""


class Interceptor(grpc.aio.ServerInterceptor):
    """Wraps the behaviour of every method."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        """Returns the method's handler with its behaviour wrapped."""
        handler = await continuation(details)
        method = details.method
        if handler is None or method.startswith(_OPEN):
            return handler
        header = next((str(value) for key, value in details.invocation_metadata or () if key == "authorization"), None)
        make = _FACTORIES[(handler.request_streaming, handler.response_streaming)]
        inner = getattr(handler, make.__name__.removesuffix("_rpc_method_handler"))
        wrap = self._streamed if handler.response_streaming else self._single
        return make(
            wrap(inner, method, header),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _single(self, inner: Callable[..., Awaitable[Any]], method: str, header: str | None) -> Any:
        async def answer(request: Any, context: Any) -> Any:
            call = _Call(method)
            try:
                auth.begin(await self._authenticator.authenticate(header))
                answered = await inner(request, context)
                call.succeed()
            except Exception as error:  # noqa: BLE001 - the edge: everything becomes a status
                call.fail(error)
                await abort(context, error)
            finally:
                call.end()
            return answered

        return answer

    def _streamed(self, inner: Callable[..., AsyncIterator[Any]], method: str, header: str | None) -> Any:
        async def answer(request: Any, context: Any) -> AsyncIterator[Any]:
            call = _Call(method)
            try:
                auth.begin(await self._authenticator.authenticate(header))
                async for piece in inner(request, context):
                    yield piece
                call.succeed()
            except Exception as error:  # noqa: BLE001 - as above
                call.fail(error)
                await abort(context, error)
            finally:
                call.end()

        return answer


_FACTORIES: dict[tuple[bool, bool], Any] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


class _Call:
    """One call's clock and outcome. A call that neither failed nor ended here was cancelled by its client."""

    def __init__(self, method: str) -> None:
        begin_request(method=method)
        self._method = method
        self._code = "CANCELLED"
        self._started = time.perf_counter()

    def succeed(self) -> None:
        self._code = "OK"

    def fail(self, error: Exception) -> None:
        self._code = error.code if isinstance(error, GraftError) else "INTERNAL"

    def end(self) -> None:
        seconds = time.perf_counter() - self._started
        REQUESTS.labels("grpc", self._method, self._code).inc()
        REQUEST_SECONDS.labels("grpc", self._method).observe(seconds)
        _log.debug("call", code=self._code, seconds=round(seconds, 4))
