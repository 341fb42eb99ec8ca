"""Connections to SQLite, which have a thread each."""

import asyncio
import threading
from pathlib import Path

import pytest
from sqlalchemy import text

from graft.store.database import Database, connect_sqlite
from tests.support.gateways import eventually


async def test_a_connection_that_is_ended_by_force_while_it_is_closed_is_closed(tmp_path: Path) -> None:
    connection = await connect_sqlite(str(tmp_path / "graft.db"))
    closing = asyncio.create_task(connection.close())
    await asyncio.sleep(0)  # the thread has been asked to close
    connection.stop()
    async with asyncio.timeout(10):
        await closing


def test_a_connection_that_answers_when_its_loop_has_closed_ends_without_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[object] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    asked, answer = threading.Event(), threading.Event()

    def slow() -> int:
        asked.set()
        return int(answer.wait(20))

    async def leave_a_statement_behind() -> threading.Thread:
        connection = await connect_sqlite(str(tmp_path / "graft.db"))
        await connection.create_function("slow", 0, slow)
        asking = asyncio.ensure_future(connection.execute("SELECT slow()"))
        await asyncio.to_thread(asked.wait, 20)
        asking.cancel()
        connection.stop()
        return connection._thread

    thread = asyncio.run(leave_a_statement_behind())
    answer.set()
    thread.join(20)
    assert not thread.is_alive()
    assert told == []


async def test_a_database_is_closed_once_callers_who_were_cancelled_have_given_their_connections_back(
    tmp_path: Path,
) -> None:
    async def ask() -> None:
        async with database.read() as connection:
            await connection.execute(text("SELECT 1"))
            asked.set()
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0.2)  # as a statement that takes long to be ended

    before = set(threading.enumerate())
    database, asked = Database(f"sqlite:///{tmp_path / 'graft.db'}"), asyncio.Event()
    asking = asyncio.create_task(ask())
    await asked.wait()
    asking.cancel()
    await database.close()
    assert asking.done()
    await eventually(lambda: set(threading.enumerate()) <= before)
