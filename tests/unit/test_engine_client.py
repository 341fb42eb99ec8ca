"""Domain errors survive the wire, and every failure of the engine's transport is told as a domain error."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2

from graft.domain.errors import (
    KINDS,
    FailedPrecondition,
    FieldViolation,
    GraftError,
    Internal,
    InvalidArgument,
    Unavailable,
)
from graft.internal import engine_client
from graft.internal.engine_client import EngineClient
from graft.internal.status import from_status, to_status
from graft.internal.v1 import engine_pb2, engine_pb2_grpc


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.__name__)
def test_every_kind_of_error_survives_a_round_trip(kind: type[GraftError]) -> None:
    error = kind(
        "Line 3 is wrong.",
        reason="BAD_DATASET",
        metadata={"bad_lines": "1"},
        violations=(FieldViolation("line 3: messages[0].role", "is not a role"),),
        retry_after_seconds=0.25,
    )
    again = from_status(status_pb2.Status.FromString(to_status(error).SerializeToString()))
    assert type(again) is kind
    assert vars(again) == vars(error)


def test_an_error_without_violations_or_hint_carries_only_its_reason() -> None:
    status = to_status(InvalidArgument("No.", reason="NO"))
    assert len(status.details) == 1
    again = from_status(status)
    assert (again.violations, again.retry_after_seconds, again.metadata) == ((), None, {})


@pytest.mark.parametrize("code", [2, 99])
def test_a_status_of_an_unknown_kind_is_internal(code: int) -> None:
    assert type(from_status(status_pb2.Status(code=code, message="?"))) is Internal


class _Engine(engine_pb2_grpc.EngineServicer):
    """Answers with `error` inside a response, or aborts the call with `code`."""

    error: GraftError | None = None
    code: grpc.StatusCode | None = None
    held: asyncio.Event | None = None
    """A stream waits for it after its first piece."""
    pulses = 0
    metadata: tuple[tuple[str, str], ...] = ()
    loaded = engine_pb2.LoadRequest()
    base_model = ""

    async def _abort(self, context: Any) -> None:
        self.metadata = tuple(context.invocation_metadata())
        if self.code is not None:
            await context.abort(self.code, "ray::ServeReplica at 10.0.0.1, traceback …")

    async def Load(self, request: engine_pb2.LoadRequest, context: Any) -> engine_pb2.LoadResponse:
        self.loaded = request
        await self._abort(context)
        return engine_pb2.LoadResponse(error=None if self.error is None else to_status(self.error))

    async def Residency(self, _request: engine_pb2.ResidencyRequest, context: Any) -> engine_pb2.ResidencyResponse:
        await self._abort(context)
        return engine_pb2.ResidencyResponse(replicas=[engine_pb2.Replica(base_model=self.base_model)])

    async def Stream(
        self, _request: engine_pb2.StreamRequest, context: Any
    ) -> AsyncIterator[engine_pb2.StreamResponse]:
        if self.held is not None or self.code is None:  # else gRPC may tell the end before the piece
            yield engine_pb2.StreamResponse(data=b"{}", http_status=200)
        if self.held is not None:
            await self.held.wait()
        await self._abort(context)
        if self.error is not None:
            yield engine_pb2.StreamResponse(error=to_status(self.error))


@pytest.fixture
async def engine() -> AsyncIterator[tuple[_Engine, EngineClient]]:
    servicer = _Engine()
    server = grpc.aio.server()

    async def pulse(_request: bytes, _context: Any) -> bytes:
        servicer.pulses += 1
        return b""

    pulses = {"Check": grpc.unary_unary_rpc_method_handler(pulse)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.health.v1.Health", pulses),))
    engine_pb2_grpc.add_EngineServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = EngineClient(f"127.0.0.1:{port}")
    yield servicer, client
    await client.close()
    await server.stop(None)


async def test_every_call_names_the_serve_application(engine: tuple[_Engine, EngineClient]) -> None:
    servicer, client = engine
    await client.load(engine_pb2.AdapterRef(digest="sha256:0"))
    assert ("application", "graft-engine") in servicer.metadata


async def test_a_client_of_another_base_model_names_its_application_and_takes_no_other_for_it(
    engine: tuple[_Engine, EngineClient],
) -> None:
    servicer, connected = engine
    client = EngineClient(connected.address, "first")
    other = client.of("other")
    await other.load(engine_pb2.AdapterRef(digest="sha256:0"))
    assert ("application", "graft-engine-other") in servicer.metadata
    assert servicer.loaded.base_model == "other"
    await client.of("first").load(engine_pb2.AdapterRef(digest="sha256:0"))
    assert ("application", "graft-engine") in servicer.metadata
    servicer.base_model = "first"  # Ray Serve's proxy asks the only application that there is
    assert [replica.base_model for replica in (await client.residency()).replicas] == ["first"]
    with pytest.raises(Unavailable):
        await other.residency()
    await other.close()


async def test_an_error_in_a_response_is_raised_as_the_domain_error(engine: tuple[_Engine, EngineClient]) -> None:
    servicer, client = engine
    servicer.error = FailedPrecondition("adapter_model.safetensors is truncated.", reason="ADAPTER_INVALID")
    with pytest.raises(FailedPrecondition, match="truncated"):
        await client.load(engine_pb2.AdapterRef())
    with pytest.raises(FailedPrecondition, match="truncated"):
        _ = [piece async for piece in client.stream(engine_pb2.StreamRequest())]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, "ENGINE_STARTING"),
        (grpc.StatusCode.NOT_FOUND, "ENGINE_STARTING"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "ENGINE_TIMEOUT"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "ENGINE_LIMIT"),
        (grpc.StatusCode.INTERNAL, "ENGINE_LOST"),
        (grpc.StatusCode.PERMISSION_DENIED, "ENGINE_FAILED"),
    ],
)
async def test_a_transport_failure_is_a_domain_error_without_the_servers_text(
    engine: tuple[_Engine, EngineClient], code: grpc.StatusCode, reason: str
) -> None:
    servicer, client = engine
    servicer.code = code
    with pytest.raises(GraftError) as caught:
        await client.residency()
    assert caught.value.reason == reason
    assert "10.0.0.1" not in caught.value.message
    with pytest.raises(GraftError) as caught:
        _ = [piece async for piece in client.stream(engine_pb2.StreamRequest())]
    assert caught.value.reason == reason


async def test_a_service_that_is_gone_after_the_first_piece_is_lost_and_not_about_to_start(
    engine: tuple[_Engine, EngineClient],
) -> None:
    servicer, client = engine
    servicer.held = asyncio.Event()
    servicer.code = grpc.StatusCode.UNAVAILABLE
    pieces = client.stream(engine_pb2.StreamRequest())
    assert (await anext(pieces)).data == b"{}"
    servicer.held.set()
    with pytest.raises(Unavailable) as caught:
        await anext(pieces)
    assert (caught.value.reason, caught.value.retry_after_seconds) == ("ENGINE_LOST", 2.0)


async def test_a_call_that_waits_sends_a_pulse_and_a_client_without_calls_none(
    engine: tuple[_Engine, EngineClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    servicer, client = engine
    monkeypatch.setattr(engine_client, "PULSE_SECONDS", 0.01)
    servicer.held = asyncio.Event()
    pieces = client.stream(engine_pb2.StreamRequest())
    await anext(pieces)
    before = servicer.pulses
    while servicer.pulses < before + 3:  # noqa: ASYNC110 - the server counts
        await asyncio.sleep(0.01)
    servicer.held.set()
    with pytest.raises(StopAsyncIteration):
        await anext(pieces)
    last = servicer.pulses
    await asyncio.sleep(0.2)
    assert servicer.pulses <= last + 1  # one may have been on its way


async def test_the_pulse_may_be_a_method_that_the_server_does_not_have(
    engine: tuple[_Engine, EngineClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    servicer, client = engine
    monkeypatch.setattr(engine_client, "PULSE_SECONDS", 0.01)
    monkeypatch.setattr(engine_client, "PULSE", "/graft.internal.v1.Engine/Nothing")
    servicer.held = asyncio.Event()
    pieces = client.stream(engine_pb2.StreamRequest())
    await anext(pieces)
    await asyncio.sleep(0.1)
    servicer.held.set()
    assert [piece async for piece in pieces] == []


async def test_nobody_listening_is_unavailable_with_a_retry_hint() -> None:
    client = EngineClient("127.0.0.1:1")
    with pytest.raises(Unavailable) as caught:
        await client.residency(timeout_seconds=5)
    assert (caught.value.reason, caught.value.retry_after_seconds) == ("ENGINE_STARTING", 2.0)
    await client.close()
