"""Databases for integration tests: each test that asks for `url` or `store` runs on SQLite and on PostgreSQL.

And the times that tests of cut links note: shown at the end, for docs/clusters.md, and never asserted.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest
from sqlalchemy import create_engine, make_url, text

from graft.store.sql import SqlStore, migrate, open_store
from tests.support.postgres import postgres_server

HEALING = "healing"


class Note(Protocol):
    """Keeps a row: what was cut, when an error came and which, and how long after the mending the next answer."""

    def __call__(self, what: str, *, error_seconds: float | None, told: str, heal_seconds: float) -> None:
        """`error_seconds` is None where nobody was told anything but to wait."""


@pytest.fixture
def note(record_property: Callable[[str, object], None]) -> Note:
    def keep(what: str, *, error_seconds: float | None, told: str, heal_seconds: float) -> None:
        error = "–" if error_seconds is None else f"{error_seconds:.0f} s"
        record_property(HEALING, f"| {what} | {error} | {told} | {heal_seconds:.0f} s |")

    return keep


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table, if a test that passed has noted anything."""
    passed = terminalreporter.getreports("passed")
    rows = [
        row for report in passed if report.when == "call" for name, row in report.user_properties if name == HEALING
    ]
    if rows:
        terminalreporter.section("Time to heal")
        terminalreporter.write_line("| cut | error after | told as | answered, after the mending |")
        terminalreporter.write_line("|---|---|---|---|")
        for row in rows:
            terminalreporter.write_line(str(row))


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
    server = make_url(request.getfixturevalue("postgres"))
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
