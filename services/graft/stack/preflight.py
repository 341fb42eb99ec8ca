"""What is known to fail before anything starts: settings with which Ray cannot run, and ports named twice.

Pure but for the kernel's largest process id. Whether ports are taken is found when the stack starts.
"""

import os
from pathlib import Path

from graft.domain.errors import FailedPrecondition
from graft.settings import Settings
from graft.stack.processes import Port, described, ray_folder

SOCKET_PATH_BYTES = 107
"""unix(7): `sun_path` has 108 bytes, the last of which is zero."""
_SESSION = "/session_2026-01-02_03-04-05_678901_"
"""Ray names a session's folder by time and process id, and keeps the sockets one folder below."""
_SOCKETS = "/sockets/"
_LONGEST_SOCKET = "dash_MetricsHead"
"""Of those in Ray 2.60: where its dashboard cannot make this one, the whole head ends after a minute."""
RAY_WORKER_PORTS = range(10002, 20000)
"""`ray start` gives its workers these, and ends at once when a port of its own is among them."""
RAY_CLIENT_PORT = 10001
"""Ray's head takes it for Ray Client."""


def check(settings: Settings) -> None:
    """Raises FailedPrecondition, naming the setting, when the stack cannot start with these settings."""
    home = settings.home.path
    if settings.orchestrator.ray_address.startswith("ray://") and not settings.serving.address:
        raise FailedPrecondition(
            f"orchestrator.ray_address is {settings.orchestrator.ray_address}: the inference service runs in that "
            "cluster then, and not here. Start it there (`python -m graft.serving.main` on its head) and set "
            "serving.address to its host and gRPC port.",
            reason="SERVING_ADDRESS_MISSING",
            metadata={"setting": "GRAFT_SERVING_ADDRESS"},
        )
    left_bytes = home_bytes(settings)
    if not settings.orchestrator.ray_address and len(os.fsencode(home)) > left_bytes:
        raise FailedPrecondition(
            f"GRAFT_HOME is too deep: Ray keeps sockets below it, whose paths may have {SOCKET_PATH_BYTES} bytes. That "
            f"leaves {left_bytes} for GRAFT_HOME, and {home} has {len(os.fsencode(home))}. Set GRAFT_HOME to a shorter "
            "path, for example ~/.graft.",
            reason="HOME_TOO_DEEP",
            metadata={"setting": "GRAFT_HOME"},
        )
    ports = [port for process in described(settings, {}) for port in process.ports]
    for port in ports:
        if reserved_by_ray(port):
            raise FailedPrecondition(
                f"{port.setting} is {port.number}, which Ray keeps for its workers and clients ({RAY_CLIENT_PORT} to "
                f"{RAY_WORKER_PORTS[-1]}). Set it to a port outside of these.",
                reason="PORT_RESERVED",
                metadata={"setting": port.setting},
            )
    settings_by_port: dict[int, str] = {}
    for port in ports:
        other = settings_by_port.setdefault(port.number, port.setting)
        if other != port.setting:
            raise FailedPrecondition(
                f"{other} and {port.setting} both name port {port.number}. Set one of them to another port.",
                reason="PORT_NAMED_TWICE",
                metadata={"setting": port.setting},
            )


def reserved_by_ray(port: Port) -> bool:
    """True for a port of Ray's own that Ray refuses to use."""
    return port.setting.startswith("GRAFT_RAY_") and among_ray_workers(port)


def among_ray_workers(port: Port) -> bool:
    """True for a port that Ray may give to a worker or to a client."""
    return port.number == RAY_CLIENT_PORT or port.number in RAY_WORKER_PORTS


def home_bytes(settings: Settings) -> int:
    """Longest GRAFT_HOME, in bytes, below which Ray can make its sockets."""
    largest_pid = Path("/proc/sys/kernel/pid_max").read_text().strip()
    below = ray_folder(settings).relative_to(settings.home.path)
    return SOCKET_PATH_BYTES - len(f"/{below}{_SESSION}{largest_pid}{_SOCKETS}{_LONGEST_SOCKET}")
