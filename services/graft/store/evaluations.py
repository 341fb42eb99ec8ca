"""Evaluations: created, read and cancelled by the gateway; taken by lease, moved and ended by an orchestrator."""

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Select, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from graft.domain.errors import Aborted, FailedPrecondition, unknown
from graft.domain.evaluations import ENDED, ContestantResult, Evaluation, EvaluationSpec, EvaluationState
from graft.domain.jobs import JobError
from graft.domain.stored import to_json
from graft.store import convert
from graft.store.database import Database, newest_first
from graft.store.protocol import Page
from graft.store.tables import evaluations


class EvaluationStore:
    """The part of the store that keeps evaluations."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create_evaluation(
        self, project: str, evaluation_id: str, spec: EvaluationSpec, request_id: str | None
    ) -> Evaluation:
        """Stores one in QUEUED; a repeated `request_id` returns the first one's evaluation."""
        try:
            async with self._database.write() as connection:
                now = await self._database.now(connection)
                await connection.execute(
                    insert(evaluations).values(
                        id=evaluation_id,
                        project=project,
                        spec=to_json(spec),
                        state=EvaluationState.QUEUED.value,
                        create_time=now,
                        update_time=now,
                        answered_requests=0,
                        total_requests=0,
                        results=[],
                        verdicts=[],
                        cancel_requested=False,
                        request_id=request_id,
                    )
                )
                return await _fetch(connection, project, evaluation_id)
        except IntegrityError:
            first = await self.find_evaluation_by_request(project, request_id) if request_id else None
            if first is None:  # what was violated is not that a request has one evaluation
                raise
            return first

    async def find_evaluation_by_request(self, project: str, request_id: str) -> Evaluation | None:
        """The evaluation that this request made, or None."""
        query = select(evaluations).where(evaluations.c.project == project, evaluations.c.request_id == request_id)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).mappings().one_or_none()
        return None if row is None else convert.evaluation(row)

    async def get_evaluation(self, project: str, evaluation_id: str) -> Evaluation:
        """Raises NotFound naming it and what exists."""
        async with self._database.read() as connection:
            return await _fetch(connection, project, evaluation_id)

    async def list_evaluations(self, project: str, page_size: int, page_token: str) -> Page[Evaluation]:
        """Newest first. Raises InvalidArgument for a bad token."""
        query = select(evaluations).where(evaluations.c.project == project)
        async with self._database.read() as connection:
            page = await newest_first(connection, evaluations, query, page_size, page_token)
        return Page(tuple(convert.evaluation(row) for row in page.items), page.next_page_token)

    async def cancel_evaluation(self, project: str, evaluation_id: str) -> Evaluation:
        """Writes the wish; idempotent. Raises FailedPrecondition when it has SUCCEEDED or FAILED."""
        async with self._database.write() as connection:
            found = await _fetch(connection, project, evaluation_id, lock=True)
            if found.state in ENDED and found.state is not EvaluationState.CANCELLED:
                raise FailedPrecondition(
                    f"Evaluation {evaluation_id!r} has already ended: {found.state}.",
                    reason="EVALUATION_ENDED",
                    metadata={"state": found.state.value},
                )
            now = await self._database.now(connection)
            values = {"cancel_requested": True, "update_time": now}
            await connection.execute(update(evaluations).where(evaluations.c.id == evaluation_id).values(values))
            return await _fetch(connection, project, evaluation_id)

    async def count_evaluations(self) -> dict[EvaluationState, int]:
        """Of every project, by state; states without any are missing."""
        query = select(evaluations.c.state, func.count()).group_by(evaluations.c.state)
        async with self._database.read() as connection:
            return {EvaluationState(state): count for state, count in await connection.execute(query)}

    async def end_cancelled_evaluations(self) -> tuple[str, ...]:
        """Ends those that are to be cancelled and whose lease is free or has run out. Returns their ids."""
        async with self._database.read() as connection:
            wished = _unclaimed(await self._database.now(connection)).where(evaluations.c.cancel_requested)
            if (await connection.execute(wished.limit(1))).first() is None:  # every turn asks, and seldom there is one
                return ()
        async with self._database.write() as connection:
            now = await self._database.now(connection)
            wished = _unclaimed(now).where(evaluations.c.cancel_requested).with_for_update(skip_locked=True)
            ids = tuple(row.id for row in await connection.execute(wished))
            values = {
                "state": EvaluationState.CANCELLED.value,
                "update_time": now,
                "end_time": now,
                "lease_owner": None,
                "lease_expire_time": None,
            }
            await connection.execute(update(evaluations).where(evaluations.c.id.in_(ids)).values(values))
            return ids

    async def claim_evaluation(self, owner: str, lease: timedelta, besides: Collection[str] = ()) -> Evaluation | None:
        """Takes the oldest that has not ended, whose lease is free or has run out and that is not among `besides`, and
        moves it to RUNNING."""
        async with self._database.write() as connection:
            now = await self._database.now(connection)
            others = _unclaimed(now).where(evaluations.c.id.not_in(tuple(besides)))
            free = others.limit(1).with_for_update(skip_locked=True)
            row = (await connection.execute(free)).one_or_none()
            if row is None:
                return None
            values = {
                "state": EvaluationState.RUNNING.value,
                "start_time": row.start_time or now,
                "update_time": now,
                "lease_owner": owner,
                "lease_expire_time": now + lease,
            }
            await connection.execute(update(evaluations).where(evaluations.c.id == row.id).values(values))
            return await _fetch(connection, row.project, row.id)

    async def renew_evaluation(
        self, evaluation: Evaluation, owner: str, lease: timedelta, answered_requests: int, total_requests: int
    ) -> Evaluation:
        """Extends the lease and writes how far it is. Raises Aborted when `owner` does not hold it."""
        async with self._database.write() as connection:
            await _fenced(connection, evaluation, owner)
            now = await self._database.now(connection)
            values = {
                "lease_expire_time": now + lease,
                "update_time": now,
                "answered_requests": answered_requests,
                "total_requests": total_requests,
            }
            await connection.execute(update(evaluations).where(evaluations.c.id == evaluation.id).values(values))
            return await _fetch(connection, evaluation.project, evaluation.id)

    async def release_evaluation(self, evaluation: Evaluation, owner: str) -> None:
        """Frees the lease, for the next owner to go on."""
        async with self._database.write() as connection:
            mine = (evaluations.c.id == evaluation.id) & (evaluations.c.lease_owner == owner)
            freed = {"lease_owner": None, "lease_expire_time": None}
            await connection.execute(update(evaluations).where(mine).values(freed))

    async def end_evaluation(
        self,
        evaluation: Evaluation,
        owner: str,
        state: EvaluationState,
        *,
        error: JobError | None = None,
        results: Sequence[ContestantResult] = (),
        verdicts: Sequence[str] = (),
        mlflow_run_id: str | None = None,
    ) -> Evaluation:
        """Ends it, with what was found. Raises Aborted when `owner` does not hold the lease."""
        async with self._database.write() as connection:
            await _fenced(connection, evaluation, owner)
            now = await self._database.now(connection)
            values: dict[str, Any] = {
                "state": state.value,
                "update_time": now,
                "end_time": now,
                "error": to_json(error),
                "results": to_json(results),
                "verdicts": list(verdicts),
                "mlflow_run_id": mlflow_run_id,
                "lease_owner": None,
                "lease_expire_time": None,
            }
            await connection.execute(update(evaluations).where(evaluations.c.id == evaluation.id).values(values))
            return await _fetch(connection, evaluation.project, evaluation.id)


def _unclaimed(now: datetime) -> Select[tuple[str, str, datetime | None]]:
    """Those that have not ended and whose lease is free or has run out, the oldest first."""
    return (
        select(evaluations.c.project, evaluations.c.id, evaluations.c.start_time)
        .where(
            evaluations.c.state.not_in([state.value for state in ENDED]),
            or_(evaluations.c.lease_owner.is_(None), evaluations.c.lease_expire_time < now),
        )
        .order_by(evaluations.c.create_time, evaluations.c.id)
    )


async def _fetch(connection: AsyncConnection, project: str, evaluation_id: str, *, lock: bool = False) -> Evaluation:
    query = select(evaluations).where(evaluations.c.project == project, evaluations.c.id == evaluation_id)
    row = (await connection.execute(query.with_for_update() if lock else query)).mappings().one_or_none()
    if row is not None:
        return convert.evaluation(row)
    newest = (
        select(evaluations.c.id)
        .where(evaluations.c.project == project)
        .order_by(evaluations.c.create_time.desc())
        .limit(20)
    )
    raise unknown("evaluation", evaluation_id, list((await connection.execute(newest)).scalars()))


async def _fenced(connection: AsyncConnection, evaluation: Evaluation, owner: str) -> None:
    query = select(evaluations.c.lease_owner).where(evaluations.c.id == evaluation.id).with_for_update()
    if (await connection.execute(query)).scalar_one_or_none() != owner:
        raise Aborted(f"Evaluation {evaluation.id!r} is another orchestrator's now.", reason="LEASE_LOST")
