"""gRPC failures as Graft's domain errors."""

import grpc
from grpc_status import rpc_status

from graft.domain.errors import KINDS, GraftError, Internal, Unavailable
from graft.internal.status import from_status


def from_rpc_error(error: grpc.RpcError, target: str) -> GraftError:
    """The domain error that a failed call tells. `target` is named when nobody answers there."""
    code = error.code()
    details = error.details() or ""
    status = rpc_status.from_call(error)
    if status is not None:
        return from_status(status)
    if code is grpc.StatusCode.UNAVAILABLE:
        return Unavailable(
            f"No Graft gateway answers at {target}. Start one with `graft up`, or set GRAFT_ADDRESS.",
            reason="GATEWAY_UNREACHABLE",
            metadata={"details": details},
            retry_after_seconds=1.0,
        )
    kind = KINDS.get(code.name, Internal)
    return kind(details or code.name, reason=code.name)
