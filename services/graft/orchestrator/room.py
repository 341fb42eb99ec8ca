"""Who may train now: the cluster's CPUs shared among this orchestrator's jobs, oldest first.

Does not place anything: Ray does. It only keeps jobs QUEUED that Ray could not place, so that their state tells the
truth. Order is strict: of the jobs that wait the oldest goes first, and a wide one at the head is not overtaken for
ever by narrow ones behind it.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime

from graft.domain.errors import FailedPrecondition
from graft.domain.jobs import Job, Resolved
from graft.orchestrator.ports import Parts
from graft.orchestrator.threads import call

CONCURRENCY = "sweep.max_concurrent_trials"


def worker_count(job: Job) -> int:
    """Workers of the job's run, or trials of its sweep at a time, one CPU each; 1 until it is derived."""
    return resolved_int(job, CONCURRENCY if job.spec.sweep else "num_workers", 1)


def wanted_workers(job: Job) -> tuple[int, int]:
    """The fewest and the most that the job can begin with: a sweep takes what is free."""
    if job.spec.sweep is None:
        return worker_count(job), worker_count(job)
    trials = resolved_int(job, "sweep.max_trials", 1)
    return 1, min(job.spec.sweep.max_concurrent_trials or trials, trials)


def with_concurrency(job: Job, cpus: int) -> tuple[Resolved, ...]:
    """The resolved hyperparameters of a sweep that has been given so many CPUs."""
    _, most = wanted_workers(job)
    asked = job.spec.sweep.max_concurrent_trials if job.spec.sweep else 0
    reason = f"One CPU a trial: {cpus} of the {most} that it could use were free."
    others = tuple(item for item in job.resolved if item.name != CONCURRENCY)
    return (*others, Resolved(CONCURRENCY, cpus, cpus != asked, reason))


def resolved_int(job: Job, name: str, default: int) -> int:
    """A hyperparameter as used, or `default` until it is derived."""
    found = next((item.value for item in job.resolved if item.name == name), default)
    return int(found) if isinstance(found, int | float) else default


@dataclass
class Room:
    """Jobs that hold CPUs, and those that wait for some."""

    parts: Parts
    _held: dict[str, int] = field(default_factory=dict)
    _waiting: dict[str, datetime] = field(default_factory=dict)

    def hold(self, job: Job) -> None:
        """Counts an adopted job that trains already."""
        self._held[job.id] = worker_count(job)

    def free(self, job_id: str) -> None:
        """Gives back what a job holds, CPUs or a place in the line, if it holds anything."""
        self._held.pop(job_id, None)
        self._waiting.pop(job_id, None)

    def line_up(self, job: Job) -> None:
        """Gives the job the place of its age among those that wait, before it asks; what it held is free.

        Called for a job that is about to be QUEUED or is found so: a younger one that is quicker to ask does not pass.
        """
        self.free(job.id)
        self._waiting[job.id] = job.create_time

    def step_aside(self, job_id: str) -> None:
        """Takes a job in trouble out of the line, so that nobody waits behind it. It lines up anew when it recovers."""
        self._waiting.pop(job_id, None)

    @asynccontextmanager
    async def turn(self, job: Job) -> AsyncIterator[int]:
        """Waits until the job may train, holds its CPUs and tells how many. Until the block has ended, younger jobs go
        on waiting.

        Raises FailedPrecondition if the job can never fit. After an error the job keeps its place.
        """
        workers, most = wanted_workers(job)
        limits = self.parts.limits
        # What has trained before fits: it waits for the host that it has lost, as it would for any other service.
        patience_seconds = limits.never_fits_seconds if job.attempt == 1 else limits.unavailable_seconds
        self.line_up(job)
        too_small_since: float | None = None
        while True:
            # Only the head asks: a hundred waiting jobs must not be a hundred questions a turn.
            cpus = await call(self.parts.capacity) if self._first() == job.id else 0.0
            if 0 < cpus < workers:
                too_small_since = too_small_since or time.monotonic()
                if time.monotonic() - too_small_since >= patience_seconds:
                    raise FailedPrecondition(
                        f"The job asks for {workers} workers of one CPU each, and the cluster has {cpus:g}. "
                        "Ask for fewer workers (num_workers), or add nodes.",
                        reason="DOES_NOT_FIT",
                        metadata={"workers": str(workers), "cpus": f"{cpus:g}"},
                    )
            else:
                too_small_since = None
                # Asked again: an older job may have lined up while the cluster answered.
                if self._first() == job.id and self._fits(workers, cpus):
                    break
            await asyncio.sleep(self.parts.settings.orchestrator.poll_seconds)
        self._held[job.id] = granted = max(workers, min(most, int(cpus) - sum(self._held.values())))
        yield granted
        self._waiting.pop(job.id, None)

    def _first(self) -> str:
        return min(self._waiting, key=lambda job_id: (self._waiting[job_id], job_id))

    def _fits(self, workers: int, cpus: float) -> bool:
        most = self.parts.settings.orchestrator.max_concurrent_jobs
        return sum(self._held.values()) + workers <= cpus and (most == 0 or len(self._held) < most)
