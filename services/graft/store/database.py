"""The connection: engine set-up for SQLite and PostgreSQL, transactions, the clock, and page tokens."""

import asyncio
import base64
import binascii
import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from copy import copy
from datetime import UTC, datetime
from functools import partial
from typing import Any

import aiosqlite
from sqlalchemy import (
    URL,
    BigInteger,
    Connection,
    Select,
    Table,
    event,
    func,
    literal,
    make_url,
    select,
    text,
    tuple_,
)
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, OperationalError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from graft.domain.deployments import Deployment
from graft.domain.errors import Aborted, FieldViolation, InvalidArgument, ResourceExhausted, Unavailable
from graft.domain.resources import Adapter, AdapterVersion
from graft.store.protocol import Listed, Page
from graft.store.tables import leads, to_micros

BUSY_TIMEOUT_MS = 10_000
"""How long an SQLite writer waits for another; our transactions take milliseconds."""
CONNECT_TIMEOUT_SECONDS = 5
"""psycopg's own is 130, longer than any caller waits."""
LINK = {
    "connect_timeout": CONNECT_TIMEOUT_SECONDS,
    # A server whose cable is pulled says nothing. Linux would send a statement again for a quarter of an hour, and wait
    # two hours before it asks whether anybody is there to answer; leases, which last 15 s, would all be lost.
    "tcp_user_timeout": 10_000,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
}
"""Of every connection to PostgreSQL: a cut link is an error after eleven seconds at most."""
CLOSE_SECONDS = 5.0
"""How long a stop waits for transactions: ours take milliseconds, but one may wait for a server that is gone."""
DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
MAX_TOKEN_CHARACTERS = 512
"""Ours have 120 at most; a longer one is not parsed, since JSON nested deeply enough overflows the stack."""
MAX_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 50


class Database:
    """One engine. Raises Unavailable when the database does not answer."""

    def __init__(self, url: str) -> None:
        self.engine = _engine(parse_url(url))
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        self._under_way = _UnderWay()
        self._leader: str | None = None

    def led_by(self, owner: str) -> "Database":
        """The same connections, for one that writes what only the leader may as long as `owner` leads."""
        led = copy(self)
        led._leader = owner
        return led

    async def close(self) -> None:
        """Closes every connection, once the transactions that are under way have ended or CLOSE_SECONDS have passed."""
        # A server that stops cancels its calls and does not wait for them. What they give back to a pool that has been
        # disposed of would stay open, on SQLite with its thread.
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._under_way.none.wait()
        await self.engine.dispose()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that only reads."""
        with self._under_way, _translated():
            async with self.engine.connect() as connection:
                # Of several statements, each must see what the first saw: an alias and then the version it names.
                # SQLite's transactions do so anyway.
                options: dict[str, Any] = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
                yield await connection.execution_options(graft_read=True, **options)

    @asynccontextmanager
    async def write(self, *, leading: bool = False) -> AsyncIterator[AsyncConnection]:
        """A transaction that commits on a normal exit. On SQLite it holds the write lock from the start.

        `leading`: of what only the leader writes. Raises Aborted where this database is `led_by` one that leads no
        more: its process was held up, and what it knows is old.
        """
        with self._under_way, _translated():
            async with self.engine.begin() as connection:
                if leading and self._leader is not None:
                    # Not locked: who is held up within the transaction would keep the next from taking the lead.
                    owner = (await connection.execute(select(leads.c.owner))).scalar_one()
                    if owner != self._leader:
                        raise Aborted(f"{self._leader!r} does not lead any more.", reason="LEAD_LOST")
                yield connection

    async def lock(self, connection: AsyncConnection, table: Table) -> None:
        """Keeps other callers of this method, not readers, out until the transaction ends."""
        # Without it, two that replace a table at once both delete the old rows and then collide on the new ones.
        if not self.is_sqlite:
            await connection.execute(text(f"LOCK TABLE {table.name} IN SHARE ROW EXCLUSIVE MODE"))

    async def now(self, connection: AsyncConnection) -> datetime:
        """The database's clock. SQLite has one host, whose clock it is; PostgreSQL is asked."""
        if self.is_sqlite:
            return datetime.now(UTC)
        found: datetime = (await connection.execute(select(func.clock_timestamp()))).scalar_one()
        return found.astimezone(UTC)


class _UnderWay:
    """The transactions that have not ended."""

    def __init__(self) -> None:
        self._count = 0
        self.none = asyncio.Event()
        self.none.set()

    def __enter__(self) -> None:
        self._count += 1
        self.none.clear()

    def __exit__(self, *_: object) -> None:
        self._count -= 1
        if not self._count:
            self.none.set()


class _NotJson(ValueError):
    """A value that JSON has no text for: a NaN, an infinity."""


def _to_json(value: object) -> str:
    # The same on both databases: PostgreSQL's JSON has no NaN, so SQLite's must not either.
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise _NotJson(str(error)) from error


class _translated:
    """Turns a database's failures into the domain's errors. Integrity errors and defects pass as they are."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        unstorable = (DataError, UnicodeEncodeError, OverflowError, _NotJson)
        if isinstance(error, unstorable) or (isinstance(error, StatementError) and isinstance(error.orig, unstorable)):
            raise InvalidArgument(
                "A value cannot be stored: text must be Unicode without NUL, numbers finite and of 64 bits at most.",
                reason="UNSTORABLE_VALUE",
            ) from error
        if isinstance(error, OperationalError) and _is_full(error.orig):
            raise ResourceExhausted(
                "The database's disk is full. Free space on it, then try again.", reason="DISK_FULL"
            ) from error
        if isinstance(error, PoolTimeoutError) or (isinstance(error, DBAPIError) and _is_lost(error)):
            raise Unavailable(
                "The database does not answer. Try again; if it lasts, check GRAFT_STORE_URL and the database's log.",
                reason="STORE_UNAVAILABLE",
                retry_after_seconds=1.0,
            ) from error


def _is_full(error: BaseException | None) -> bool:
    # 53100 is PostgreSQL's disk_full.
    return getattr(error, "sqlite_errorname", None) == "SQLITE_FULL" or getattr(error, "sqlstate", None) == "53100"


def _is_lost(error: DBAPIError) -> bool:
    # SQLite tells a missing table, which is a defect of ours, as an operational error too, with its plainest code.
    defect = getattr(error.orig, "sqlite_errorname", None) == "SQLITE_ERROR"
    return error.connection_invalidated or (isinstance(error, OperationalError) and not defect)


def parse_url(url: str) -> URL:
    """The URL with Graft's own driver filled in. Raises InvalidArgument for any other database."""
    expected = "GRAFT_STORE_URL must be sqlite+aiosqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE"
    try:
        parsed = make_url(url)
    except ArgumentError:  # its text and the URL may hold a password
        raise InvalidArgument(f"{expected}; it is no URL.", reason="INVALID_SETTINGS") from None
    backend = parsed.get_backend_name()
    if backend not in DRIVERS:
        raise InvalidArgument(f"{expected}, not {backend}.", reason="INVALID_SETTINGS")
    if backend == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise InvalidArgument(
            f"{expected}; a database in memory would end with its connection.", reason="INVALID_SETTINGS"
        )
    return parsed.set(drivername=DRIVERS[backend])


def link_arguments(url: URL) -> dict[str, Any]:
    """What a driver is told of the link to its server; nothing for SQLite, which has none."""
    return {} if url.get_backend_name() == "sqlite" else dict(LINK)


class _SQLite(aiosqlite.Connection):
    """Ends its thread once. SQLAlchemy ends the connection of a cancelled caller by force while it is being closed, and
    the close would then ask a thread that has gone to end, and wait for good: the process could not be ended."""

    _ending = False

    def stop(self) -> asyncio.Future[Any] | None:
        if self._ending:
            return None
        self._ending = True
        return super().stop()


def connect_sqlite(database: str, **options: Any) -> aiosqlite.Connection:
    """A connection that is not open yet, as `aiosqlite.connect`."""
    connection = _SQLite(partial(sqlite3.connect, database, **options), iter_chunk_size=64)
    thread = connection._thread
    thread.daemon = True  # as SQLAlchemy does for those that it makes
    work = thread.run

    def until_nobody_listens() -> None:
        with suppress(RuntimeError):  # the loop is closed: whoever was cancelled does not wait for the answer
            work()

    thread.run = until_nobody_listens  # type: ignore[method-assign]
    return connection


def _engine(url: URL) -> AsyncEngine:
    if url.get_backend_name() != "sqlite":
        return create_async_engine(
            url,
            json_serializer=_to_json,
            pool_pre_ping=True,
            pool_size=10,
            max_overflow=10,
            connect_args=link_arguments(url),
        )
    engine = create_async_engine(url, json_serializer=_to_json, connect_args={"async_creator_fn": connect_sqlite})

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

    @event.listens_for(engine.sync_engine, "invalidate")
    def roll_back(connection: Any, _record: object, _error: BaseException | None) -> None:
        # A caller was cancelled inside a transaction. To close is not enough: SQLite keeps the connection, and with it
        # the write lock, while a SELECT of it is unfinished: as long as Python holds the cancelled task's frames.
        connection.rollback()

    return engine


async def ping(database: Database) -> None:
    """Raises Unavailable when the database does not answer."""
    async with database.read() as connection:
        await connection.execute(text("SELECT 1"))


def _encode(values: list[Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(values).encode()).decode().rstrip("=")


def token_after(item: Listed) -> str:
    """The token of the page that begins behind this item of its list."""
    match item:
        case Adapter():
            return _encode([item.base_model, item.adapter])
        case AdapterVersion():
            return _encode([item.version])
        case Deployment():
            return _encode([item.base_model])
    return _encode([to_micros(item.create_time), item.id])


def _decode(token: str, types: tuple[type, ...]) -> list[Any]:
    values = None
    if len(token) <= MAX_TOKEN_CHARACTERS:
        with suppress(binascii.Error, ValueError):
            values = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    if not isinstance(values, list) or len(values) != len(types) or not all(map(_is_key, values, types)):
        description = "is not a token that this list returned; leave it empty for the first page"
        raise InvalidArgument(
            f"page_token {description}.",
            reason="INVALID_PAGE_TOKEN",
            violations=(FieldViolation("page_token", description),),
        )
    return values


def _is_key(value: object, kind: type) -> bool:
    if kind is str:
        return isinstance(value, str) and value.isascii() and value.isprintable()
    return type(value) is int and 0 <= value < 2**63


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
