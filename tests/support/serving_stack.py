"""The inference service as a real stack: a Ray head, the service's process and a tiny llama, on ports of their own."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from graft.domain.errors import GraftError
from graft.internal.engine_client import EngineClient
from graft.internal.token import engine_token
from graft.internal.v1 import engine_pb2
from graft.registry.digest import adapter_digest
from graft.settings import Settings, load
from graft.stack.processes import engine_environment, ray_environment, ray_head

from .adapters import make_adapter, tiny_base
from .ports import free_ports
from .processes import end
from .tiny_llama import make_tiny_llama

CAPACITY = 3
RUN = """
import json, sys
from graft.domain.resources import BaseModel
from graft.serving import main
from graft.settings import load
base = json.loads(sys.argv[1])
base["target_modules"] = tuple(base["target_modules"])
sys.exit(main.run(load(), BaseModel(**base)))
"""
"""The service's process with the tiny llama as its base model."""


@dataclass
class Stack:
    """A Ray head, the service's process, and adapters to serve."""

    settings: Settings
    environment: dict[str, str]
    process: subprocess.Popen[bytes]
    adapters: dict[str, engine_pb2.AdapterRef]
    folder: Path
    ready_seconds: float
    refused_before_ready: list[GraftError]

    def client(self, first: str = "") -> EngineClient:
        """Of the service, with its token."""
        return EngineClient(self.settings.engine_address, first, token=engine_token(self.settings))

    def engine_core(self) -> psutil.Process:
        """The process that runs the model."""
        (core,) = engine_cores(self.folder)
        return core


def engine_cores(folder: Path) -> list[psutil.Process]:
    """The processes of the stack that run models, each the only child of a fork server."""
    found = []
    for process in descendants(folder):
        with suppress(psutil.NoSuchProcess):  # others come and go
            parent = process.parent()
            if parent is not None and "from multiprocessing.forkserver" in " ".join(parent.cmdline()):
                found.append(process)
    return found


def descendants(folder: Path) -> list[psutil.Process]:
    """Every live process of the stack: all inherit its mark in their environment, wherever they hang in the tree."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("GRAFT_TEST_STACK") == str(folder):
                found.append(process)
        except psutil.Error:
            continue
    return found


def titles(processes: Sequence[psutil.Process]) -> list[str]:
    """Their command lines, without those of processes that have ended since they were listed."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found.append(" ".join(process.cmdline()))
    return found


@contextmanager
def ray_cluster(
    settings: Settings, environment: dict[str, str], folder: Path, *more: str, dashboard: bool = False
) -> Iterator[None]:
    """The stack's own Ray head but for its folder, with no dashboard unless asked; ends all that carries `folder`.

    `more`: arguments of `ray start`, the last of a kind counts.
    """
    # Unix socket paths end at 107 characters, which pytest's temporary folders pass: Ray gets a short one.
    sockets = tempfile.mkdtemp(prefix="gr", dir="/tmp")
    head, log = ray_head(settings), folder / "ray.log"
    command = [*head.argv, f"--temp-dir={sockets}", f"--include-dashboard={str(dashboard).lower()}", *more]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while not head.probe():
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.1)
        yield
    finally:
        # `ray stop` would end every cluster of the machine; ours carries our mark.
        end(descendants(folder))
        process.wait()
        shutil.rmtree(sockets, ignore_errors=True)


def adapter_ref(name: str, folder: Path) -> engine_pb2.AdapterRef:
    return engine_pb2.AdapterRef(model=f"tiny:{name}@1", digest=adapter_digest(folder), path=str(folder))


def request(adapter: engine_pb2.AdapterRef | None, text: str, **fields: Any) -> engine_pb2.GenerateRequest:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0, **fields}
    return engine_pb2.GenerateRequest(
        endpoint=engine_pb2.ENDPOINT_CHAT_COMPLETIONS,
        body=json.dumps(body).encode(),
        adapter=adapter,
        public_model=adapter.model if adapter else "tiny",
        request_id="test",
    )


def completion(adapter: engine_pb2.AdapterRef | None, prompt: Any, **fields: Any) -> engine_pb2.GenerateRequest:
    made = request(adapter, "")
    made.endpoint = engine_pb2.ENDPOINT_COMPLETIONS
    made.body = json.dumps({"prompt": prompt, "temperature": 0, **fields}).encode()
    return made


async def wait_until_ready(client: EngineClient, process: "subprocess.Popen[bytes]", log: Path) -> list[GraftError]:
    """Waits for the engine; returns what a request was refused with in the meantime."""
    refused: list[GraftError] = []
    deadline = time.monotonic() + 180
    try:
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            try:
                if all(replica.ready for replica in (await client.residency()).replicas):
                    return refused
                await client.generate(request(None, "hi"), timeout_seconds=60)
            except GraftError as error:
                refused.append(error)
            await asyncio.sleep(0.2)
    finally:
        await client.close()


@contextmanager
def serving_stack(
    folder: Path, *, dashboard: bool = False, base_folder: Path | None = None, **more: str
) -> Iterator[Stack]:
    """Starts Ray and the service with `folder` for its files, waits until it is ready, and ends all of it.

    `base_folder` holds the base model; None: the usual tiny llama. `more` are `GRAFT_*` variables beside or instead of
    those below.
    """
    base = tiny_base(base_folder or make_tiny_llama(folder / "base"))
    adapters = {
        name: adapter_ref(name, make_adapter(Path(base.path), folder / name, seed=seed))
        for seed, name in enumerate(("a", "b", "c", "d", "e"), start=1)
    }
    ray_port, dashboard_port, grpc_port = free_ports(3)
    variables = {
        "GRAFT_HOME": str(folder / "home"),
        "GRAFT_RAY_PORT": str(ray_port),
        "GRAFT_RAY_DASHBOARD_PORT": str(dashboard_port),
        "GRAFT_SERVING_GRPC_PORT": str(grpc_port),
        "GRAFT_SERVING_MAX_LORAS": "2",
        "GRAFT_SERVING_MAX_CPU_LORAS": str(CAPACITY),
        "GRAFT_SERVING_MAX_LORA_RANK": "16",
        "GRAFT_SERVING_CONTEXT_TOKENS": "256",
        # Answers are compared between batches: in bfloat16 near-ties fall either way.
        "GRAFT_SERVING_DTYPE": "float32",
        "GRAFT_RAY_NUM_CPUS": "2",
        "GRAFT_RAY_OBJECT_STORE_MIB": "80",
        **more,
    }
    settings = load(variables)
    environment = {**os.environ, **variables, "GRAFT_TEST_STACK": str(folder)}
    environment |= ray_environment(settings) | engine_environment(settings)
    with ray_cluster(settings, environment, folder, dashboard=dashboard):
        started = time.perf_counter()
        described = json.dumps(base.__dict__)
        with (folder / "serving.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", RUN, described], env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            stack = Stack(settings, environment, process, adapters, folder, 0.0, [])
            stack.refused_before_ready = asyncio.run(wait_until_ready(stack.client(), process, folder / "serving.log"))
            stack.ready_seconds = time.perf_counter() - started
            yield stack
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):  # after a test that has failed: the cluster's end is its end too
                process.wait(30)
