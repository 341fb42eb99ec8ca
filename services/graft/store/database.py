"""The connection: engine set-up for SQLite and PostgreSQL, transactions, the clock, and page tokens."""

import base64
import binascii
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import BigInteger, Connection, Select, Table, event, func, literal, select, text, tuple_
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from graft.domain.errors import FieldViolation, InvalidArgument, Unavailable
from graft.store.protocol import Page
from graft.store.tables import to_micros

BUSY_TIMEOUT_MS = 10_000
"""How long an SQLite writer waits for another; our transactions take milliseconds."""
MAX_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 50


class Database:
    """One engine. Raises Unavailable when the database does not answer."""

    def __init__(self, url: str) -> None:
        self.engine = _engine(url)
        self.is_sqlite = self.engine.dialect.name == "sqlite"

    async def close(self) -> None:
        """Closes every connection."""
        await self.engine.dispose()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that only reads."""
        with _translated():
            async with self.engine.connect() as connection:
                yield await connection.execution_options(graft_read=True)

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that commits on a normal exit. On SQLite it holds the write lock from the start."""
        with _translated():
            async with self.engine.begin() as connection:
                yield connection

    async def now(self, connection: AsyncConnection) -> datetime:
        """The database's clock. SQLite has one host, whose clock it is; PostgreSQL is asked."""
        if self.is_sqlite:
            return datetime.now(UTC)
        found: datetime = (await connection.execute(select(func.clock_timestamp()))).scalar_one()
        return found.astimezone(UTC)


class _translated:
    """Turns a lost database into Unavailable; integrity errors pass, since callers know what they mean."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        lost = isinstance(error, OperationalError) or (isinstance(error, DBAPIError) and error.connection_invalidated)
        if lost:
            raise Unavailable(
                "The database does not answer. Try again; if it lasts, check GRAFT_STORE_URL and the database's log.",
                reason="STORE_UNAVAILABLE",
                retry_after_seconds=1.0,
            ) from error


def _engine(url: str) -> AsyncEngine:
    if not url.startswith("sqlite"):
        return create_async_engine(url, pool_pre_ping=True, pool_size=10, max_overflow=10)
    engine = create_async_engine(url)

    @event.listens_for(engine.sync_engine, "connect")
    def configure(connection: Any, _record: object) -> None:
        # The driver must not begin transactions by itself: `begin` below does.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        cursor.execute("PRAGMA journal_mode=WAL")
        # NORMAL is durable against a crash of the process and consistent against one of the machine (sqlite.org/wal).
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Connection) -> None:
        # IMMEDIATE, because a transaction that reads first and writes later can lose the lock to another writer and
        # fail without waiting (SQLITE_BUSY_SNAPSHOT).
        read = connection.get_execution_options().get("graft_read", False)
        connection.exec_driver_sql("BEGIN" if read else "BEGIN IMMEDIATE")

    return engine


async def ping(database: Database) -> None:
    """Raises Unavailable when the database does not answer."""
    async with database.read() as connection:
        await connection.execute(text("SELECT 1"))


def _encode(values: list[Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(values).encode()).decode().rstrip("=")


def _decode(token: str, types: tuple[type, ...]) -> list[Any]:
    try:
        values = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    except (binascii.Error, ValueError):
        values = None
    if not isinstance(values, list) or [type(value) for value in values] != list(types):
        description = "is not a token that this list returned; leave it empty for the first page"
        raise InvalidArgument(
            f"page_token {description}.",
            reason="INVALID_PAGE_TOKEN",
            violations=(FieldViolation("page_token", description),),
        )
    return values


async def newest_first(
    connection: AsyncConnection, table: Table, query: Select[Any], page_size: int, page_token: str
) -> Page[Any]:
    """A page of `query` over a table with `create_time` and `id`, by keyset: rows added meanwhile shift nothing."""
    size = min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    query = query.order_by(table.c.create_time.desc(), table.c.id.desc()).limit(size + 1)
    if page_token:
        micros, last_id = _decode(page_token, (int, str))
        # The bound value needs the column's stored type: SQLite would compare an integer with text without a word.
        last = tuple_(literal(micros, BigInteger), literal(last_id))
        query = query.where(tuple_(table.c.create_time, table.c.id) < last)
    rows = (await connection.execute(query)).mappings().all()
    if len(rows) <= size:
        return Page(tuple(rows))
    final = rows[size - 1]
    return Page(tuple(rows[:size]), _encode([to_micros(final["create_time"]), final["id"]]))


async def by_key(
    connection: AsyncConnection, query: Select[Any], keys: list[Any], page_size: int, page_token: str, *, down: bool
) -> Page[Any]:
    """A page of `query` in the order of the key columns `keys` (all str, or one int), descending if `down`."""
    size = min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    query = query.order_by(*((key.desc() if down else key.asc()) for key in keys)).limit(size + 1)
    if page_token:
        last = tuple_(*_decode(page_token, tuple(key.type.python_type for key in keys)))
        query = query.where(tuple_(*keys) < last if down else tuple_(*keys) > last)
    rows = (await connection.execute(query)).mappings().all()
    if len(rows) <= size:
        return Page(tuple(rows))
    return Page(tuple(rows[:size]), _encode([rows[size - 1][key.name] for key in keys]))
