"""The gateway's process: gRPC and HTTP on one event loop, until SIGTERM or SIGINT.

    python -m graft.gateway.main

Exit codes: 0 after a stop on request, 1 when a server ended by itself, 2 when it cannot start (one sentence on
standard error says why).
Imports nothing heavy: it is ready in under two seconds.
"""

import asyncio
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import structlog
from sqlalchemy.exc import IntegrityError, OperationalError

from graft import logs
from graft.domain.errors import FailedPrecondition, GraftError, Internal
from graft.domain.names import DEFAULT_PROJECT
from graft.gateway import server
from graft.gateway.auth import Authenticator, key_hash
from graft.gateway.core import Core
from graft.gateway.http.app import build_app
from graft.gateway.uploads import remove_abandoned
from graft.internal.engine_client import EngineClient
from graft.internal.token import engine_token
from graft.settings import Settings, load
from graft.store.protocol import Store
from graft.store.sql import migrate, open_store

SHORTEST_KEY = 32
"""Characters. Only a key's SHA-256 is stored, which does not protect one that can be guessed."""

_log = structlog.get_logger("graft.gateway")


async def serve(settings: Settings, store: Store, engine: EngineClient, stop: asyncio.Event) -> None:
    """Serves until `stop` is set, then drains.

    Raises FailedPrecondition when a port, the TLS files or the keys do not allow a start, and Internal when the HTTP
    server ends by itself.
    """
    gateway = settings.gateway
    server.check_tls(gateway)
    core = Core(store, engine, settings)
    authenticator = Authenticator(store, gateway)
    await authenticator.check_start()
    http_socket = server.bind(gateway.host, gateway.http_port, "GRAFT_GATEWAY_HTTP_PORT")
    try:
        grpc_server, healthy = server.grpc_server(core, authenticator, gateway)
        grpc_port = server.add_grpc_port(grpc_server, gateway)
        http = server.http_server(build_app(core, authenticator), gateway)
        await grpc_server.start()
        http_task = asyncio.create_task(http.serve(sockets=[http_socket]))
        stop_task = asyncio.create_task(stop.wait())
        while not http.started and not http_task.done():  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        await server.tell_serving(healthy)
        _log.info(
            "gateway ready",
            grpc=f"{gateway.host}:{grpc_port}",
            http=f"{gateway.host}:{http_socket.getsockname()[1]}",
            tls=gateway.tls_certificate is not None,
            seconds=round(time.time() - psutil.Process().create_time(), 2),
        )
        await asyncio.wait({stop_task, http_task}, return_when=asyncio.FIRST_COMPLETED)
        stop_task.cancel()
        _log.info("gateway stops", grace_seconds=gateway.shutdown_grace_seconds)
        core.drain()
        await healthy.enter_graceful_shutdown()
        http.should_exit = True
        await asyncio.gather(grpc_server.stop(gateway.shutdown_grace_seconds), http_task)
        if not stop.is_set():
            raise Internal("The HTTP server ended by itself; the lines above say why.", reason="HTTP_ENDED")
    finally:
        http_socket.close()


async def run(settings: Settings) -> None:
    """Opens store and engine client, serves, and closes them. SIGTERM and SIGINT stop it."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    token = engine_token(settings)
    await asyncio.to_thread(_migrate, settings.store_url)
    store = open_store(settings.store_url)
    engine = EngineClient(settings.engine_address, settings.serving.base_model, token=token)
    try:
        if settings.gateway.initial_key_file is not None:
            await add_initial_key(store, settings.gateway.initial_key_file)
        if removed := await asyncio.to_thread(remove_abandoned, settings):
            _log.info("abandoned uploads removed", files=removed)
        await serve(settings, store, engine, stop)
    finally:
        await engine.close()
        await store.close()


async def add_initial_key(store: Store, file: Path) -> None:
    """Adds the key in `file` to the project `default`, unless it is in the store already.

    Raises FailedPrecondition when the file cannot be read or holds no key that may be one.
    """
    try:
        secret = file.read_text().strip()
    except OSError as error:
        raise FailedPrecondition(
            f"GRAFT_GATEWAY_INITIAL_KEY_FILE names {file}, which cannot be read ({error.strerror}).",
            reason="INITIAL_KEY_UNREADABLE",
        ) from None
    if len(secret) < SHORTEST_KEY:
        raise FailedPrecondition(
            f"{file} (GRAFT_GATEWAY_INITIAL_KEY_FILE) holds {len(secret)} characters: an API key needs at least "
            f"{SHORTEST_KEY}.",
            reason="INITIAL_KEY_TOO_SHORT",
        )
    digest = key_hash(secret)
    if await store.find_key(digest) is None:
        with suppress(IntegrityError):  # another gateway, which starts at the same time, has added it
            await store.add_key(digest, DEFAULT_PROJECT, "initial")
            _log.info("initial API key added", project=DEFAULT_PROJECT)


def _migrate(url: str) -> None:
    try:
        migrate(url)
    except OperationalError as error:
        raise FailedPrecondition(
            f"The database cannot be used: {error.orig}. Check GRAFT_STORE_URL and GRAFT_HOME.", reason="STORE_UNUSABLE"
        ) from None


def main() -> int:
    """Returns the exit code."""
    logs.configure("gateway")
    try:
        asyncio.run(run(load()))
    except GraftError as error:
        print(f"graft gateway: {error.message}", file=sys.stderr)
        return 1 if isinstance(error, Internal) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
