"""What MLflow costs with so many adapters: a real server, asked by the product's own registry.

A few versions are published as the orchestrator does it. Their rows in MLflow's database are then copied under other
names, since to publish thousands takes an hour; the server that answers does not know the difference.
"""

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from sqlalchemy import MetaData, Table, create_engine, func, insert, make_url, select, text
from tests.support.mlflow_server import mlflow_server

from benchmarks.measured import Measured
from benchmarks.scale_store import stored_bytes
from benchmarks.stacks import publish
from graft.domain.names import registered_model
from graft.domain.resources import BaseModel
from graft.registry.mlflow_registry import Registry
from graft.store.database import Database

PROJECT = "default"
PUBLISHED = 8
CALLS = 50
TABLES = ("registered_models", "model_versions", "model_version_tags", "registered_model_aliases")
COPIES_AT_ONCE = 1_000
WORTH_WAITING_SECONDS = 25.0
"""A size whose pass would take longer is left out: it is what the fit is for."""
WORTH_REPEATING_SECONDS = 8.0


@contextmanager
def server(home: Path, database_url: str) -> Iterator[str]:
    """The stack's own MLflow on a database; yields its address."""
    with mlflow_server(home, GRAFT_REGISTRY_BACKEND_STORE_URI=database_url) as uri:
        yield uri


def blocking(url: str) -> str:
    """The URL of the same database for a blocking driver."""
    made = make_url(url)
    driver = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg"}[made.get_backend_name()]
    return made.set(drivername=driver).render_as_string(hide_password=False)


def measure(
    uri: str, database_url: str, base: BaseModel, adapter: Path, folder: Path, sizes: Sequence[int], rounds: int
) -> Iterator[tuple[int, Measured]]:
    """Figures by number of adapters; 0: those that have none to do with it."""
    registry = Registry(uri, folder / "cache")
    publish(registry, base.id, base.digest, "first", adapter)  # makes the experiment, and whatever is made once
    yield (
        0,
        Measured(
            "publish a version",
            "s",
            [seconds(partial(publish, registry, base.id, base.digest, f"a{n}", adapter)) for n in range(PUBLISHED)],
        ),
    )
    registry.set_alias(PROJECT, base.id, "first", "champion", 1)
    first = next(version for version in registry.snapshot().versions if version.adapter == "first")
    name = registered_model(PROJECT, base.id, "first")
    yield (
        0,
        Measured(
            "pull a version into an empty cache",
            "s",
            [
                seconds(partial(Registry(uri, folder / f"cache-{n}").pull, name, 1, first.digest))
                for n in range(PUBLISHED)
            ],
        ),
    )
    run_id = registry.start_run(PROJECT, "metrics", 1, {}, {})
    steps = [
        seconds(partial(registry.log_metrics, run_id, {"loss": 0.5, "learning_rate": 5e-4, "epoch": 0.1}, step))
        for step in range(CALLS)
    ]
    yield 0, Measured("log the metrics of a step", "ms", [statistics.median(steps) * 1000])
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    taken = 0.0
    for before, size in zip((0, *sizes), sizes, strict=False):
        expected = taken * size / max(before, 1)
        if expected > WORTH_WAITING_SECONDS:
            break
        empty = asyncio.run(_stored_bytes(database_url))
        made = _fill(database_url, name, size)
        if made >= COPIES_AT_ONCE:
            grown = asyncio.run(_stored_bytes(database_url)) - empty
            yield size, Measured("bytes of a model and its version in MLflow's database", "bytes", [grown / made])
        yield (
            size,
            Measured(
                "resolve an alias at MLflow",
                "ms",
                [
                    seconds(lambda: [client.get_model_version_by_alias(name, "champion") for _ in range(CALLS)])
                    * (1000 / CALLS)
                    for _ in range(rounds)
                ],
            ),
        )
        passes = [seconds(registry.snapshot) for _ in range(rounds if expected < WORTH_REPEATING_SECONDS else 1)]
        taken = min(passes)
        yield size, Measured("the mirror's pass: everything read from MLflow", "s", passes)


def seconds(call: Callable[[], Any]) -> float:
    """Of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


async def _stored_bytes(url: str) -> int:
    database = Database(url)
    try:
        return await stored_bytes(database)
    finally:
        await database.close()


def _fill(url: str, like: str, size: int) -> int:
    """Copies the rows of the registered model `like` until there are `size` models. Returns how many it made."""
    engine = create_engine(url)
    metadata = MetaData()
    tables = [Table(name, metadata, autoload_with=engine) for name in TABLES]
    try:
        with engine.begin() as connection:
            models = tables[0]
            there = connection.execute(select(func.count()).select_from(models)).scalar_one()
            rows = {
                table: [dict(row) for row in connection.execute(select(table).where(table.c.name == like)).mappings()]
                for table in tables
            }
            for start in range(there, size, COPIES_AT_ONCE):
                names = [f"{like}-{number:06d}" for number in range(start, min(start + COPIES_AT_ONCE, size))]
                for table in tables:
                    copies = [{**row, "name": name} for name in names for row in rows[table]]
                    connection.execute(insert(table), copies)
            connection.execute(text("ANALYZE"))  # as autovacuum does within a minute
            return max(size - int(there), 0)
    finally:
        engine.dispose()
