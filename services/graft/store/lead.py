"""Which orchestrator leads: a lease of which there is one, taken, held and given back by whoever asks first."""

from datetime import timedelta

from sqlalchemy import or_, update

from graft.store.database import Database
from graft.store.tables import EPOCH, leads


class LeadStore:
    """The part of the store that keeps the lead."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def take_lead(self, owner: str, lease: timedelta) -> bool:
        """Takes the lead, or holds it for so much longer. False while it is another's."""
        async with self._database.write() as connection:
            now = await self._database.now(connection)
            # One statement: of two that find it free, the second waits for the first, and then finds it taken.
            free = update(leads).where(or_(leads.c.owner == owner, leads.c.expire_time < now))
            return (await connection.execute(free.values(owner=owner, expire_time=now + lease))).rowcount == 1

    async def give_lead_back(self, owner: str) -> None:
        """For the next who asks. Does nothing when it is another's by now."""
        async with self._database.write() as connection:
            await connection.execute(update(leads).where(leads.c.owner == owner).values(owner="", expire_time=EPOCH))
