"""Domain errors as `google.rpc.Status` with AIP-193 details, and back.

Owns the mapping between the two; does not know gRPC calls. The engine puts such a status in a response, both edges put
it on the wire, and `from_status(to_status(error))` equals `error`.
"""

from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from graft.domain.errors import KINDS, FieldViolation, GraftError, Internal

DOMAIN = "graft"
"""ErrorInfo's domain: who owns the reasons."""


def to_status(error: GraftError) -> status_pb2.Status:
    """Code, message, ErrorInfo, and BadRequest and RetryInfo where the error has violations or a retry hint."""
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code), message=error.message)
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata),
    )
    if error.violations:
        bad_request = error_details_pb2.BadRequest()
        for violation in error.violations:
            bad_request.field_violations.add(field=violation.field, description=violation.description)
        status.details.add().Pack(bad_request)
    if error.retry_after_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_after_seconds * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def from_status(status: status_pb2.Status) -> GraftError:
    """The domain error that a status tells. A code without a kind of its own becomes Internal; details are optional."""
    reason = "INTERNAL"
    metadata: dict[str, str] = {}
    violations: list[FieldViolation] = []
    retry_after_seconds: float | None = None
    info, bad_request, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    for detail in status.details:
        if detail.Unpack(info):
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad_request):
            violations = [FieldViolation(fault.field, fault.description) for fault in bad_request.field_violations]
        elif detail.Unpack(retry):
            retry_after_seconds = retry.retry_delay.ToNanoseconds() / 1e9
    name = code_pb2.Code.Name(status.code) if status.code in code_pb2.Code.values() else ""
    kind = KINDS.get(name, Internal)
    return kind(
        status.message,
        reason=reason,
        metadata=metadata,
        violations=tuple(violations),
        retry_after_seconds=retry_after_seconds,
    )
