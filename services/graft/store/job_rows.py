"""What both sides of a job need of its row: to read it, perhaps under a lock, and to write its next event."""

from datetime import datetime

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from graft.domain.errors import unknown
from graft.domain.jobs import EventLevel, Job
from graft.store import convert
from graft.store.tables import events, jobs


async def fetch_job(connection: AsyncConnection, project: str, job_id: str, *, lock: bool = False) -> Job:
    """The job; with `lock`, no other transaction changes it before this one ends. Raises NotFound."""
    query = select(jobs).where(jobs.c.project == project, jobs.c.id == job_id)
    row = (await connection.execute(query.with_for_update() if lock else query)).mappings().one_or_none()
    if row is not None:
        return convert.job(row)
    newest = select(jobs.c.id).where(jobs.c.project == project).order_by(jobs.c.create_time.desc()).limit(20)
    raise unknown("fine tuning job", job_id, list((await connection.execute(newest)).scalars()))


async def append_event(
    connection: AsyncConnection,
    project: str,
    job_id: str,
    now: datetime,
    entry: tuple[EventLevel, str, str, dict[str, object]],
) -> None:
    """Writes an event `(level, type, message, data)` under the job's next sequence."""
    level, kind, message, data = entry
    # The counter's row lock orders writers, so that sequences have neither gaps nor twins.
    raised = update(jobs).where(jobs.c.id == job_id).values(last_sequence=jobs.c.last_sequence + 1)
    sequence = (await connection.execute(raised.returning(jobs.c.last_sequence))).scalar_one()
    values = {"sequence": sequence, "level": level.value, "type": kind, "message": message, "data": data}
    await connection.execute(insert(events).values(project=project, job_id=job_id, create_time=now, **values))


def state_data(state: str) -> dict[str, object]:
    """Data of a `state` event."""
    return {"state": state}
