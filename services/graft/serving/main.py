"""The inference service's process: puts the application on the Ray cluster, and takes it down when told to end.

    python -m graft.serving.main

Owns Serve on the cluster. The replicas, the engine and the gRPC door are Ray's processes; this one only waits. Exit
codes: 0 after SIGTERM or SIGINT, 1 when the service cannot run, 2 when a setting is at fault.
"""

import asyncio
import os
import signal
import socket
import sys
import threading
import time

from graft import offline

offline.stay()  # before Ray, which reads its switch when it is imported

import ray
import structlog
from ray import serve
from ray.serve.config import ProxyLocation, gRPCOptions

from graft.domain.errors import FailedPrecondition, GraftError, InvalidArgument, Unavailable
from graft.domain.resources import BaseModel
from graft.internal.engine_client import APPLICATION, TOKEN_REFUSED, EngineClient
from graft.internal.token import engine_token
from graft.serving.app import QUIET, build_app
from graft.serving.door import HOST_VARIABLE
from graft.settings import Settings, load
from graft.storage import open_storage, share_base_model

NAMESPACE = "graft"
WATCH_SECONDS = 2.0
RAY_SECONDS = 60.0
"""As long as Ray's own processes wait for a head that does not answer."""
ALL_REPLICAS = {"RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0"}
"""Serve's proxy would give every request to the replica on its own node, until that one has as many as it may take."""
_log = structlog.get_logger("graft.serving")


def check_port(host: str, port: int) -> None:
    """Raises InvalidArgument naming the setting when nothing can listen there."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise InvalidArgument(
            f"The inference service cannot listen on {host}:{port} ({error.strerror}): "
            "free the port, or set GRAFT_SERVING_GRPC_PORT to another one.",
            reason="PORT_TAKEN",
        ) from None


def free_port() -> int:
    """A port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def connect(settings: Settings) -> None:
    """Connects to the cluster. Raises FailedPrecondition if there is none."""
    try:
        ray.init(
            address=settings.ray_address,
            namespace=NAMESPACE,
            runtime_env={
                "env_vars": {HOST_VARIABLE: settings.serving.host, **ALL_REPLICAS, **offline.ENVIRONMENT},
                "worker_process_setup_hook": "graft.serving.door.setup",
            },
        )
    except ConnectionError:
        raise FailedPrecondition(
            f"No Ray cluster answers at {settings.ray_address}: start it, or set GRAFT_ORCHESTRATOR_RAY_ADDRESS.",
            reason="RAY_UNAVAILABLE",
        ) from None


def start(settings: Settings, base: BaseModel) -> None:
    """Runs the application on the cluster. Raises InvalidArgument when its port is taken."""
    # What a killed predecessor left: its door may hold the port, and its replicas run older settings.
    serve.shutdown()
    check_port(settings.serving.host, settings.serving.grpc_port)
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        # Serve has no gRPC proxy without an HTTP one. Nobody is told this port, and the replica has no HTTP method.
        http_options={"host": "127.0.0.1", "port": free_port()},
        grpc_options=gRPCOptions(
            port=settings.serving.grpc_port,
            grpc_servicer_functions=["graft.internal.v1.engine_pb2_grpc.add_EngineServicer_to_server"],
        ),
        logging_config=QUIET,
    )
    share_base_model(open_storage(settings), base.path, base.digest)  # for replicas on other nodes
    serve.run(build_app(settings, base), name=APPLICATION, route_prefix="/")


def end_without_ray(done: threading.Event) -> None:
    """Until `done`: ends the process when Ray has gone, or was started anew. For a thread beside whatever waits.

    Who asks a Serve that is no longer there waits for ever. Ray itself aborts a process that asks for the nodes of
    another cluster than the one that it was connected to.
    """
    while not done.wait(WATCH_SECONDS):
        late = threading.Timer(RAY_SECONDS, _end, [f"Ray has not answered for {RAY_SECONDS:.0f} s"])
        late.daemon = True
        late.start()
        try:
            ray.nodes()
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing more can be asked
            if not done.is_set():
                _end(f"Ray does not answer ({type(error).__name__})")
        late.cancel()


def _end(why: str) -> None:
    _log.error(f"{why}; ending, so that it is started again.")
    os._exit(1)  # a shutdown would wait for Ray


def end_on_signals(stop: threading.Event) -> None:
    """Has SIGTERM and SIGINT set `stop`."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())


async def wait_until_ready(address: str, token: str, stop: threading.Event) -> None:
    """Returns when every replica is ready, or when `stop` is set. Raises Unavailable when one has another token."""
    client = EngineClient(address, token=token)
    try:
        while not stop.is_set():
            try:
                replicas = (await client.residency()).replicas
                if replicas and all(replica.ready for replica in replicas):
                    return
            except Unavailable as error:  # the door opens before the application is there
                if error.reason == TOKEN_REFUSED:
                    raise
            await asyncio.sleep(0.2)
    finally:
        await client.close()


def run(settings: Settings, base: BaseModel) -> int:
    """Runs the service until it is told to end; returns the exit code."""
    started = time.perf_counter()
    stop = threading.Event()
    end_on_signals(stop)
    token = engine_token(settings)
    done = threading.Event()
    try:
        connect(settings)
        threading.Thread(target=end_without_ray, args=[done], daemon=True).start()
        start(settings, base)
        # Again: to connect, Ray puts its own handler of SIGTERM in place, which aborts the process.
        end_on_signals(stop)
        asyncio.run(wait_until_ready(settings.engine_address, token, stop))
        if not stop.is_set():
            _log.info("serving", address=settings.engine_address, seconds=round(time.perf_counter() - started, 1))
        while not stop.wait(WATCH_SECONDS):
            if APPLICATION not in serve.status().applications:
                _log.error("Ray Serve has lost the application; ending, so that it is started again.")
                return 1
    finally:
        done.set()
        # Without a connection, Serve would start a Ray of its own to shut down.
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()
    return 0


def main() -> None:
    """Entry point."""
    from graft.registry.base_models import ensure_base_model

    try:
        settings = load()
        code = run(settings, ensure_base_model(settings, settings.serving.base_model))
    except InvalidArgument as error:
        print(error.message, file=sys.stderr)
        code = 2
    except GraftError as error:
        print(error.message, file=sys.stderr)
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
