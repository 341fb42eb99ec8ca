"""API keys. Only the SHA-256 of a secret is stored."""

from sqlalchemy import insert, select

from graft.store.database import Database
from graft.store.tables import api_keys


class KeyStore:
    """The part of the store that keeps API keys."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add_key(self, key_hash: str, project: str, label: str) -> None:
        """Stores a key by the SHA-256 of its secret, in hex."""
        async with self._database.write() as connection:
            now = await self._database.now(connection)
            values = {"key_hash": key_hash, "project": project, "label": label, "create_time": now}
            await connection.execute(insert(api_keys).values(values))

    async def find_key(self, key_hash: str) -> str | None:
        """The key's project, or None."""
        async with self._database.read() as connection:
            query = select(api_keys.c.project).where(api_keys.c.key_hash == key_hash)
            return (await connection.execute(query)).scalar_one_or_none()

    async def has_keys(self) -> bool:
        """True when at least one key is stored."""
        async with self._database.read() as connection:
            return (await connection.execute(select(api_keys.c.key_hash).limit(1))).first() is not None
