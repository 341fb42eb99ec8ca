"""Jobs, their events and checkpoints: created by the gateway, moved only by the orchestrator that holds the lease."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from graft.domain.errors import Aborted, FailedPrecondition, unknown
from graft.domain.jobs import (
    FINAL,
    LIVE,
    Checkpoint,
    Event,
    EventLevel,
    Job,
    JobError,
    JobSpec,
    JobState,
    Progress,
    Resolved,
    check_transition,
)
from graft.store import convert
from graft.store.database import Database, newest_first
from graft.store.protocol import Page
from graft.store.tables import checkpoints, events, jobs


class JobStore:
    """The part of the store that keeps jobs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create_job(self, project: str, job_id: str, spec: JobSpec, request_id: str | None) -> Job:
        """Stores a job in VALIDATING with its first event; a repeated `request_id` returns the first one's job."""
        try:
            async with self._database.write() as connection:
                now = await self._database.now(connection)
                await connection.execute(
                    insert(jobs).values(
                        id=job_id,
                        project=project,
                        spec=convert.spec_to_json(spec),
                        training_dataset=spec.training_dataset,
                        validation_dataset=spec.validation_dataset,
                        state=JobState.VALIDATING.value,
                        create_time=now,
                        update_time=now,
                        attempt=1,
                        resolved=[],
                        metrics={},
                        cancel_requested=False,
                        pause_requested=False,
                        last_sequence=0,
                        request_id=request_id,
                    )
                )
                await _append(connection, job_id, now, (EventLevel.INFO, "state", "Job created.", _state("VALIDATING")))
        except IntegrityError:
            first = await self._find_by_request(project, request_id) if request_id else None
            if first is None:
                raise
            return first
        return await self.get_job(project, job_id)

    async def _find_by_request(self, project: str, request_id: str) -> Job | None:
        query = select(jobs).where(jobs.c.project == project, jobs.c.request_id == request_id)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).mappings().one_or_none()
        return None if row is None else convert.job(row)

    async def get_job(self, project: str, job_id: str) -> Job:
        """Raises NotFound naming it and what exists."""
        async with self._database.read() as connection:
            return await _get(connection, project, job_id)

    async def list_jobs(self, project: str, page_size: int, page_token: str) -> Page[Job]:
        """Newest first. Raises InvalidArgument for a bad token."""
        async with self._database.read() as connection:
            query = select(jobs).where(jobs.c.project == project)
            page = await newest_first(connection, jobs, query, page_size, page_token)
        return Page(tuple(convert.job(row) for row in page.items), page.next_page_token)

    async def request_cancel(self, project: str, job_id: str) -> Job:
        """Idempotent. Raises FailedPrecondition when the job has already SUCCEEDED or FAILED."""
        async with self._database.write() as connection:
            job = await _get(connection, project, job_id, lock=True)
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
                await _append(connection, job_id, now, (EventLevel.INFO, "message", "Cancellation requested.", {}))
            return await _get(connection, project, job_id)

    async def list_events(self, project: str, job_id: str, after_sequence: int, limit: int) -> tuple[Event, ...]:
        """Events with a higher sequence, in order. Raises NotFound for an unknown job."""
        query = (
            select(events)
            .join(jobs)
            .where(jobs.c.project == project, events.c.job_id == job_id, events.c.sequence > after_sequence)
            .order_by(events.c.sequence)
            .limit(limit)
        )
        async with self._database.read() as connection:
            rows = (await connection.execute(query)).mappings().all()
            if not rows:
                await _get(connection, project, job_id)
        return tuple(convert.event(row) for row in rows)

    async def list_checkpoints(self, project: str, job_id: str) -> tuple[Checkpoint, ...]:
        """In order of attempt and step. Raises NotFound for an unknown job."""
        query = (
            select(checkpoints)
            .join(jobs)
            .where(jobs.c.project == project, checkpoints.c.job_id == job_id)
            .order_by(checkpoints.c.attempt, checkpoints.c.step)
        )
        async with self._database.read() as connection:
            rows = (await connection.execute(query)).mappings().all()
            if not rows:
                await _get(connection, project, job_id)
        return tuple(convert.checkpoint(row) for row in rows)

    async def claim_jobs(self, owner: str, lease: timedelta, limit: int) -> tuple[Job, ...]:
        """Takes up to `limit` live jobs whose lease is free or has run out, oldest first. Never one job twice."""
        async with self._database.write() as connection:
            now = await self._database.now(connection)
            free = (
                select(jobs.c.id)
                .where(
                    jobs.c.state.in_([state.value for state in LIVE]),
                    or_(jobs.c.lease_owner.is_(None), jobs.c.lease_expire_time < now),
                )
                .order_by(jobs.c.create_time, jobs.c.id)
                .limit(limit)
                .with_for_update(skip_locked=True)  # SQLite leaves it out: its writer is alone anyway
            )
            ids = list((await connection.execute(free)).scalars().all())
            if not ids:
                return ()
            taken = update(jobs).where(jobs.c.id.in_(ids)).values(lease_owner=owner, lease_expire_time=now + lease)
            await connection.execute(taken)
            query = select(jobs).where(jobs.c.id.in_(ids)).order_by(jobs.c.create_time, jobs.c.id)
            return tuple(convert.job(row) for row in (await connection.execute(query)).mappings())

    async def renew_leases(self, owner: str, lease: timedelta) -> frozenset[str]:
        """Extends every lease of `owner`; returns the ids still held."""
        async with self._database.write() as connection:
            now = await self._database.now(connection)
            mine = jobs.c.lease_owner == owner
            await connection.execute(update(jobs).where(mine).values(lease_expire_time=now + lease))
            return frozenset((await connection.execute(select(jobs.c.id).where(mine))).scalars())

    async def release_leases(self, owner: str) -> None:
        """Frees every lease of `owner` at once, for the next owner to take."""
        async with self._database.write() as connection:
            freed = {"lease_owner": None, "lease_expire_time": None}
            await connection.execute(update(jobs).where(jobs.c.lease_owner == owner).values(freed))

    async def leased_jobs(self, owner: str) -> tuple[Job, ...]:
        """The jobs that `owner` holds, oldest first."""
        query = select(jobs).where(jobs.c.lease_owner == owner).order_by(jobs.c.create_time, jobs.c.id)
        async with self._database.read() as connection:
            return tuple(convert.job(row) for row in (await connection.execute(query)).mappings())

    async def transition(
        self,
        job: Job,
        owner: str,
        state: JobState,
        *,
        message: str,
        error: JobError | None = None,
        fine_tuned_model: str | None = None,
        next_attempt: bool = False,
    ) -> Job:
        """Moves the job and writes a `state` event in one transaction; an end also frees the lease.

        Raises Aborted when `owner` does not hold the lease or the attempt is over, FailedPrecondition for an illegal
        move.
        """
        async with self._database.write() as connection:
            current = await _fenced(connection, job, owner)
            check_transition(current.state, state)
            now = await self._database.now(connection)
            values: dict[str, Any] = {"state": state.value, "update_time": now}
            if state is JobState.RUNNING and current.start_time is None:
                values["start_time"] = now
            if state in FINAL:
                values |= {"end_time": now, "lease_owner": None, "lease_expire_time": None}
            if error is not None:
                values["error"] = asdict(error)
            if fine_tuned_model is not None:
                values["fine_tuned_model"] = fine_tuned_model
            if next_attempt:
                values |= {"attempt": current.attempt + 1, "progress": None}
            await connection.execute(update(jobs).where(jobs.c.id == job.id).values(values))
            data = _state(state.value) | ({"error": asdict(error)} if error else {})
            level = EventLevel.ERROR if state is JobState.FAILED else EventLevel.INFO
            await _append(connection, job.id, now, (level, "state", message, data))
            return await _get(connection, job.project, job.id)

    async def record(
        self,
        job: Job,
        owner: str,
        *,
        progress: Progress | None = None,
        resolved: Sequence[Resolved] | None = None,
        metrics: dict[str, float] | None = None,
        mlflow_run_id: str | None = None,
        checkpoint: Checkpoint | None = None,
        event: tuple[EventLevel, str, str, dict[str, object]] | None = None,
    ) -> Job:
        """Writes what is given (metrics are merged) and an event `(level, type, message, data)` in one transaction.

        Raises Aborted when `owner` does not hold the lease or the attempt is over.
        """
        async with self._database.write() as connection:
            current = await _fenced(connection, job, owner)
            now = await self._database.now(connection)
            values: dict[str, Any] = {"update_time": now}
            if progress is not None:
                values["progress"] = asdict(progress)
            if resolved is not None:
                values["resolved"] = [asdict(item) for item in resolved]
            if metrics is not None:
                values["metrics"] = current.metrics | metrics
            if mlflow_run_id is not None:
                values["mlflow_run_id"] = mlflow_run_id
            await connection.execute(update(jobs).where(jobs.c.id == job.id).values(values))
            if checkpoint is not None:
                await _save_checkpoint(connection, job.id, checkpoint)
            if event is not None:
                await _append(connection, job.id, now, event)
            return await _get(connection, job.project, job.id)


def _state(state: str) -> dict[str, object]:
    return {"state": state}


async def _get(connection: AsyncConnection, project: str, job_id: str, *, lock: bool = False) -> Job:
    query = select(jobs).where(jobs.c.project == project, jobs.c.id == job_id)
    row = (await connection.execute(query.with_for_update() if lock else query)).mappings().one_or_none()
    if row is not None:
        return convert.job(row)
    newest = select(jobs.c.id).where(jobs.c.project == project).order_by(jobs.c.create_time.desc()).limit(20)
    raise unknown("fine tuning job", job_id, list((await connection.execute(newest)).scalars()))


async def _fenced(connection: AsyncConnection, job: Job, owner: str) -> Job:
    current = await _get(connection, job.project, job.id, lock=True)
    if current.lease_owner != owner or current.attempt != job.attempt:
        raise Aborted(
            f"Job {job.id!r}, attempt {job.attempt}, is no longer {owner!r}'s: "
            f"attempt {current.attempt} is {current.lease_owner or 'nobody'}'s.",
            reason="LEASE_LOST" if current.lease_owner != owner else "ATTEMPT_SUPERSEDED",
        )
    return current


async def _append(
    connection: AsyncConnection, job_id: str, now: datetime, entry: tuple[EventLevel, str, str, dict[str, object]]
) -> None:
    level, kind, message, data = entry
    # The counter's row lock orders writers, so that sequences have neither gaps nor twins.
    raised = update(jobs).where(jobs.c.id == job_id).values(last_sequence=jobs.c.last_sequence + 1)
    sequence = (await connection.execute(raised.returning(jobs.c.last_sequence))).scalar_one()
    values = {"sequence": sequence, "level": level.value, "type": kind, "message": message, "data": data}
    await connection.execute(insert(events).values(job_id=job_id, create_time=now, **values))


async def _save_checkpoint(connection: AsyncConnection, job_id: str, checkpoint: Checkpoint) -> None:
    # A report read again after a restart names a checkpoint that is there already.
    same = (
        checkpoints.c.job_id == job_id,
        checkpoints.c.attempt == checkpoint.attempt,
        checkpoints.c.step == checkpoint.step,
    )
    if (await connection.execute(select(checkpoints.c.step).where(*same))).first() is None:
        await connection.execute(insert(checkpoints).values(job_id=job_id, **asdict(checkpoint)))
