"""Who may ask an engine: those whose calls bring a token of its file, where it has one.

Owns how the others are refused, by a status of the call itself. Ray Serve hands a call's metadata to methods that take
`grpc_context`; an exception would leave the replica with a trace and without the status' details, so none is raised.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Protocol

from google.rpc import status_pb2
from grpc_status import rpc_status
from ray.serve.grpc_util import RayServegRPCContext

from graft.domain.errors import Unauthenticated
from graft.internal import token
from graft.internal.status import to_status
from graft.internal.v1 import engine_pb2


class Guarded(Protocol):
    """What has methods that are guarded."""

    tokens: token.TakenTokens


def refusal(tokens: token.TakenTokens, context: RayServegRPCContext) -> status_pb2.Status | None:
    """None when the call may be answered; else what it was refused with, which is the call's status by then."""
    taken = tokens.now()
    if not taken:
        return None
    try:
        token.check(taken, context.invocation_metadata())
    except Unauthenticated as error:
        refused = to_status(error)
        status = rpc_status.to_status(refused)
        context.set_code(status.code)
        context.set_details(status.details)
        context.set_trailing_metadata(list(status.trailing_metadata))
        return refused
    return None


def guarded(method: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any, RayServegRPCContext], Awaitable[Any]]:
    """A method of one answer as Ray Serve calls it, for those who may ask."""

    async def call(self: Guarded, request: Any, grpc_context: RayServegRPCContext) -> Any:
        # gRPC sends no message with a status that is not OK; Serve wants one all the same.
        refused = refusal(self.tokens, grpc_context)
        return refused if refused is not None else await method(self, request)

    call.__name__, call.__doc__ = method.__name__, method.__doc__
    return call


def guarded_stream(
    method: Callable[[Any, Any], AsyncGenerator[Any, None]],
) -> Callable[[Any, Any, RayServegRPCContext], AsyncGenerator[Any, None]]:
    """The same of a method that answers piece by piece."""

    async def call(self: Guarded, request: Any, grpc_context: RayServegRPCContext) -> AsyncGenerator[Any, None]:
        if (refused := refusal(self.tokens, grpc_context)) is not None:
            # Serve takes the status over with a piece.
            yield engine_pb2.StreamResponse(error=refused)
            return
        async with aclosing(method(self, request)) as pieces:
            async for piece in pieces:
                yield piece

    call.__name__, call.__doc__ = method.__name__, method.__doc__
    return call
