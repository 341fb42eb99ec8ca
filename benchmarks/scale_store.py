"""What the store costs with so many adapters and jobs: the product's own calls, on the database of a URL.

Rows that a benchmark cannot wait for (100,000 jobs) are inserted in bulk, in the form in which the store writes them.
Knows nothing of reports.
"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, insert, make_url, text, update
from tests.support.postgres import postgres_server

from benchmarks.measured import Measured, median_milliseconds, seconds_of
from graft.domain.errors import NotFound
from graft.domain.jobs import EventLevel, Job, JobSpec, JobState, Progress
from graft.domain.resources import Adapter, AdapterVersion, BaseModel, RegistrySnapshot
from graft.domain.stored import to_json
from graft.store.database import Database
from graft.store.sql import SqlStore, migrate, open_store
from graft.store.tables import jobs

PROJECT, BASE = "default", "smollm2-135m"
NOW = datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)
LEASE = timedelta(hours=1)
CLAIM_LIMIT = 64
CALLS = 200
"""Of what takes milliseconds, in each round."""
AT_ONCE = 16
MOST_HELD = 1_000
"""An orchestrator holds what it has claimed; beyond this one call alone takes seconds."""
METRICS = {"train_loss": 0.18456169962882996, "trained_tokens": 52186.0, "adapter_bytes": 9824423.0}
PROGRESS = Progress(step=50, total_steps=100, epoch=0.5, loss=0.18456169962882996)
EVENT: dict[str, object] = {
    "step": 50,
    "total_steps": 100,
    "epoch": 0.5,
    "loss": 0.18456169962882996,
    "learning_rate": 0.00034567890123456,
    "grad_norm": 1.2345678901234567,
    "tokens_per_second": 383.58123456789,
    "trained_tokens": 26093,
    "remaining_seconds": 71.23456789,
    "attempt": 1,
    "report": 52,
}


@contextmanager
def databases(kind: str, folder: Path) -> Iterator[Callable[[], str]]:
    """Makes URLs of empty databases: files below `folder`, or databases of one PostgreSQL that writes to the disk."""
    if kind == "sqlite":
        yield lambda: f"sqlite+aiosqlite:///{folder / uuid.uuid4().hex}.db"
        return
    with postgres_server(durable=True) as server:

        def made() -> str:
            name = f"s{uuid.uuid4().hex}"
            engine = create_engine(server, isolation_level="AUTOCOMMIT")
            with engine.connect() as connection:
                connection.execute(text(f"CREATE DATABASE {name}"))
            engine.dispose()
            return make_url(server).set(database=name).render_as_string(hide_password=False)

        yield made


async def measure(url: str, count: int, rounds: int) -> list[Measured]:
    """All figures with `count` adapters of one version each, and `count` jobs."""
    await asyncio.to_thread(migrate, url)
    database, store = Database(url), open_store(url)
    try:
        return [
            *await _adapters(store, database, count, rounds),
            *await _jobs(store, database, count, rounds),
        ]
    finally:
        await store.close()
        await database.close()


async def _adapters(store: SqlStore, database: Database, count: int, rounds: int) -> list[Measured]:
    await store.replace_base_models(
        [BaseModel(BASE, "/models", "sha256:b", 135, 269, 8192, "Apache-2.0", "package", ("q_proj",), 64)]
    )
    snapshot = registry_of(count)
    before = await stored_bytes(database)
    first = await seconds_of(lambda: store.replace_registry(snapshot))
    size = await stored_bytes(database) - before

    moved: list[float] = []
    for number in range(rounds):
        # There and back: an adapter has but one version, so that an alias more is what changes.
        aliases = {"champion": 1} if number % 2 else {"champion": 1, "candidate": 1}
        changed = replace(snapshot.adapters[count // 2], aliases=aliases)
        others = snapshot.adapters[: count // 2], snapshot.adapters[count // 2 + 1 :]
        again = RegistrySnapshot((*others[0], changed, *others[1]), snapshot.versions)
        moved.append(await seconds_of(partial(store.replace_registry, again)))

    names = [snapshot.adapters[number * 7919 % count].adapter for number in range(CALLS)]

    async def resolve(name: str) -> AdapterVersion:
        return await store.resolve_version(PROJECT, BASE, name, version=None, alias="champion")

    async def refuse() -> None:
        try:
            await resolve("nobody")
        except NotFound:
            return
        raise AssertionError("a name that does not exist was resolved")

    async def many() -> None:
        waiting = iter(names * 4)

        async def one_by_one() -> None:
            for name in waiting:
                await resolve(name)

        await asyncio.gather(*(one_by_one() for _ in range(AT_ONCE)))

    await many()  # opens the connections
    middle = (await store.list_adapters(PROJECT, BASE, 0, "")).next_page_token
    return [
        Measured("the read model, written whole", "s", [first]),
        Measured("the read model, one alias of it moved", "s", moved),
        Measured("bytes of an adapter and its version", "bytes", [size / count]),
        Measured("resolve a name", "ms", [await median_milliseconds(resolve, names) for _ in range(rounds)]),
        Measured(
            f"resolve names, {AT_ONCE} at a time",
            "names/s",
            [len(names) * 4 / await seconds_of(many) for _ in range(rounds)],
        ),
        Measured("refuse an unknown name", "ms", [await seconds_of(refuse) * 1000 for _ in range(rounds)]),
        Measured(
            "list a page of 50 adapters",
            "ms",
            [
                await median_milliseconds(lambda token: store.list_adapters(PROJECT, BASE, 50, token), [middle] * 20)
                for _ in range(rounds)
            ],
        ),
    ]


async def _jobs(store: SqlStore, database: Database, count: int, rounds: int) -> list[Measured]:
    before = await stored_bytes(database)
    await insert_jobs(database, count, JobState.QUEUED)
    found = [Measured("bytes of a job", "bytes", [(await stored_bytes(database) - before) / count])]

    async def claim() -> Sequence[Job]:
        return await store.claim_jobs("owner", LEASE, CLAIM_LIMIT)

    claims: list[float] = []
    for _ in range(rounds):
        claims.append(await seconds_of(claim) * 1000)
        await store.release_leases("owner")
    found.append(Measured(f"claim {CLAIM_LIMIT} jobs of those that wait", "ms", claims))
    async with database.write() as connection:
        values = {"lease_owner": "owner", "lease_expire_time": datetime.now(UTC) + LEASE}
        await connection.execute(update(jobs).values(values))
    await _analyze(database)
    found += [
        Measured("claim when all are taken", "ms", [await seconds_of(claim) * 1000 for _ in range(rounds * 5)]),
        Measured(
            "list a page of 50 jobs",
            "ms",
            [
                await median_milliseconds(lambda size: store.list_jobs(PROJECT, size, ""), [50] * 20)
                for _ in range(rounds)
            ],
        ),
    ]
    if count <= MOST_HELD:
        held = [await median_milliseconds(store.leased_jobs, ["owner"] * 10) for _ in range(rounds)]
        renewed = [
            await median_milliseconds(lambda owner: store.renew_leases(owner, LEASE), ["owner"] * 10)
            for _ in range(rounds)
        ]
        found += [Measured("read the jobs that one holds", "ms", held), Measured("renew their leases", "ms", renewed)]
    return [*found, *await _events(store, database, count, rounds)]


async def _events(store: SqlStore, database: Database, count: int, rounds: int) -> list[Measured]:
    held = await store.get_job(PROJECT, job_id(0))
    others = [await store.get_job(PROJECT, job_id(number)) for number in range(min(count, AT_ONCE // 2))]

    async def tell(job: Job) -> None:
        event = (EventLevel.INFO, "metrics", "Step 50 of 100, loss 0.1846.", dict(EVENT))
        await store.record(job, "owner", progress=PROGRESS, event=event)

    async def together() -> None:
        async def one_by_one(job: Job) -> None:
            for _ in range(CALLS // len(others)):
                await tell(job)

        await asyncio.gather(*(one_by_one(job) for job in others))

    await tell(held)
    before = await stored_bytes(database)
    alone = [CALLS / await seconds_of(lambda: _each(tell, [held] * CALLS)) for _ in range(rounds)]
    size = (await stored_bytes(database) - before) / (CALLS * rounds)
    each = CALLS // len(others) * len(others)
    many = [each / await seconds_of(together) for _ in range(rounds)]
    return [
        Measured("append events of one job", "events/s", alone),
        Measured("append events of 8 jobs at once", "events/s", many),
        Measured("bytes of an event", "bytes", [size]),
    ]


async def _each(tell: Callable[[Job], Awaitable[None]], told: Sequence[Job]) -> None:
    for job in told:
        await tell(job)


def registry_of(count: int) -> RegistrySnapshot:
    """So many adapters, of one version each."""
    names = [f"specialist-{number:06d}" for number in range(count)]
    return RegistrySnapshot(
        tuple(Adapter(PROJECT, BASE, name, {"champion": 1}, 1, NOW) for name in names),
        tuple(
            AdapterVersion(
                *(PROJECT, BASE, name, 1),
                digest=f"sha256:{number:064x}",
                base_model_digest=f"sha256:{1:064x}",
                dataset_digest=f"sha256:{2:064x}",
                job_id=job_id(number),
                rank=8,
                size_bytes=9_824_423,
                mlflow_run_id=f"{number:032x}",
                create_time=NOW,
                metrics=METRICS,
            )
            for number, name in enumerate(names)
        ),
    )


def job_id(number: int) -> str:
    """As long as real ones."""
    return f"ft-{number:012d}"


async def insert_jobs(database: Database, count: int, state: JobState, base: str = BASE, dataset: str = "ds-1") -> None:
    """Rows as `create_job` leaves them, in another state; a second apart."""
    spec = to_json(JobSpec(base, dataset))
    begin = datetime.now(UTC) - timedelta(seconds=count)
    rows: list[dict[str, Any]] = [
        {
            "id": job_id(number),
            "project": PROJECT,
            "spec": spec,
            "training_dataset": dataset,
            "state": state.value,
            "create_time": begin + timedelta(seconds=number),
            "update_time": begin + timedelta(seconds=number),
            "attempt": 1,
            "resolved": [],
            "metrics": {},
            "progress": asdict(PROGRESS),
            "cancel_requested": False,
            "pause_requested": False,
            "last_sequence": 0,
        }
        for number in range(count)
    ]
    async with database.write() as connection:
        await connection.execute(insert(jobs), rows)
    await _analyze(database)


async def _analyze(database: Database) -> None:
    # As PostgreSQL's autovacuum does by itself within a minute; a benchmark does not wait for that.
    if not database.is_sqlite:
        async with database.write() as connection:
            await connection.execute(text("ANALYZE"))


async def stored_bytes(database: Database) -> int:
    """What all tables and their indices take: pages in use of SQLite, relations of PostgreSQL."""
    if database.is_sqlite:
        query = (
            "SELECT (page_count - freelist_count) * page_size "
            "FROM pragma_page_count, pragma_freelist_count, pragma_page_size"
        )
    else:
        query = (
            "SELECT sum(pg_total_relation_size(oid)) FROM pg_class "
            "WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
        )
    async with database.read() as connection:
        return int((await connection.execute(text(query))).scalar_one())


__all__ = ["databases", "insert_jobs", "measure", "registry_of", "stored_bytes"]
