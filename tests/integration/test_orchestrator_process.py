"""The orchestrator's own process on real Ray, MLflow and training: stopped while a run trains, and started again.

The engine is a stand-in that scores with PEFT, so that parity is a real comparison.
"""

import asyncio
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from graft.data.formats import validate_file
from graft.domain.jobs import Hyperparameters, JobSpec, JobState
from graft.domain.resources import Dataset
from graft.internal.v1 import engine_pb2, engine_pb2_grpc
from graft.orchestrator.context import stored_events
from graft.registry.mlflow_registry import Registry
from graft.settings import Settings, load
from graft.store.sql import SqlStore
from tests.support.fake_engine import FakeEngine
from tests.support.mlflow_server import mlflow_server
from tests.support.postgres import free_port
from tests.support.stores import sqlite_store
from tests.support.tiny_llama import make_tiny_llama

pytestmark = pytest.mark.integration

BASE = "tiny"
STEPS = 300


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


@pytest.fixture
def home() -> Iterator[Path]:
    # Not tmp_path: Ray's sockets lie below it, and a socket's path has 107 characters at most.
    folder = Path(tempfile.mkdtemp(prefix="graft-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


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


async def make_dataset(store: SqlStore, settings: Settings) -> None:
    path = settings.home.path / "rows.jsonl"
    rows = [{"prompt": f"Number {number}?", "completion": f" {number * 7}"} for number in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = validate_file(path)
    await store.create_dataset(
        Dataset(
            id="ds-1",
            project="default",
            display_name="rows",
            format=report.format,
            row_count=report.row_count,
            size_bytes=report.size_bytes,
            digest=report.digest,
            uri=str(path),
            create_time=await store.now(),
        ),
        None,
    )


@pytest.mark.timeout(400)
async def test_a_stopped_orchestrators_successor_adopts_the_run_and_finishes_the_job(home: Path) -> None:
    base = make_tiny_llama(home / "tiny")
    (home / "base_models.yaml").write_text(json.dumps({BASE: {"folder": str(base)}}))
    with mlflow_server(home / "mlflow") as uri:
        ports = {
            "GRAFT_RAY_PORT": free_port(),
            "GRAFT_RAY_DASHBOARD_PORT": free_port(),
            "GRAFT_SERVING_GRPC_PORT": free_port(),
        }
        graft = {
            "GRAFT_HOME": str(home),
            "GRAFT_SERVING_BASE_MODEL": BASE,
            "GRAFT_REGISTRY_TRACKING_URI": uri,
            **{name: str(port) for name, port in ports.items()},
        }
        settings = load(graft)
        environment = {**os.environ, **graft, "RAY_USAGE_STATS_ENABLED": "0"}
        # Said outright: left alone, `ray start` takes a token that it finds in the home, and a driver does not send it.
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        ray_head = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"),
            *("--node-ip-address=127.0.0.1", f"--port={settings.ray.port}", "--include-dashboard=false"),
            *(f"--temp-dir={home / 'ray'}", "--object-store-memory=100000000", "--disable-usage-stats"),
        ]
        orchestrator = [sys.executable, "-m", "graft.orchestrator.main"]
        log = home / "orchestrator.log"
        store = await sqlite_store(home)
        await make_dataset(store, settings)
        spec = JobSpec(BASE, "ds-1", suffix="sums", hyperparameters=Hyperparameters(max_steps=STEPS, batch_size=4))
        await store.create_job("default", "job-1", spec, None)
        with process(ray_head, environment, home / "ray.log"):
            await listening(settings.ray.port, home / "ray.log")
            with process(orchestrator, environment, log) as first:
                await until(store, JobState.RUNNING, first, log)
                first.terminate()
                # The promise is 5 s; this tells a stop from a hang, on a machine that may be busy.
                assert await asyncio.to_thread(first.wait, 20) == 0, log.read_text()[-3000:]
            assert (await store.get_job("default", "job-1")).lease_owner is None
            engine = ScoringEngine(base, Registry(uri, home / "engine"))
            with process(orchestrator, environment, log) as second:
                async with served(engine, settings.serving.grpc_port):
                    await until(store, JobState.SUCCEEDED, second, log)
        job = await store.get_job("default", "job-1")
        events = await stored_events(store, job)
        reports = [event.data["report"] for event in events if "report" in event.data]
        await store.close()
    assert (job.attempt, job.fine_tuned_model) == (1, f"{BASE}:sums@1")
    assert reports == sorted(set(reports))
    assert job.progress is not None
    assert (job.progress.step, job.progress.total_steps) == (STEPS, STEPS)
    assert job.metrics["parity_max_abs_difference"] < 1e-3
    adopted = [json.loads(line) for line in log.read_text().splitlines() if '"job_adopted"' in line]
    assert [(line["job"], line["state"]) for line in adopted] == [("job-1", "RUNNING")]
