"""Databases for integration tests: each test that asks for `url` or `store` runs on SQLite and on PostgreSQL."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from graft.store.sql import SqlStore, migrate, open_store
from tests.support.healing import note, pytest_terminal_summary
from tests.support.postgres import postgres_server

__all__ = ["note", "pytest_terminal_summary"]


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a server that ends with the session."""
    with postgres_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'graft.db'}"
    return _empty_database(request.getfixturevalue("postgres"))


@pytest.fixture(scope="module")
def empty_postgres(postgres: str) -> str:
    """URL of a database on PostgreSQL that is the module's own."""
    return _empty_database(postgres)


def _empty_database(postgres: str) -> str:
    server = make_url(postgres)
    name = f"t{uuid.uuid4().hex}"
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return server.set(database=name).render_as_string(hide_password=False)


@pytest.fixture
async def store(url: str) -> AsyncIterator[SqlStore]:
    """A migrated store."""
    await asyncio.to_thread(migrate, url)
    opened = open_store(url)
    yield opened
    await opened.close()
