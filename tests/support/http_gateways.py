"""The HTTP edge on a free port, by a real uvicorn, over a real SQLite store and a fake engine.

async with http_gateway(tmp_path) as it:
    await it.client.models.list()
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI

from graft.gateway import server
from graft.gateway.auth import Authenticator
from graft.gateway.core import Core
from graft.gateway.http.app import build_app
from graft.internal.engine_client import EngineClient
from graft.settings import GatewaySettings, Settings, load
from graft.store.protocol import Store
from tests.support.fake_engine import FakeEngine, fake_engine
from tests.support.gateways import BASE, seeded_store


@dataclass(frozen=True)
class HttpGateway:
    """What a test reaches. `client` does not repeat refused requests; `raw` speaks plain HTTP."""

    core: Core
    store: Store
    engine: FakeEngine
    settings: Settings
    url: str
    client: AsyncOpenAI
    raw: httpx.AsyncClient


@asynccontextmanager
async def http_gateway(
    tmp_path: Path, guarded: bool = False, engine_address: str = "", **variables: str
) -> AsyncIterator[HttpGateway]:
    """A running edge. `guarded` demands API keys, as beyond loopback; `variables` are settings."""
    settings = load({"GRAFT_HOME": str(tmp_path / "home"), **variables})
    beyond: dict[str, Any] = {"host": "0.0.0.0"} if guarded else {}
    async with seeded_store(tmp_path) as store, fake_engine(BASE) as engine:
        client = EngineClient(engine_address or engine.address, settings.serving.base_model)
        core = Core(store, client, settings)
        authenticator = Authenticator(store, GatewaySettings(**beyond))
        socket = server.bind("127.0.0.1", 0, "GRAFT_GATEWAY_HTTP_PORT")
        uvicorn = server.http_server(build_app(core, authenticator), GatewaySettings(shutdown_grace_seconds=1))
        serving = asyncio.create_task(uvicorn.serve(sockets=[socket]))
        while not uvicorn.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.005)
        url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        try:
            async with (
                httpx.AsyncClient(base_url=url, timeout=20) as raw,
                AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=20) as openai,
            ):
                yield HttpGateway(core, store, engine, settings, url, openai, raw)
        finally:
            core.drain()
            uvicorn.should_exit = True
            await serving
            socket.close()
            await client.close()
