"""Connections to SQLite, which have a thread each."""

import asyncio
from pathlib import Path

from graft.store.database import connect_sqlite


async def test_a_connection_that_is_ended_by_force_while_it_is_closed_is_closed(tmp_path: Path) -> None:
    connection = await connect_sqlite(str(tmp_path / "graft.db"))
    closing = asyncio.create_task(connection.close())
    await asyncio.sleep(0)  # the thread has been asked to close
    connection.stop()
    async with asyncio.timeout(10):
        await closing
