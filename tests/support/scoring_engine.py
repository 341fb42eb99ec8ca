"""An engine's stand-in that scores with PEFT what it pulls from the registry, so that parity is a real comparison."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from graft.internal.v1 import engine_pb2, engine_pb2_grpc
from graft.registry.mlflow_registry import Registry
from tests.support.fake_engine import FakeEngine


class ScoringEngine(FakeEngine):
    """Answers a completion with the log-probabilities of its prompt."""

    def __init__(self, model: str, base: Path, registry: Registry) -> None:
        super().__init__(model)
        self._base = base
        self._registry = registry

    def _score(self, adapter: engine_pb2.AdapterRef, tokens: list[int]) -> list[Any]:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        folder = self._registry.pull(adapter.registered_model, adapter.version, adapter.digest)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(self._base), folder).eval()
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), dim=-1)
        following = range(len(tokens) - 1)
        return [None, *({str(tokens[at + 1]): {"logprob": float(logprobs[at, tokens[at + 1]])}} for at in following)]

    async def Generate(self, request: engine_pb2.GenerateRequest, _context: Any) -> engine_pb2.GenerateResponse:
        """A completion with `prompt_logprobs`."""
        scores = await asyncio.to_thread(self._score, request.adapter, json.loads(request.body)["prompt"])
        body = {"choices": [{"index": 0, "text": "x", "prompt_logprobs": scores}]}
        return engine_pb2.GenerateResponse(http_status=200, body=json.dumps(body).encode())


@asynccontextmanager
async def served(engine: ScoringEngine, port: int) -> AsyncIterator[None]:
    """The engine, on a port of loopback."""
    server = grpc.aio.server()
    engine_pb2_grpc.add_EngineServicer_to_server(engine, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)
