"""Jobs as the orchestrator sees them: taken by lease, moved and written to only by the lease's owner."""

from collections.abc import Collection, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from sqlalchemy import func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from graft.domain.errors import Aborted
from graft.domain.jobs import (
    FINAL,
    LIVE,
    Checkpoint,
    EventLevel,
    Job,
    JobError,
    JobState,
    Progress,
    Resolved,
    check_transition,
)
from graft.domain.stored import to_json
from graft.store import convert
from graft.store.database import Database
from graft.store.job_rows import append_event, fetch_job, state_data
from graft.store.tables import checkpoints, jobs


class LeaseStore:
    """The part of the store through which orchestrators share and move jobs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def claim_jobs(
        self, owner: str, lease: timedelta, limit: int, besides: Collection[str] = ()
    ) -> tuple[Job, ...]:
        """Takes up to `limit` live jobs whose lease is free or has run out, oldest first. Never one job twice; of those
        among `besides` only the ones that are to be cancelled."""
        async with self._database.write() as connection:
            now = await self._database.now(connection)
            free = (
                select(jobs.c.id)
                .where(
                    jobs.c.state.in_([state.value for state in LIVE]),
                    or_(jobs.c.lease_owner.is_(None), jobs.c.lease_expire_time < now),
                    or_(jobs.c.id.not_in(tuple(besides)), jobs.c.cancel_requested),
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

    async def release_leases(self, owner: str, job_id: str | None = None) -> None:
        """Frees every lease of `owner` at once, or that of one job, for the next owner to take."""
        mine = update(jobs).where(jobs.c.lease_owner == owner)
        async with self._database.write() as connection:
            freed = {"lease_owner": None, "lease_expire_time": None}
            await connection.execute((mine if job_id is None else mine.where(jobs.c.id == job_id)).values(freed))

    async def leased_jobs(self, owner: str) -> tuple[Job, ...]:
        """The jobs that `owner` holds, oldest first."""
        query = select(jobs).where(jobs.c.lease_owner == owner).order_by(jobs.c.create_time, jobs.c.id)
        async with self._database.read() as connection:
            return tuple(convert.job(row) for row in (await connection.execute(query)).mappings())

    async def count_jobs(self) -> dict[JobState, int]:
        """Of every project, by state; states without any are missing."""
        query = select(jobs.c.state, func.count()).group_by(jobs.c.state)
        async with self._database.read() as connection:
            return {JobState(state): count for state, count in await connection.execute(query)}

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
                values["error"] = to_json(error)
            if fine_tuned_model is not None:
                values["fine_tuned_model"] = fine_tuned_model
            if next_attempt:
                values |= {"attempt": current.attempt + 1, "progress": None}
            await connection.execute(update(jobs).where(jobs.c.id == job.id).values(values))
            data = state_data(state.value) | ({"error": to_json(error)} if error else {})
            level = EventLevel.ERROR if state is JobState.FAILED else EventLevel.INFO
            await append_event(connection, job.project, job.id, now, (level, "state", message, data))
            return await fetch_job(connection, job.project, job.id)

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
                values["progress"] = to_json(progress)
            if resolved is not None:
                values["resolved"] = to_json(resolved)
            if metrics is not None:
                values["metrics"] = current.metrics | metrics
            if mlflow_run_id is not None:
                values["mlflow_run_id"] = mlflow_run_id
            await connection.execute(update(jobs).where(jobs.c.id == job.id).values(values))
            if checkpoint is not None:
                await _save_checkpoint(connection, job, checkpoint)
            if event is not None:
                await append_event(connection, job.project, job.id, now, event)
            return await fetch_job(connection, job.project, job.id)


async def _fenced(connection: AsyncConnection, job: Job, owner: str) -> Job:
    current = await fetch_job(connection, job.project, job.id, lock=True)
    if current.lease_owner != owner or current.attempt != job.attempt:
        raise Aborted(
            f"Job {job.id!r}, attempt {job.attempt}, is no longer {owner!r}'s: "
            f"attempt {current.attempt} is {current.lease_owner or 'nobody'}'s.",
            reason="LEASE_LOST" if current.lease_owner != owner else "ATTEMPT_SUPERSEDED",
        )
    return current


async def _save_checkpoint(connection: AsyncConnection, job: Job, checkpoint: Checkpoint) -> None:
    # A report read again after a restart names a checkpoint that is there already.
    same = (
        checkpoints.c.job_id == job.id,
        checkpoints.c.attempt == checkpoint.attempt,
        checkpoints.c.step == checkpoint.step,
    )
    if (await connection.execute(select(checkpoints.c.step).where(*same))).first() is None:
        await connection.execute(insert(checkpoints).values(project=job.project, job_id=job.id, **asdict(checkpoint)))
