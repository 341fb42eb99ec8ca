"""What tests of Graft's own processes start beside them, and a stand-in for the engine.

It scores with PEFT, so that parity is a real comparison.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc

from graft.domain.jobs import JobState
from graft.internal.v1 import engine_pb2, engine_pb2_grpc
from graft.registry.mlflow_registry import Registry
from graft.store.sql import SqlStore
from tests.support.fake_engine import FakeEngine

BASE = "tiny"


class ScoringEngine(FakeEngine):
    """Pulls from the registry and scores with PEFT what it is asked to score."""

    def __init__(self, base: Path, registry: Registry) -> None:
        super().__init__(BASE)
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


@contextmanager
def process(arguments: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, whose whole group is ended afterwards."""
    with open(log, "ab") as output:
        running = subprocess.Popen(arguments, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        yield running
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(running.pid, number)
            except ProcessLookupError:
                break
            deadline = time.monotonic() + 10
            while running.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)


@asynccontextmanager
async def served(engine: ScoringEngine, port: int) -> AsyncIterator[None]:
    server = grpc.aio.server()
    engine_pb2_grpc.add_EngineServicer_to_server(engine, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)


async def until(
    store: SqlStore, state: JobState, running: subprocess.Popen[bytes], log: Path, seconds: float = 120
) -> None:
    deadline = time.monotonic() + seconds
    while (job := await store.get_job("default", "job-1")).state is not state:
        assert job.state not in (JobState.FAILED, JobState.SUCCEEDED), (job.error, log.read_text()[-3000:])
        assert running.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, (job.state, log.read_text()[-3000:])
        await asyncio.sleep(0.05)


async def listening(port: int, log: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        await asyncio.sleep(0.2)
