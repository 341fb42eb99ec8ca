"""What the local stack consists of: each process, how it is started, and how it is told to be ready. What the settings
place elsewhere, by an address, is none of them.

Owns the list and the probes. Does not start anything: `graft.stack.supervisor` does.
"""

import os
import secrets
import socket
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import psutil

from graft import offline
from graft.domain.errors import GraftError
from graft.internal import token as engine_token
from graft.settings import Settings, is_loopback

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
    """Ready when `url` answers with 200. Whose certificate it has does not matter: it is of this machine."""
    anybody = ssl._create_unverified_context()

    def probe() -> bool:
        try:
            with urllib.request.urlopen(url, timeout=2.0, context=anybody) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    return probe


def pid_file_probe(file: Path) -> Probe:
    """Ready when the live process whose pid the file holds has written it; one that was killed leaves it behind."""

    def probe() -> bool:
        try:
            return psutil.pid_exists(int(file.read_text()))
        except (FileNotFoundError, ValueError):
            return False

    return probe


def port_taken(port: Port) -> bool:
    """True when something else listens there."""
    try:
        family, *_, address = socket.getaddrinfo(port.host.strip("[]"), port.number, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError:
        return True
    return False


def _python(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *arguments)


def ray_folder(settings: Settings) -> Path:
    """Where Ray keeps its sessions, sockets and logs."""
    return settings.home.path / "ray"


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
            f"--temp-dir={ray_folder(settings)}",
            "--disable-usage-stats",
        ),
        probe=tcp_probe(ray.host, ray.port),
        ports=(
            Port(ray.host, ray.port, "GRAFT_RAY_PORT"),
            Port(ray.host, ray.dashboard_port, "GRAFT_RAY_DASHBOARD_PORT"),
        ),
    )


def ray_environment(settings: Settings) -> dict[str, str]:
    """What every process that talks to the local Ray cluster needs: a token of this home's own, and no telemetry.

    Ray would otherwise take the token in the user's home, where another cluster may have left one.
    """
    token = _made_once(settings.home.path / "run" / "ray-token")
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), **offline.ENVIRONMENT}
    if is_loopback(settings.ray.host):
        # `--node-ip-address=127.0.0.1` alone is resolved to the host's own address. On macOS and Windows Ray knows
        # loopback only; this is how it is told so, there and here.
        variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    return variables


def engine_environment(settings: Settings) -> dict[str, str]:
    """What training workers need to ask the engine: a token of this home's own, unless the settings name one.

    Without one everybody on this machine could ask it, load into it and unload from it.
    """
    if engine_token.makes_own_token(settings):
        _made_once(engine_token.own_token_file(settings))
    file = engine_token.token_file(settings)
    return {engine_token.VARIABLE: str(file)} if file else {}


def _made_once(token: Path) -> Path:
    """A file with a random token, which its user alone may read. Whole or not there at all: an empty one would stay."""
    if not token.is_file():
        token.parent.mkdir(parents=True, exist_ok=True)
        fresh = token.with_name(f".{token.name}.{os.getpid()}")
        try:
            fresh.touch(mode=0o600)
            fresh.write_text(secrets.token_hex(32))
            fresh.replace(token)
        finally:
            fresh.unlink(missing_ok=True)
    return token


def local_stack(settings: Settings) -> list[Process]:
    """Every process that runs here, in the order in which they are listed and, in reverse, ended."""
    if settings.orchestrator.ray_address:  # that cluster's token is in our own environment, if it has one
        return described(settings, dict(offline.ENVIRONMENT))
    return described(settings, ray_environment(settings) | engine_environment(settings))


def described(settings: Settings, ray_variables: dict[str, str]) -> list[Process]:
    """The same without touching the disk; `ray_variables` go to all that talk to Ray."""
    registry, gateway, serving = settings.registry, settings.gateway, settings.serving
    own = [
        replace(ray_head(settings), environment=ray_variables),
        Process(
            name="mlflow",
            argv=_python("graft.registry.main"),
            probe=http_probe(f"http://{registry.host}:{registry.port}/health"),
            ports=(Port(registry.host, registry.port, "GRAFT_REGISTRY_PORT"),),
        ),
        Process(
            name="gateway",
            argv=_python("graft.gateway.main"),
            probe=http_probe(f"{settings.gateway_url}/healthz"),
            ports=(
                Port(gateway.host, gateway.grpc_port, "GRAFT_GATEWAY_GRPC_PORT"),
                Port(gateway.host, gateway.http_port, "GRAFT_GATEWAY_HTTP_PORT"),
            ),
        ),
        Process(
            name="inference",
            argv=_python("graft.serving.main"),
            environment=ray_variables,
            probe=_engine_probe(settings),
            ports=(Port(serving.host, serving.grpc_port, "GRAFT_SERVING_GRPC_PORT"),),
            ready_timeout_seconds=600.0,  # the first start converts the base model as well
            after=("ray",),
        ),
        Process(
            name="orchestrator",
            argv=_python("graft.orchestrator.main"),
            environment=ray_variables,
            probe=pid_file_probe(settings.orchestrator_pid_file),
            ports=_metrics_port(settings),
            after=("ray", "mlflow", "gateway"),
            ready_timeout_seconds=600.0,
        ),
    ]
    elsewhere = given_by_address(settings)
    here = [process for process in own if process.name not in elsewhere]
    return [replace(one, after=tuple(name for name in one.after if name not in elsewhere)) for one in here]


def _metrics_port(settings: Settings) -> tuple[Port, ...]:
    orchestrator = settings.orchestrator
    port = Port(orchestrator.metrics_host, orchestrator.metrics_port, "GRAFT_ORCHESTRATOR_METRICS_PORT")
    return (port,) if port.number else ()


def given_by_address(settings: Settings) -> dict[str, str]:
    """Name of each process that the settings place elsewhere, and its address."""
    given = {
        "ray": settings.orchestrator.ray_address,
        "mlflow": settings.registry.tracking_uri,
        "inference": settings.serving.address,
    }
    return {name: address for name, address in given.items() if address}


def _engine_probe(settings: Settings) -> Probe:
    """Ready when every replica says so."""

    def probe() -> bool:
        from graft.internal.v1 import engine_pb2, engine_pb2_grpc

        with grpc.insecure_channel(settings.engine_address) as channel:
            try:
                brought = (("application", "graft-engine"), *engine_token.metadata(engine_token.engine_token(settings)))
                answer = engine_pb2_grpc.EngineStub(channel).Residency(
                    engine_pb2.ResidencyRequest(), timeout=2.0, metadata=brought
                )
            except (grpc.RpcError, GraftError):
                return False
        return bool(answer.replicas) and all(replica.ready for replica in answer.replicas)

    return probe
