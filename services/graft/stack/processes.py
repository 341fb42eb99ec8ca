"""What the local stack consists of: each process, how it is started, and how it is told to be ready.

Owns the list and the probes. Does not start anything: `graft.stack.supervisor` does.
"""

import os
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field

from graft.settings import Settings

Probe = Callable[[], bool]
"""True when the process answers. Blocking, at most a few seconds; called in a thread."""


@dataclass(frozen=True)
class Port:
    """A port that a process listens on, and the setting that moves it."""

    host: str
    number: int
    setting: str


@dataclass(frozen=True)
class Process:
    """One process of the stack."""

    name: str
    argv: tuple[str, ...]
    probe: Probe
    ports: tuple[Port, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    ready_timeout_seconds: float = 300.0
    """Importing torch and vLLM takes a minute on two cores; five is a hang."""
    after: tuple[str, ...] = ()
    """Names that must be ready before this one starts."""


def tcp_probe(host: str, port: int) -> Probe:
    """Ready when the port accepts a connection."""

    def probe() -> bool:
        try:
            with socket.create_connection((host, port), timeout=1.0):
                return True
        except OSError:
            return False

    return probe


def http_probe(url: str) -> Probe:
    """Ready when `url` answers with 200."""

    def probe() -> bool:
        try:
            with urllib.request.urlopen(url, timeout=2.0) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    return probe


def port_taken(port: Port) -> bool:
    """True when something else listens there."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((port.host, port.number))
        except OSError:
            return True
    return False


def _python(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *arguments)


def ray_head(settings: Settings) -> Process:
    """The Ray head node of the local cluster."""
    ray = settings.ray
    cpus = ray.num_cpus or os.cpu_count() or 1
    return Process(
        name="ray",
        argv=(
            *_python("ray.scripts.scripts", "start", "--head", "--block"),
            f"--node-ip-address={ray.host}",
            f"--port={ray.port}",
            f"--dashboard-host={ray.host}",
            f"--dashboard-port={ray.dashboard_port}",
            f"--num-cpus={cpus}",
            f"--object-store-memory={ray.object_store_mib * 1024 * 1024}",
            f"--temp-dir={settings.home.path / 'ray'}",
            "--disable-usage-stats",
        ),
        probe=tcp_probe(ray.host, ray.port),
        ports=(
            Port(ray.host, ray.port, "GRAFT_RAY_PORT"),
            Port(ray.host, ray.dashboard_port, "GRAFT_RAY_DASHBOARD_PORT"),
        ),
    )
