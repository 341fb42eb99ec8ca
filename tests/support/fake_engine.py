"""An `Engine` over gRPC without a model: its answers say which adapter was used, which is what edges are tested for.

    async with fake_engine() as engine:
        client = EngineClient(engine.address)

`engine.requests` keeps every body it was sent; `engine.error` makes every call fail with that domain error;
`engine.refuse` makes generation answer with OpenAI's error object and that HTTP status; `engine.delay_seconds` comes
before every answer and every piece; `engine.abandoned` counts the streams that their reader left; `engine.others` are
the replicas of applications beside the first, by base model. `fake_engine(token=…)` asks for that token, as the real
one does.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from grpc_status import rpc_status

from graft.domain.errors import GraftError, Unauthenticated
from graft.internal import token as engine_token
from graft.internal.status import to_status
from graft.internal.v1 import engine_pb2, engine_pb2_grpc

WORDS = ("one", " two", " three")
"""What a stream brings, after the name of the adapter."""


class FakeEngine(engine_pb2_grpc.EngineServicer):
    """One ready replica of `base_model` that can hold four adapters."""

    def __init__(self, base_model: str) -> None:
        self.address = ""
        self.requests: list[tuple[engine_pb2.GenerateRequest, dict[str, Any]]] = []
        self.error: GraftError | None = None
        self.refuse: int | None = None
        self.delay_seconds = 0.0
        self.abandoned = 0
        self.others: dict[str, engine_pb2.Replica] = {}
        self.replica = engine_pb2.Replica(
            replica="fake-1", base_model=base_model, capacity=4, ready=True, max_lora_rank=64
        )

    def _take(self, request: engine_pb2.GenerateRequest) -> str:
        """Records the request; returns the text that answers it: `[adapter or base] echo of the last input`."""
        body = json.loads(request.body)
        assert request.base_model in ("", self.replica.base_model, *self.others)
        self.requests.append((request, body))
        base = f"base {request.base_model}" if request.base_model in self.others else "base"
        used = request.adapter.model if request.HasField("adapter") else base
        said = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        return f"[{used}] {said}"

    def _refusal(self) -> bytes:
        return json.dumps(
            {"error": {"message": "top_p must be in (0, 1].", "type": "BadRequestError", "param": "top_p", "code": 400}}
        ).encode()

    def _sampled(self, count: int) -> bytes:
        """Answer i is the token i, and the last one's end is missing; the last one comes first."""
        choices = [
            {
                "index": index,
                "text": f"answer {index}",
                "token_ids": [index],
                "logprobs": {"token_logprobs": [-float(index)]},
                "finish_reason": "length" if index == count - 1 else "stop",
            }
            for index in reversed(range(count))
        ]
        return json.dumps({"choices": choices}).encode()

    async def Generate(self, request: engine_pb2.GenerateRequest, _context: Any) -> engine_pb2.GenerateResponse:
        """OpenAI's answer object with the echo."""
        text = self._take(request)
        await asyncio.sleep(self.delay_seconds)
        if self.error is not None:
            return engine_pb2.GenerateResponse(error=to_status(self.error))
        if self.refuse is not None:
            return engine_pb2.GenerateResponse(http_status=self.refuse, body=self._refusal())
        asked = json.loads(request.body)
        if asked.get("return_token_ids"):
            return engine_pb2.GenerateResponse(http_status=200, body=self._sampled(int(asked["n"])))
        chat = request.endpoint == engine_pb2.ENDPOINT_CHAT_COMPLETIONS
        choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        body = {
            "id": "cmpl-fake",
            "object": "chat.completion" if chat else "text_completion",
            "created": 0,
            "model": request.public_model,
            "choices": [{"index": 0, "finish_reason": "stop", **choice}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
        }
        return engine_pb2.GenerateResponse(http_status=200, body=json.dumps(body).encode())

    async def Stream(
        self, request: engine_pb2.StreamRequest, _context: Any
    ) -> AsyncIterator[engine_pb2.StreamResponse]:
        """The adapter's name, then WORDS, as OpenAI's chunks; usage last when the body asks for it."""
        inner = request.request
        text = self._take(inner)
        if self.error is not None:
            yield engine_pb2.StreamResponse(error=to_status(self.error))
            return
        if self.refuse is not None:
            yield engine_pb2.StreamResponse(http_status=self.refuse, data=self._refusal())
            return
        chat = inner.endpoint == engine_pb2.ENDPOINT_CHAT_COMPLETIONS
        pieces = [text.split("]")[0] + "] ", *WORDS]
        common = {"id": "cmpl-fake", "created": 0, "model": inner.public_model}
        common["object"] = "chat.completion.chunk" if chat else "text_completion"
        for number, piece in enumerate(pieces):
            try:
                await asyncio.sleep(self.delay_seconds)
            except asyncio.CancelledError:
                self.abandoned += 1
                raise
            choice: dict[str, Any] = {"index": 0, "finish_reason": "stop" if number == len(pieces) - 1 else None}
            choice |= {"delta": {"content": piece}} if chat else {"text": piece}
            yield engine_pb2.StreamResponse(http_status=200, data=json.dumps({**common, "choices": [choice]}).encode())
        if json.loads(inner.body).get("stream_options", {}).get("include_usage"):
            usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
            yield engine_pb2.StreamResponse(
                http_status=200, data=json.dumps({**common, "choices": [], "usage": usage}).encode()
            )

    def _replica(self, context: Any) -> engine_pb2.Replica:
        application = dict(context.invocation_metadata())["application"]
        return self.others.get(application.removeprefix("graft-engine-"), self.replica)

    async def Load(self, request: engine_pb2.LoadRequest, context: Any) -> engine_pb2.LoadResponse:
        """Adds the adapter to the application's replica."""
        replica = self._replica(context)
        if self.error is not None:
            return engine_pb2.LoadResponse(error=to_status(self.error))
        if all(held.digest != request.adapter.digest for held in replica.adapters):
            held = replica.adapters.add(model=request.adapter.model, digest=request.adapter.digest, in_engine=True)
            held.last_use_time.GetCurrentTime()
        return engine_pb2.LoadResponse(replicas=[replica], load_seconds=0.01)

    async def Unload(self, request: engine_pb2.UnloadRequest, context: Any) -> engine_pb2.UnloadResponse:
        """Takes the adapter out of the application's replica."""
        replica = self._replica(context)
        kept = [held for held in replica.adapters if held.digest != request.digest]
        del replica.adapters[:]
        replica.adapters.extend(kept)
        return engine_pb2.UnloadResponse(replicas=[replica])

    async def Residency(self, _request: engine_pb2.ResidencyRequest, context: Any) -> engine_pb2.ResidencyResponse:
        """The application's one replica."""
        return engine_pb2.ResidencyResponse(replicas=[self._replica(context)])


class _AsksForToken(grpc.aio.ServerInterceptor):
    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        try:
            engine_token.check([self._token], details.invocation_metadata or ())
        except Unauthenticated as error:
            status = rpc_status.to_status(to_status(error))

            async def refuse(_request: Any, context: Any) -> None:
                await context.abort(status.code, status.details, status.trailing_metadata)

            streams = details.method.endswith("/Stream")
            make = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
            return make(refuse)
        return await continuation(details)


@asynccontextmanager
async def fake_engine(base_model: str = "smollm2-135m", token: str = "") -> AsyncIterator[FakeEngine]:
    """A FakeEngine that listens on a free port of loopback until the block ends."""
    engine = FakeEngine(base_model)
    server = grpc.aio.server(interceptors=[_AsksForToken(token)] if token else [])
    engine_pb2_grpc.add_EngineServicer_to_server(engine, server)
    engine.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield engine
    finally:
        await server.stop(None)
