"""Checks of data sets: the gateway asks for one, the orchestrator writes what it found."""

from dataclasses import asdict

from sqlalchemy import delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from graft.domain.errors import NotFound
from graft.domain.jobs import JobError
from graft.domain.reports import DatasetReport
from graft.domain.stored import to_json
from graft.store import convert
from graft.store.database import Database
from graft.store.protocol import DatasetCheck
from graft.store.tables import dataset_checks


class CheckStore:
    """The part of the store that keeps checks. Their ids name what is asked, so that a question is answered once."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def request_dataset_check(self, check: DatasetCheck) -> DatasetCheck:
        """Stores a check to be made; one of this id that is there is returned as it is, unless it failed."""
        failed = dataset_checks.c.id == check.id, dataset_checks.c.error.is_not(None)
        try:
            async with self._database.write() as connection:
                now = await self._database.now(connection)
                await connection.execute(delete(dataset_checks).where(*failed))
                await connection.execute(insert(dataset_checks).values(**asdict(check), create_time=now))
        except IntegrityError:
            return await self.get_dataset_check(check.id)
        return check

    async def get_dataset_check(self, check_id: str) -> DatasetCheck:
        """Raises NotFound."""
        async with self._database.read() as connection:
            query = select(dataset_checks).where(dataset_checks.c.id == check_id)
            row = (await connection.execute(query)).mappings().one_or_none()
        if row is None:
            raise NotFound(f"Data set check {check_id!r} does not exist.", reason="DATASET_CHECK_NOT_FOUND")
        return convert.dataset_check(row)

    async def pending_dataset_checks(self) -> tuple[DatasetCheck, ...]:
        """Oldest first."""
        query = select(dataset_checks).where(dataset_checks.c.done.is_(False))
        ordered = query.order_by(dataset_checks.c.create_time, dataset_checks.c.id)
        async with self._database.read() as connection:
            rows = (await connection.execute(ordered)).mappings()
            return tuple(convert.dataset_check(row) for row in rows)

    async def finish_dataset_check(self, check_id: str, report: DatasetReport | None, error: JobError | None) -> None:
        """Writes what a check found, or why it could not be made; of two that made it, the first."""
        values = {
            "done": True,
            "report": to_json(report),
            "error": to_json(error),
        }
        async with self._database.write(leading=True) as connection:
            pending = update(dataset_checks).where(dataset_checks.c.id == check_id, dataset_checks.c.done.is_(False))
            await connection.execute(pending.values(values))
