"""Jobs as the gateway sees them: created, read, listed, and asked to stop. `leases.py` has the orchestrator's side."""

from sqlalchemy import insert, select, update
from sqlalchemy.exc import IntegrityError

from graft.domain.errors import FailedPrecondition
from graft.domain.jobs import FINAL, Checkpoint, Event, EventLevel, Job, JobSpec, JobState, Memory
from graft.domain.stored import to_json
from graft.store import convert
from graft.store.database import Database, newest_first
from graft.store.job_rows import append_event, fetch_job, state_data
from graft.store.protocol import Page
from graft.store.tables import checkpoints, events, jobs


class JobStore:
    """The part of the store through which clients make and read jobs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create_job(
        self, project: str, job_id: str, spec: JobSpec, request_id: str | None, memory: Memory | None = None
    ) -> Job:
        """Stores a job in VALIDATING with its first event; a repeated `request_id` returns the first one's job."""
        try:
            async with self._database.write() as connection:
                now = await self._database.now(connection)
                await connection.execute(
                    insert(jobs).values(
                        id=job_id,
                        project=project,
                        spec=to_json(spec),
                        training_dataset=spec.training_dataset,
                        validation_dataset=spec.validation_dataset,
                        state=JobState.VALIDATING.value,
                        create_time=now,
                        update_time=now,
                        attempt=1,
                        memory=to_json(memory),
                        resolved=[],
                        metrics={},
                        cancel_requested=False,
                        pause_requested=False,
                        last_sequence=0,
                        request_id=request_id,
                    )
                )
                await append_event(
                    connection,
                    project,
                    job_id,
                    now,
                    (EventLevel.INFO, "state", "Job created.", state_data("VALIDATING")),
                )
                return await fetch_job(connection, project, job_id)
        except IntegrityError:
            first = await self.find_job_by_request(project, request_id) if request_id else None
            if first is None:
                raise
            return first

    async def find_job_by_request(self, project: str, request_id: str) -> Job | None:
        """The job that this request made, or None."""
        query = select(jobs).where(jobs.c.project == project, jobs.c.request_id == request_id)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).mappings().one_or_none()
        return None if row is None else convert.job(row)

    async def get_job(self, project: str, job_id: str) -> Job:
        """Raises NotFound naming it and what exists."""
        async with self._database.read() as connection:
            return await fetch_job(connection, project, job_id)

    async def list_jobs(self, project: str, page_size: int, page_token: str) -> Page[Job]:
        """Newest first. Raises InvalidArgument for a bad token."""
        async with self._database.read() as connection:
            query = select(jobs).where(jobs.c.project == project)
            page = await newest_first(connection, jobs, query, page_size, page_token)
        return Page(tuple(convert.job(row) for row in page.items), page.next_page_token)

    async def request_cancel(self, project: str, job_id: str) -> Job:
        """Idempotent. Raises FailedPrecondition when the job has already SUCCEEDED or FAILED."""
        async with self._database.write() as connection:
            job = await fetch_job(connection, project, job_id, lock=True)
            if job.state in FINAL and job.state is not JobState.CANCELLED:
                raise FailedPrecondition(
                    f"Job {job_id!r} has already ended: {job.state}.",
                    reason="JOB_ENDED",
                    metadata={"state": job.state.value},
                )
            if not job.cancel_requested and job.state is not JobState.CANCELLED:
                now = await self._database.now(connection)
                values = {"cancel_requested": True, "update_time": now}
                await connection.execute(update(jobs).where(jobs.c.id == job_id).values(values))
                await append_event(
                    connection, project, job_id, now, (EventLevel.INFO, "message", "Cancellation requested.", {})
                )
            return await fetch_job(connection, project, job_id)

    async def list_events(self, project: str, job_id: str, after_sequence: int, limit: int) -> tuple[Event, ...]:
        """Events with a higher sequence, in order. Raises NotFound for an unknown job."""
        query = (
            select(events)
            .where(events.c.project == project, events.c.job_id == job_id, events.c.sequence > after_sequence)
            .order_by(events.c.sequence)
            .limit(limit)
        )
        async with self._database.read() as connection:
            rows = (await connection.execute(query)).mappings().all()
            if not rows:
                await fetch_job(connection, project, job_id)
        return tuple(convert.event(row) for row in rows)

    async def last_sequence(self, project: str, job_id: str) -> int:
        """Of the job's newest event. Raises NotFound for an unknown job."""
        query = select(jobs.c.last_sequence).where(jobs.c.project == project, jobs.c.id == job_id)
        async with self._database.read() as connection:
            found: int | None = (await connection.execute(query)).scalar_one_or_none()
            if found is None:
                await fetch_job(connection, project, job_id)  # raises, naming what exists
        return found or 0

    async def list_checkpoints(self, project: str, job_id: str) -> tuple[Checkpoint, ...]:
        """In order of attempt and step. Raises NotFound for an unknown job."""
        query = (
            select(checkpoints)
            .where(checkpoints.c.project == project, checkpoints.c.job_id == job_id)
            .order_by(checkpoints.c.attempt, checkpoints.c.step)
        )
        async with self._database.read() as connection:
            rows = (await connection.execute(query)).mappings().all()
            if not rows:
                await fetch_job(connection, project, job_id)
        return tuple(convert.checkpoint(row) for row in rows)
