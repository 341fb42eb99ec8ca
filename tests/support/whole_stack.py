"""The whole local stack as people start it: `graft up` in a process of its own, with a home and ports of its own."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import openai
import psutil
import yaml

from graft.client import Connection, Graft
from graft.settings import Settings, load
from graft.stack.local import read_status
from tests.support.ports import free_ports
from tests.support.processes import end
from tests.support.serving_stack import descendants, engine_cores, titles

T = TypeVar("T")

COMMAND = (sys.executable, "-m", "graft.cli.main")
PORTS = (
    "GRAFT_GATEWAY_GRPC_PORT",
    "GRAFT_GATEWAY_HTTP_PORT",
    "GRAFT_SERVING_GRPC_PORT",
    "GRAFT_REGISTRY_PORT",
    "GRAFT_RAY_PORT",
    "GRAFT_RAY_DASHBOARD_PORT",
)
START_SECONDS = 240.0
"""Tells a start from a hang: it takes half a minute on two cores that are free."""
SHOWN_LINES = 15


def eventually(read: Callable[[], T], accept: Callable[[T], bool], seconds: float, what: str) -> T:
    """Reads until the value is accepted and returns it; fails with the last one."""
    deadline = time.monotonic() + seconds
    while not accept(value := read()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s; last seen: {value!r}"
        time.sleep(0.1)
    return value


@dataclass
class WholeStack:
    """A home, and what runs on it."""

    home: Path
    environment: dict[str, str]
    settings: Settings
    up: "subprocess.Popen[bytes] | None" = None
    """`graft up` in the foreground."""

    def graft(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """The command, run to its end."""
        return subprocess.run([*COMMAND, *arguments], env=self.environment, capture_output=True, text=True, timeout=400)

    def start(self, *options: str) -> None:
        """`graft up`, until it is ready."""
        (self.home / "logs").mkdir(exist_ok=True)
        with open(self.home / "logs" / "up.log", "wb") as log:
            self.up = subprocess.Popen(
                [*COMMAND, "up", *options], env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        deadline = time.monotonic() + START_SECONDS
        while not (status := read_status(self.home)) or not status["ready"]:
            assert self.up.poll() is None, f"`graft up` ended with {self.up.returncode}.\n{self.last_lines()}"
            assert time.monotonic() < deadline, f"The stack does not get ready.\n{self.last_lines()}"
            time.sleep(0.2)

    def process(self, name: str) -> dict[str, Any]:
        """A process as the supervisor tells of it: state, pid, restarts."""
        status = read_status(self.home)
        assert status is not None, f"The stack has ended.\n{self.last_lines()}"
        (found,) = [process for process in status["processes"] if process["name"] == name]
        return dict(found)

    def end(self, name: str, number: signal.Signals) -> None:
        """A signal to a process of the supervisor's list."""
        os.kill(self.process(name)["pid"], number)

    def ready_again(self, name: str, restarts: int) -> None:
        """Waits until the supervisor has replaced a killed process."""
        eventually(
            lambda: self.process(name),
            lambda told: told["restarts"] == restarts and told["state"] == "ready",
            120,
            f"{name} is replaced",
        )

    def left(self) -> list[psutil.Process]:
        """Every live process that was started below this stack, wherever it hangs in the tree now."""
        return descendants(self.home)

    def engine_core(self) -> psutil.Process:
        """The process that runs the model."""
        (core,) = engine_cores(self.home)
        return core

    def training_workers(self) -> list[psutil.Process]:
        """Ray Train's workers, named by Ray after their class."""
        return [process for process in self.left() if any("RayTrainWorker" in title for title in titles([process]))]

    def last_lines(self) -> str:
        """The ends of all logs."""
        ends = []
        for log in sorted((self.home / "logs").glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
            ends.append("\n".join([f"--- {log.name}", *(line[:400] for line in lines)]))
        return "\n".join(ends)

    def client(self) -> Graft:
        """The SDK."""
        return Graft(Connection(address=f"127.0.0.1:{self.settings.gateway.grpc_port}", api_key="", project="default"))

    def openai(self) -> openai.OpenAI:
        """OpenAI's client as it is published, told nothing but the address."""
        url = f"http://127.0.0.1:{self.settings.gateway.http_port}/v1"
        return openai.OpenAI(base_url=url, api_key="none", max_retries=0)

    def interrupt(self) -> int:
        """Ctrl-C to `graft up`; returns its exit code."""
        assert self.up is not None
        self.up.send_signal(signal.SIGINT)
        return self.up.wait(120)


def make_stack(base_models: dict[str, dict[str, str]] | None = None, **variables: str) -> WholeStack:
    """An empty home that is the stack's own, with entries of its catalogue. Nothing runs yet."""
    # Short, since Ray's sockets lie below it: a socket's path has 107 characters at most.
    home = Path(tempfile.mkdtemp(prefix="g", dir="/tmp"))
    if base_models:
        (home / "base_models.yaml").write_text(yaml.safe_dump(base_models))
    ports = {name: str(port) for name, port in zip(PORTS, free_ports(len(PORTS)), strict=True)}
    # What the person who runs the tests has set for a stack of their own must not reach this one.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")}
    graft = {"GRAFT_HOME": str(home), **ports, **variables}
    return WholeStack(home, {**inherited, **graft, "GRAFT_TEST_STACK": str(home)}, load(graft))


@contextmanager
def removed(stack: WholeStack) -> Iterator[WholeStack]:
    """Ends whatever is left of the stack and removes its home; fails when something was left."""
    try:
        yield stack
    finally:
        left = stack.left()
        told = [str(process) for process in left]
        end(left)
        lines = stack.last_lines() if left else ""
        shutil.rmtree(stack.home, ignore_errors=True)
    assert not left, f"left behind: {told}\n{lines}"
