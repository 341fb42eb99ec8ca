"""OpenAI bodies to and from the engine. The bodies themselves are checked by vLLM's own handlers in the replica."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

from graft.domain.errors import (
    FailedPrecondition,
    FieldViolation,
    GraftError,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from graft.gateway.requests import current_request_id
from graft.gateway.resolving import Resolution
from graft.internal.engine_client import EngineClient
from graft.internal.v1 import engine_pb2

GENERATE_TIMEOUT_SECONDS = 600.0
"""The `openai` client's own default: a longer answer would find nobody waiting."""

_KINDS: dict[int, type[GraftError]] = {
    400: InvalidArgument,
    404: NotFound,
    409: FailedPrecondition,
    413: ResourceExhausted,
    422: InvalidArgument,
    429: ResourceExhausted,
    503: Unavailable,
}


@dataclass(frozen=True)
class Answer:
    """OpenAI's answer, or OpenAI's error object, with the HTTP status that goes with it."""

    http_status: int
    body: bytes


def model_of(body: dict[str, object]) -> str:
    """The body's `model`; raises InvalidArgument without one."""
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidArgument(
            "model: name a base model or an adapter, for example 'smollm2-135m' or 'smollm2-135m:reviews'.",
            reason="MODEL_REQUIRED",
            violations=(FieldViolation("model", "is required"),),
        )
    return model


def refusal(http_status: int, body: bytes) -> GraftError:
    """OpenAI's error object as a domain error, for callers that do not speak HTTP."""
    try:
        told = json.loads(body)
    except ValueError:
        told = {}
    error = told.get("error", told) if isinstance(told, dict) else {}
    error = error if isinstance(error, dict) else {"message": str(error)}
    message = str(error.get("message") or f"The engine answered with status {http_status}.")
    kind = _KINDS.get(http_status, InvalidArgument if 400 <= http_status < 500 else Internal)
    param = error.get("param")
    return kind(
        message,
        reason="ENGINE_REFUSED",
        metadata={"http_status": str(http_status)},
        violations=(FieldViolation(str(param), message),) if param else (),
        retry_after_seconds=2.0 if kind is Unavailable else None,
    )


def _request(
    resolution: Resolution, endpoint: engine_pb2.Endpoint.ValueType, body: object
) -> engine_pb2.GenerateRequest:
    return engine_pb2.GenerateRequest(
        endpoint=endpoint,
        body=json.dumps(body, ensure_ascii=False).encode(),
        adapter=resolution.adapter,
        public_model=resolution.public_model,
        request_id=current_request_id(),
    )


async def generate(
    engine: EngineClient, resolution: Resolution, endpoint: engine_pb2.Endpoint.ValueType, body: dict[str, object]
) -> Answer:
    """One answer. OpenAI's own errors come back as an Answer; the engine's failures are raised."""
    response = await engine.generate(_request(resolution, endpoint, body), timeout_seconds=GENERATE_TIMEOUT_SECONDS)
    return Answer(response.http_status or 200, response.body)


async def stream(
    engine: EngineClient, resolution: Resolution, endpoint: engine_pb2.Endpoint.ValueType, body: dict[str, object]
) -> AsyncGenerator[bytes, None]:
    """Payloads of `data:` lines, without `[DONE]`. An error object of OpenAI is raised as a domain error."""
    request = engine_pb2.StreamRequest(request=_request(resolution, endpoint, {**body, "stream": True}))
    pieces = cast("AsyncGenerator[engine_pb2.StreamResponse, None]", engine.stream(request))
    async with aclosing(pieces):  # a caller that stops early frees the engine now, not at some garbage collection
        async for piece in pieces:
            if piece.http_status not in (0, 200):
                raise refusal(piece.http_status, piece.data)
            yield piece.data
