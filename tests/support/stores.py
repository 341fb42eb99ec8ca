"""Stores for tests: the real one, on a fresh SQLite file."""

import asyncio
from pathlib import Path

from graft.store.sql import SqlStore, migrate, open_store


async def sqlite_store(folder: Path) -> SqlStore:
    """A migrated store in `folder`. The caller closes it."""
    url = f"sqlite+aiosqlite:///{folder / 'graft.db'}"
    await asyncio.to_thread(migrate, url)
    return open_store(url)
