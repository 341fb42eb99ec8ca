"""Data sets: created and deleted by the gateway, never changed."""

from dataclasses import asdict

from sqlalchemy import delete, insert, or_, select, union_all
from sqlalchemy.exc import IntegrityError

from graft.domain.errors import FailedPrecondition, unknown
from graft.domain.evaluations import ENDED
from graft.domain.jobs import FINAL
from graft.domain.resources import Dataset
from graft.store import convert
from graft.store.database import Database, newest_first
from graft.store.protocol import Page
from graft.store.tables import datasets, evaluations, jobs


class DatasetStore:
    """The part of the store that keeps data sets."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create_dataset(self, dataset: Dataset, request_id: str | None) -> Dataset:
        """Stores a row; with a `request_id` seen before in the project, returns the first one's data set."""
        while True:
            try:
                async with self._database.write() as connection:
                    await connection.execute(insert(datasets).values(**asdict(dataset), request_id=request_id))
                return dataset
            except IntegrityError:
                if request_id is None or await self._has(dataset.id):
                    raise
            if first := await self.find_dataset_by_request(dataset.project, request_id):
                return first
            # It has been deleted since the insert.

    async def _has(self, dataset_id: str) -> bool:
        async with self._database.read() as connection:
            found = await connection.execute(select(datasets.c.id).where(datasets.c.id == dataset_id))
            return found.first() is not None

    async def find_dataset_by_request(self, project: str, request_id: str) -> Dataset | None:
        """The data set that this request made, or None."""
        query = select(datasets).where(datasets.c.project == project, datasets.c.request_id == request_id)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).mappings().one_or_none()
        return None if row is None else convert.dataset(row)

    async def get_dataset(self, project: str, dataset_id: str) -> Dataset:
        """Raises NotFound naming it and what exists."""
        query = select(datasets).where(datasets.c.project == project, datasets.c.id == dataset_id)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).mappings().one_or_none()
            if row is not None:
                return convert.dataset(row)
            newest = select(datasets.c.id).where(datasets.c.project == project).order_by(datasets.c.create_time.desc())
            existing = (await connection.execute(newest.limit(20))).scalars().all()
        raise unknown("data set", dataset_id, list(existing))

    async def list_datasets(self, project: str, page_size: int, page_token: str) -> Page[Dataset]:
        """Newest first. Raises InvalidArgument for a bad token."""
        query = select(datasets).where(datasets.c.project == project)
        async with self._database.read() as connection:
            page = await newest_first(connection, datasets, query, page_size, page_token)
        return Page(tuple(convert.dataset(row) for row in page.items), page.next_page_token)

    async def delete_dataset(self, project: str, dataset_id: str) -> Dataset:
        """Raises NotFound, or FailedPrecondition while a job or an evaluation that has not ended uses it."""
        dataset = await self.get_dataset(project, dataset_id)
        learning = select(jobs.c.id).where(
            jobs.c.project == project,
            or_(jobs.c.training_dataset == dataset_id, jobs.c.validation_dataset == dataset_id),
            jobs.c.state.not_in([state.value for state in FINAL]),
        )
        asking = select(evaluations.c.id).where(
            evaluations.c.project == project,
            or_(*(evaluations.c.spec[name].as_string() == dataset_id for name in ("dataset", "shots_dataset"))),
            evaluations.c.state.not_in([state.value for state in ENDED]),
        )
        async with self._database.write() as connection:
            users = (await connection.execute(union_all(learning, asking))).scalars().all()
            if users:
                raise FailedPrecondition(
                    f"Data set {dataset_id!r} is used by {', '.join(users)}. Cancel these or wait for their end.",
                    reason="DATASET_IN_USE",
                    metadata={"users": ", ".join(users)},
                )
            await connection.execute(delete(datasets).where(datasets.c.id == dataset_id))
        return dataset
