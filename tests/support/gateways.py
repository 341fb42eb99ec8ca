"""A real gRPC gateway on a free port over a real SQLite store and a fake engine.

The store knows one base model and one adapter.

async with gateway(tmp_path) as it:
    jobs = FineTuningServiceStub(it.channel)
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from graft.domain.errors import GraftError
from graft.domain.resources import Adapter, AdapterVersion, BaseModel, RegistrySnapshot
from graft.domain.shapes import Shape
from graft.gateway import server
from graft.gateway.auth import Authenticator
from graft.gateway.core import Core
from graft.internal.engine_client import EngineClient
from graft.internal.status import from_status
from graft.settings import Settings, load
from graft.store.protocol import Store
from tests.support.fake_engine import FakeEngine, fake_engine
from tests.support.stores import sqlite_store

BASE = "smollm2-135m"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ROWS = b'{"prompt": "good film?", "completion": "yes"}\n{"prompt": "bad film?", "completion": "no"}\n'


@dataclass(frozen=True)
class Gateway:
    """What a test reaches."""

    core: Core
    store: Store
    engine: FakeEngine
    settings: Settings
    channel: grpc.aio.Channel
    address: str


def base_model() -> BaseModel:
    """The one base model of the catalogue."""
    return BaseModel(
        id=BASE,
        path="nowhere",
        digest="sha256:base",
        parameter_count=135_000_000,
        size_bytes=270_000_000,
        context_tokens=2048,
        license="Apache-2.0",
        source="test",
        target_modules=("q_proj", "v_proj"),
        max_lora_rank=64,
        shape=Shape(30, 576, 1536, 576, 192, 49152, tied=True),
    )


def registry(aliases: dict[str, int] | None = None) -> RegistrySnapshot:
    """Adapter `reviews` of project `default` with versions 1 and 3; champion is 3 unless told otherwise."""
    return RegistrySnapshot(
        adapters=(Adapter("default", BASE, "reviews", aliases or {"champion": 3}, 3, NOW),),
        versions=tuple(
            AdapterVersion(
                project="default",
                base_model=BASE,
                adapter="reviews",
                version=number,
                digest=f"sha256:{number:064x}",
                base_model_digest="sha256:base",
                dataset_digest="sha256:data",
                job_id=f"ft-{number}",
                rank=8,
                size_bytes=1000,
                mlflow_run_id=f"run-{number}",
                create_time=NOW,
                metrics={"train_loss": 0.5},
            )
            for number in (1, 3)
        ),
    )


@asynccontextmanager
async def gateway(tmp_path: Path, **variables: str) -> AsyncIterator[Gateway]:
    """A running gateway; `variables` are settings, for example `GRAFT_GATEWAY_MAX_UPLOAD_BYTES="100"`."""
    settings = load({"GRAFT_HOME": str(tmp_path / "home"), "GRAFT_GATEWAY_GRPC_PORT": "0", **variables})
    async with seeded_store(tmp_path) as store, fake_engine(BASE) as engine:
        client = EngineClient(engine.address, settings.serving.base_model)
        core = Core(store, client, settings)
        running, healthy = server.grpc_server(core, Authenticator(store, settings.gateway), settings.gateway)
        port = server.add_grpc_port(running, settings.gateway)
        await running.start()
        await server.tell_serving(healthy)
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield Gateway(core, store, engine, settings, channel, f"127.0.0.1:{port}")
        finally:
            core.drain()
            await running.stop(None)
            await client.close()


@asynccontextmanager
async def seeded_store(tmp_path: Path) -> AsyncIterator[Store]:
    """An SQLite store that knows the base model and the adapter."""
    store = await sqlite_store(tmp_path)
    try:
        await store.replace_base_models([base_model()])
        await store.replace_registry(registry())
        yield store
    finally:
        await store.close()


async def refused(call: Awaitable[Any]) -> GraftError:
    """The domain error, rebuilt from `grpc-status-details-bin`, that a call is refused with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rpc_status.from_call(caught.value)
    assert status is not None, f"no rich status: {caught.value!r}"
    return from_status(status)


async def drained(stream: Any) -> list[Any]:
    """All answers of a stream."""
    return [answer async for answer in stream]


async def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Waits until `condition()`; fails after `seconds`."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is awaited happens in another process or thread
            await asyncio.sleep(0.01)
