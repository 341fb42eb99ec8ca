"""A client of the internal `Engine` service: what the gateway and the orchestrator talk to the replicas with.

Owns the channel and the mapping of failures to domain errors. Does not know OpenAI's bodies, Ray Serve's classes or
vLLM: to it the service is an address and the metadata key by which Serve's gRPC proxy picks the application.

    client = EngineClient(address, "smollm2-135m")   # the application that the stack starts with
    client.of("other")                               # the one that `graft models deploy other` added
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from typing import Any, Final, TypeVar

import grpc

from graft.domain.errors import GraftError, Internal, ResourceExhausted, Unavailable
from graft.domain.resources import BaseModel
from graft.internal.status import from_status
from graft.internal.v1 import engine_pb2, engine_pb2_grpc

APPLICATION: Final = "graft-engine"
"""Name of the Serve application that the service starts with, and the beginning of the names of those beside it."""
DEFAULT_MAX_MESSAGE_BYTES: Final = 32 * 1024 * 1024
"""Answers with `logprobs` over a whole context are some MiB of JSON; gRPC's own 4 MiB is too small for them."""
RETRY_SECONDS: Final = 2.0
STARTING: Final = "The inference service is starting or restarting. Try again shortly."
PULSE_SECONDS: Final = 5.0
"""A call that waits for its answer, or for the next piece of it, sends nothing by which a cut link would be noticed."""
UNHEARD_SECONDS: Final = 10.0
"""What the other machine's kernel does not acknowledge for so long ends the connection and its calls. Three packets
lost in a row take TCP 2 s; a link that stutters for longer is no link to stream by."""
CONNECT_SECONDS: Final = 5.0
"""A machine that is there accepts in milliseconds; gRPC's 20 s would be added to the time that a cut link takes."""
PULSE: Final = "/grpc.health.v1.Health/Check"
"""Answered by Serve's proxy itself, as a method that it does not have: any answer will do."""


ResponseT = TypeVar(
    "ResponseT",
    engine_pb2.GenerateResponse,
    engine_pb2.LoadResponse,
    engine_pb2.UnloadResponse,
    engine_pb2.DeployResponse,
    engine_pb2.UndeployResponse,
    engine_pb2.ListApplicationsResponse,
)
DEPLOY_TIMEOUT_SECONDS: Final = 120.0
"""Ray Serve starts a replica in seconds and ends one in 10 at most; a busy machine takes a multiple."""


def application_name(base: str, first: str) -> str:
    """Name of the Serve application that carries `base`; `first` is the base model that the service starts with."""
    return APPLICATION if base == first else f"{APPLICATION}-{base}"


def from_transport(error: grpc.aio.AioRpcError) -> GraftError:
    """What a failed call means. Serve's own text may hold traces and addresses, so it is not passed on."""
    code = error.code()
    # NOT_FOUND is Serve's proxy before the application is deployed; the engine itself never answers with it.
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED):
        return Unavailable(STARTING, reason="ENGINE_STARTING", retry_after_seconds=RETRY_SECONDS)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Unavailable(
            "The inference service did not answer in time.",
            reason="ENGINE_TIMEOUT",
            retry_after_seconds=RETRY_SECONDS,
        )
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return ResourceExhausted(
            "The message is too large for the inference service, or its queue is full.",
            reason="ENGINE_LIMIT",
            retry_after_seconds=RETRY_SECONDS,
        )
    # Domain errors travel inside responses. What is left is a replica that ended while it answered.
    if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN):
        return _lost()
    return Internal(f"The inference service failed with {code.name}.", reason="ENGINE_FAILED")


def _lost() -> GraftError:
    return Unavailable(
        "The inference service ended while it answered, or the link to it was cut. Try again shortly.",
        reason="ENGINE_LOST",
        retry_after_seconds=RETRY_SECONDS,
    )


class _Door:
    """The channel, opened by the first call: a grpc.aio channel belongs to the event loop that runs when it is made.

    A cable that is pulled tells nobody. While calls are in flight a pulse goes out, and what is not acknowledged ends
    the connection. gRPC's own keepalive pings would do the same, but Serve's proxy hangs up on who pings oftener than
    every five minutes, and has no option for it.
    """

    def __init__(self, address: str, max_message_bytes: int) -> None:
        self._address = address
        self._max_message_bytes = max_message_bytes
        self._channel: grpc.aio.Channel | None = None
        self._calls = 0
        self._pulse: asyncio.Task[None] | None = None

    def channel(self) -> grpc.aio.Channel:
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(
                self._address,
                options=[
                    ("grpc.max_receive_message_length", self._max_message_bytes),
                    ("grpc.max_send_message_length", self._max_message_bytes),
                    # A service that was restarted is found again within a second, not after gRPC's two minutes.
                    ("grpc.initial_reconnect_backoff_ms", 100),
                    ("grpc.max_reconnect_backoff_ms", 1000),
                    ("grpc.min_reconnect_backoff_ms", round(1000 * CONNECT_SECONDS)),  # how long one attempt may take
                    # Together they set TCP_USER_TIMEOUT to the latter. The pings are rarer than any server minds.
                    ("grpc.keepalive_time_ms", 3_600_000),
                    ("grpc.keepalive_timeout_ms", round(1000 * UNHEARD_SECONDS)),
                ],
            )
        return self._channel

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """A call that may wait for long."""
        self._calls += 1
        if self._pulse is None:
            self._pulse = asyncio.create_task(self._beat())
        try:
            yield
        finally:
            self._calls -= 1
            if self._calls == 0:
                self._rest()

    async def _beat(self) -> None:
        ask: Any = self.channel().unary_unary(PULSE)
        while True:
            await asyncio.sleep(PULSE_SECONDS)
            with suppress(grpc.aio.AioRpcError):
                await ask(b"", timeout=UNHEARD_SECONDS)

    def _rest(self) -> None:
        if self._pulse is not None:
            self._pulse.cancel()
            self._pulse = None

    async def close(self) -> None:
        self._rest()
        if self._channel is not None:
            await self._channel.close()
            self._channel = None


class EngineClient:
    """Calls the engine. Every method raises domain errors only."""

    def __init__(self, address: str, first: str = "", max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES) -> None:
        """`first` is the base model that the service starts with. Without it, whichever is there answers."""
        self.address = address
        self.first = first
        self.base = first
        """The base model that answers."""
        self._door = _Door(address, max_message_bytes)

    def of(self, base: str) -> "EngineClient":
        """The same service's application for `base`, over the same channel: closing either closes both.

        It never answers with another base model: Unavailable is raised while the application is not there.
        """
        other = copy(self)
        other.base = base
        return other

    async def close(self) -> None:
        """Closes the channel; calls in flight are cancelled."""
        await self._door.close()

    async def generate(
        self, request: engine_pb2.GenerateRequest, timeout_seconds: float
    ) -> engine_pb2.GenerateResponse:
        """Answers an OpenAI body at once. A refusal by OpenAI's handler is an answer, with its `http_status`."""
        request.base_model = self.base
        return await self._call(engine_pb2.GenerateResponse, self._stub().Generate, request, timeout_seconds)

    async def stream(self, request: engine_pb2.StreamRequest) -> AsyncIterator[engine_pb2.StreamResponse]:
        """Answers an OpenAI body piece by piece. Closing the iterator cancels the call and frees the engine."""
        request.request.base_model = self.base
        call = self._stub().Stream(request, metadata=self._metadata())
        begun = False
        try:
            with self._door.in_flight():
                async for response in call:
                    if response.HasField("error"):
                        raise from_status(response.error)
                    begun = True
                    yield response
        except grpc.aio.AioRpcError as error:
            if begun and error.code() is grpc.StatusCode.UNAVAILABLE:
                raise _lost() from error
            raise from_transport(error) from error
        finally:
            call.cancel()

    async def load(self, adapter: engine_pb2.AdapterRef, timeout_seconds: float = 120) -> engine_pb2.LoadResponse:
        """Pulls, proves and loads an adapter version. Raises what it was refused with."""
        request = engine_pb2.LoadRequest(adapter=adapter, base_model=self.base)
        return await self._call(engine_pb2.LoadResponse, self._stub().Load, request, timeout_seconds)

    async def unload(self, digest: str, timeout_seconds: float = 120) -> engine_pb2.UnloadResponse:
        """Takes an adapter version out, after its requests in flight have ended."""
        return await self._call(
            engine_pb2.UnloadResponse, self._stub().Unload, engine_pb2.UnloadRequest(digest=digest), timeout_seconds
        )

    async def residency(self, timeout_seconds: float = 10) -> engine_pb2.ResidencyResponse:
        """What every replica of this application holds."""
        try:
            response: engine_pb2.ResidencyResponse = await self._stub().Residency(
                engine_pb2.ResidencyRequest(), timeout=timeout_seconds, metadata=self._metadata()
            )
        except grpc.aio.AioRpcError as error:
            raise from_transport(error) from error
        if self.base and any(replica.base_model != self.base for replica in response.replicas):
            raise Unavailable(STARTING, reason="ENGINE_STARTING", retry_after_seconds=RETRY_SECONDS)
        return response

    async def deploy(self, model: BaseModel) -> None:
        """Starts an application for `model` beside the first one, unless it is there. Its engine takes longer.

        Raises ResourceExhausted when the machine's memory does not suffice, FailedPrecondition when it is not taken.
        """
        served = engine_pb2.ServedModel(
            id=model.id,
            path=model.path,
            digest=model.digest,
            parameter_count=model.parameter_count,
            size_bytes=model.size_bytes,
            context_tokens=model.context_tokens,
            target_modules=model.target_modules,
        )
        request = engine_pb2.DeployRequest(model=served)
        await self._call(engine_pb2.DeployResponse, self._stub().Deploy, request, DEPLOY_TIMEOUT_SECONDS)

    async def undeploy(self, base: str) -> None:
        """Ends the application of `base` and returns when its processes have; none is no error."""
        request = engine_pb2.UndeployRequest(base_model=base)
        await self._call(engine_pb2.UndeployResponse, self._stub().Undeploy, request, DEPLOY_TIMEOUT_SECONDS)

    async def applications(self, timeout_seconds: float = 10) -> list[engine_pb2.Application]:
        """Every application of the service, the first one too."""
        request = engine_pb2.ListApplicationsRequest()
        response = await self._call(
            engine_pb2.ListApplicationsResponse, self._stub().ListApplications, request, timeout_seconds
        )
        return list(response.applications)

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (("application", application_name(self.base, self.first)),)

    def _stub(self) -> Any:
        # grpc.aio needs the async stub; the generated annotations know only the synchronous one.
        return engine_pb2_grpc.EngineStub(self._door.channel())

    async def _call(self, _kind: type[ResponseT], method: Any, request: Any, timeout_seconds: float) -> ResponseT:
        try:
            with self._door.in_flight():
                response: ResponseT = await method(request, timeout=timeout_seconds, metadata=self._metadata())
        except grpc.aio.AioRpcError as error:
            raise from_transport(error) from error
        if response.HasField("error"):
            raise from_status(response.error)
        return response
