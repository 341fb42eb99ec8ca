"""What Kubernetes does to Graft's processes in an upgrade, on one machine: a Service before gateways, pods replaced.

Everything is real but for the engine: PostgreSQL, MLflow, a Ray cluster that is reached by Ray's client, gateways and
orchestrators as processes.
"""

import asyncio
import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from graft.internal.v1 import engine_pb2
from tests.support.fake_engine import WORDS
from tests.support.ports import free_ports
from tests.support.processes import end, process
from tests.support.scoring_engine import ScoringEngine
from tests.support.serving_stack import titles

BASE = "tiny"
PATIENCE_SECONDS = 200.0


class Service:
    """A port that hands each new connection to one of its endpoints in turn, as a Service does. What is connected
    stays, also with an endpoint that has left."""

    def __init__(self) -> None:
        self.endpoints: list[int] = []
        self._turn = itertools.count()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            try:
                far = socket.create_connection(("127.0.0.1", self.endpoints[next(self._turn) % len(self.endpoints)]))
            except OSError:
                near.close()
                continue
            for here, there in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(here, there), daemon=True).start()

    @staticmethod
    def _pump(here: socket.socket, there: socket.socket) -> None:
        with suppress(OSError):
            while data := here.recv(65536):
                there.sendall(data)
        with suppress(OSError):
            there.shutdown(socket.SHUT_WR)


class HeldEngine(ScoringEngine):
    """Streams its first piece, and the rest once `go_on` is set."""

    go_on: asyncio.Event

    async def Stream(self, request: engine_pb2.StreamRequest, context: Any) -> Any:
        """OpenAI's chunks."""
        sent = 0
        async for piece in super().Stream(request, context):
            yield piece
            sent += 1
            if sent == 1:
                await self.go_on.wait()


@dataclass
class Pod:
    """A process of Graft, and its log."""

    running: "subprocess.Popen[bytes]"
    log: Path
    ports: tuple[int, int] = (0, 0)
    """gRPC and HTTP of a gateway."""

    def said(self, line: str) -> bool:
        """Whether its log has that."""
        return line in self.log.read_text(errors="replace")

    async def until_said(self, line: str) -> None:
        """Waits for it; fails when the process ends before."""
        await until(lambda: self.said(line) or self.running.poll() is not None, f"{self.log.name} says {line}")
        assert self.said(line), self.log.read_text(errors="replace")[-3000:]

    async def terminate(self) -> int:
        """As the kubelet does; returns the exit code."""
        self.running.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self.running.wait, PATIENCE_SECONDS)


async def until(reached: Callable[[], bool], what: str) -> None:
    """Waits for something; fails after a while."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not reached():
        assert time.monotonic() < deadline, f"not within {PATIENCE_SECONDS:.0f} s: {what}"
        await asyncio.sleep(0.05)


@dataclass
class Release:
    """The installation: its settings, its Services, and the pods that run."""

    home: Path
    environment: dict[str, str]
    ray_ports: tuple[int, int]
    grpc: Service = field(default_factory=Service)
    http: Service = field(default_factory=Service)
    stack: ExitStack = field(default_factory=ExitStack)
    head: psutil.Process | None = None
    _head: ExitStack = field(default_factory=ExitStack)
    _count: "itertools.count[int]" = field(default_factory=itertools.count)

    def start_head(self) -> None:
        """The training cluster: one node."""
        gcs, client = self.ray_ports
        # Not below the home: a head that is made anew finds nothing of the one before, and a socket's path is short.
        folder = tempfile.mkdtemp(prefix="gr", dir="/tmp")
        head = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"),
            *("--node-ip-address=127.0.0.1", f"--port={gcs}", f"--ray-client-server-port={client}"),
            *("--include-dashboard=false", f"--temp-dir={folder}", "--object-store-memory=100000000"),
            "--disable-usage-stats",
        ]
        self._head.callback(shutil.rmtree, folder, ignore_errors=True)
        running = self._head.enter_context(process(head, self.environment, self.home / "head.log"))
        self.head = psutil.Process(running.pid)

    def end_head(self) -> None:
        """Ends the cluster and all that runs there."""
        family = self.head.children(recursive=True) if self.head is not None else []
        self._head.close()
        end(family)
        self.head = None

    def training_workers(self) -> list[psutil.Process]:
        """Ray Train's workers, named by Ray after their class."""
        assert self.head is not None
        family = self.head.children(recursive=True)
        return [one for one in family if any("RayTrainWorker" in title for title in titles([one]))]

    async def run(self, *arguments: str) -> None:
        """A hook of Helm's: a process to its end."""
        command = [sys.executable, "-m", *arguments]
        done = await asyncio.to_thread(
            subprocess.run, command, env=self.environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
        )
        assert done.returncode == 0, done.stderr

    def _start(self, name: str, arguments: tuple[str, ...], **variables: str) -> Pod:
        log = self.home / f"{name}-{next(self._count)}.log"
        command = [sys.executable, "-m", *arguments]
        return Pod(self.stack.enter_context(process(command, {**self.environment, **variables}, log)), log)

    async def orchestrator(self, *arguments: str) -> Pod:
        """Starts one, by default of this version, until it is ready: again as long as the cluster takes no drivers."""
        while True:
            pod = self._start("orchestrator", arguments or ("graft.orchestrator.main",))
            await until(lambda: pod.said('"orchestrator_ready"') or pod.running.poll() is not None, "it is ready")  # noqa: B023
            if pod.running.poll() is None:
                return pod
            assert pod.said('"ray_unreachable"'), pod.log.read_text()[-3000:]

    async def gateway(self, *arguments: str) -> Pod:
        """Starts one, by default of this version, and waits until it is ready."""
        ports = free_ports(2)
        names = ("GRAFT_GATEWAY_GRPC_PORT", "GRAFT_GATEWAY_HTTP_PORT")
        variables = {name: str(port) for name, port in zip(names, ports, strict=True)}
        pod = self._start("gateway", arguments or ("graft.gateway.main",), **variables)
        pod.ports = (ports[0], ports[1])
        await pod.until_said('"gateway ready"')
        return pod

    def route_to(self, gateway: Pod) -> None:
        """New connections go to this gateway alone."""
        self.grpc.endpoints, self.http.endpoints = [gateway.ports[0]], [gateway.ports[1]]


def release(home: Path, store_url: str, tracking_uri: str, base: str) -> Release:
    """Settings of an installation. Nothing runs yet."""
    gcs, client, engine = free_ports(3)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")}
    environment = {
        **inherited,
        "GRAFT_HOME": str(home),
        "GRAFT_STORE_URL": store_url,
        "GRAFT_SERVING_BASE_MODEL": base,
        "GRAFT_SERVING_GRPC_PORT": str(engine),
        "GRAFT_REGISTRY_TRACKING_URI": tracking_uri,
        "GRAFT_ORCHESTRATOR_RAY_ADDRESS": f"ray://127.0.0.1:{client}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Ray's client waits 30 s for a head that does not come back.
        "RAY_CLIENT_RECONNECT_GRACE_PERIOD": "5",
        # 10 s by default, which a busy machine may take for what is in flight.
        "GRAFT_GATEWAY_SHUTDOWN_GRACE_SECONDS": "60",
    }
    return Release(home, environment, (gcs, client))


STREAMED = "[base] " + "".join(WORDS)
