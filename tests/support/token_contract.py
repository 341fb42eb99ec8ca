"""What an `Engine` that asks for a token owes whoever calls it without: the same of the real one and of the fake."""

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.rpc import code_pb2, error_details_pb2
from grpc_status import rpc_status

from graft.internal.v1 import engine_pb2

SERVICE = engine_pb2.DESCRIPTOR.services_by_name["Engine"]
WRONG = "0" * 64


async def refuses_all_without(address: str, token: str) -> None:
    """Every method, asked without a token and with wrong ones, tells UNAUTHENTICATED and why, and no token."""
    attempts = {
        (): "ENGINE_TOKEN_MISSING",
        (("authorization", f"Bearer {WRONG}"),): "ENGINE_TOKEN_WRONG",
        (("authorization", token),): "ENGINE_TOKEN_WRONG",
        (("authorization", f"Bearer {token[:-1]}"),): "ENGINE_TOKEN_WRONG",
        (("x-token", f"Bearer {token}"),): "ENGINE_TOKEN_MISSING",
    }
    assert len(SERVICE.methods) > 5
    async with grpc.aio.insecure_channel(address) as channel:
        for method in SERVICE.methods:
            for brought, reason in attempts.items():
                error = await _refused(channel, method, brought)
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED, (method.name, error)
                status = rpc_status.from_call(error)  # type: ignore[arg-type]  # it has what is read of a call
                assert status is not None, method.name
                assert status.code == code_pb2.UNAUTHENTICATED
                info = error_details_pb2.ErrorInfo()
                assert status.details[0].Unpack(info)
                assert (info.reason, info.domain) == (reason, "graft"), method.name
                assert token[:-1] not in status.message
                assert WRONG not in status.message


async def _refused(
    channel: grpc.aio.Channel, method: MethodDescriptor, brought: tuple[tuple[str, str], ...]
) -> grpc.aio.AioRpcError:
    name, streams = f"/{SERVICE.full_name}/{method.name}", method.server_streaming
    metadata = (("application", "graft-engine"), *brought)
    try:
        if streams:
            _ = [piece async for piece in channel.unary_stream(name)(b"", metadata=metadata, timeout=30)]
        else:
            await channel.unary_unary(name)(b"", metadata=metadata, timeout=30)
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError(f"{method.name} answers whoever has no token")
