"""Who may train now: the cluster's nodes shared among this orchestrator's jobs, oldest first.

Does not place anything: Ray does. It only keeps jobs QUEUED that Ray could not place, so that their state tells the
truth, and jobs within their share (`training.share`, and what the stack's own inference has declared for itself). Order
is strict: of the jobs that wait the oldest goes first, and a wide one at the head is not overtaken for ever by narrow
ones behind it.
"""

import asyncio
import bisect
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime

from graft.domain.errors import FailedPrecondition, Unavailable
from graft.domain.jobs import Job, Resolved
from graft.domain.placement import EPSILON, Claim, Demand, Node, amounts, count, left, total
from graft.orchestrator.ports import Parts
from graft.orchestrator.threads import ask_ray
from graft.settings import Settings

CONCURRENCY = "sweep.max_concurrent_trials"


def worker_count(job: Job) -> int:
    """Workers of the job's run, or trials of its sweep at a time; 1 until it is derived."""
    return resolved_int(job, CONCURRENCY if job.spec.sweep else "num_workers", 1)


def wanted_workers(job: Job) -> tuple[int, int]:
    """The fewest and the most that the job can begin with: a sweep takes what is free."""
    if job.spec.sweep is None:
        return worker_count(job), worker_count(job)
    trials = resolved_int(job, "sweep.max_trials", 1)
    return 1, min(job.spec.sweep.max_concurrent_trials or trials, trials)


def with_concurrency(job: Job, granted: int) -> tuple[Resolved, ...]:
    """The resolved hyperparameters of a sweep that has been given room for so many trials."""
    _, most = wanted_workers(job)
    asked = job.spec.sweep.max_concurrent_trials if job.spec.sweep else 0
    reason = f"There was room for {granted} of the {most} trials that could train at once."
    others = tuple(item for item in job.resolved if item.name != CONCURRENCY)
    return (*others, Resolved(CONCURRENCY, granted, granted != asked, reason))


def resolved_int(job: Job, name: str, default: int) -> int:
    """A hyperparameter as used, or `default` until it is derived."""
    found = next((item.value for item in job.resolved if item.name == name), default)
    return int(found) if isinstance(found, int | float) else default


def reserved(settings: Settings) -> list[Claim]:
    """What the stack's own inference keeps of the nodes that jobs use as well: every replica that is declared.

    Nothing where inference is elsewhere: on the same nodes all the same, it has what `training.share` leaves.
    """
    serving = settings.serving
    if serving.address:
        return []
    pools = [serving.pool(base) for base in sorted({serving.base_model, *serving.pools})]
    return [Claim(pool.num_replicas, pool.demand) for pool in pools if pool.demand.resources]


Tell = Callable[[str, str], Awaitable[None]]
"""Says a message once; the key tells it from others."""


@dataclass
class Room:
    """Jobs that hold room on nodes, and those that wait for some."""

    parts: Parts
    _held: dict[str, Claim] = field(default_factory=dict)
    _waiting: dict[str, datetime] = field(default_factory=dict)
    _line: list[tuple[datetime, str]] = field(default_factory=list)
    """The same jobs, oldest first. Each asks at every poll whether it is first, and must not look at all for that."""

    def hold(self, job: Job) -> None:
        """Counts an adopted job that trains already."""
        self._held[job.id] = Claim(worker_count(job), self._demand(job))

    def free(self, job_id: str) -> None:
        """Gives back what a job holds, room or a place in the line, if it holds anything."""
        self._held.pop(job_id, None)
        self._step_out(job_id)

    def line_up(self, job: Job) -> None:
        """Gives the job the place of its age among those that wait, before it asks; what it held is free.

        Called for a job that is about to be QUEUED or is found so: a younger one that is quicker to ask does not pass.
        """
        self.free(job.id)
        self._waiting[job.id] = job.create_time
        bisect.insort(self._line, (job.create_time, job.id))

    def step_aside(self, job_id: str) -> None:
        """Takes a job in trouble out of the line, so that nobody waits behind it. It lines up anew when it recovers."""
        self._step_out(job_id)

    @asynccontextmanager
    async def turn(self, job: Job, tell: Tell, waited: bool = False) -> AsyncIterator[int]:
        """Waits until the job may train, holds its room and tells for how many workers. Until the block has ended,
        younger jobs go on waiting. What it waits for is told, once. `waited`: it has, in another orchestrator's hands.

        Raises FailedPrecondition if the job can never fit. After an error the job keeps its place.
        """
        fewest, most = wanted_workers(job)
        demand = self._demand(job)
        if self._share_left(demand, []) < fewest:
            raise self._does_not_fit(fewest, demand, f"jobs may hold {amounts(self._share)} (training.share)")
        limits = self.parts.limits
        # What has fitted, or found no cluster at all, waits for hosts that were lost, as for any other service: they
        # come back one by one, and Ray's head first.
        patient = waited or job.attempt > 1
        self.line_up(job)
        too_small_since: float | None = None
        looked = False
        while True:
            # Only the head asks: a hundred waiting jobs must not be a hundred questions a turn.
            nodes = await self._nodes() if self._first() == job.id else None
            too_small = False
            # Asked again: an older job may have lined up while the cluster answered.
            if self._first() != job.id:
                why = ("line", "Waiting for older jobs, which train first.")
            elif nodes is None or not (nodes or self.parts.settings.training.largest):
                patient = True
                why = ("nodes", "Waiting for the training cluster: it does not answer, or has no CPUs yet.")
            elif granted := self._granted(nodes, demand, fewest, most):
                break
            else:
                too_small = not self._could(nodes, demand, fewest)
                patient = patient or not too_small
                why = ("room", f"Waiting for room to train: {fewest} x {demand}.")
            too_small_since = (too_small_since or time.monotonic()) if too_small else None
            patience_seconds = limits.unavailable_seconds if patient else limits.never_fits_seconds
            if too_small_since and time.monotonic() - too_small_since >= patience_seconds:
                raise self._does_not_fit(fewest, demand, self._has(nodes or [], demand))
            if looked:
                await tell(*why)
            looked = True
            await asyncio.sleep(self.parts.settings.orchestrator.poll_seconds)
        self._held[job.id] = Claim(granted, demand)
        yield granted
        self._step_out(job.id)

    async def has_nodes(self, job: Job) -> bool:
        """Whether nodes that are there hold the job's workers beside what others hold. True while nobody knows."""
        nodes = await self._nodes()
        if nodes is None:
            return True
        claims = [claim for job_id, claim in self._held.items() if job_id != job.id]
        there = left(nodes, [*reserved(self.parts.settings), *claims])
        return count(there, self._demand(job)) >= worker_count(job)

    async def _nodes(self) -> list[Node] | None:
        """Those that can train; None while the cluster cannot be asked."""
        try:
            return [node for node in await ask_ray(self.parts.nodes) if node.resources.get("CPU")]
        except Unavailable:
            return None

    def _first(self) -> str:
        return self._line[0][1]

    def _step_out(self, job_id: str) -> None:
        created = self._waiting.pop(job_id, None)
        if created is not None:
            del self._line[bisect.bisect_left(self._line, (created, job_id))]

    def _demand(self, job: Job) -> Demand:
        return self.parts.settings.training.demand(job.spec.base_model)

    def _granted(self, nodes: Sequence[Node], demand: Demand, fewest: int, most: int) -> int:
        """For how many workers there is room: on the nodes that are there, else on those that Ray may add. 0: wait."""
        jobs = self.parts.settings.orchestrator.max_concurrent_jobs
        if jobs and len(self._held) >= jobs:
            return 0
        held = list(self._held.values())
        for there in (nodes, self.parts.settings.training.largest):
            free = count(left(there, reserved(self.parts.settings) + held), demand)
            if (fitting := min(most, free, self._share_left(demand, held))) >= fewest:
                return fitting
        return 0

    def _could(self, nodes: Sequence[Node], demand: Demand, fewest: int) -> bool:
        """Whether there is room when no other job trains."""
        kept = reserved(self.parts.settings)
        both = (nodes, self.parts.settings.training.largest)
        return any(count(left(there, kept), demand) >= fewest for there in both)

    @property
    def _share(self) -> dict[str, float]:
        return self.parts.settings.training.share

    def _share_left(self, demand: Demand, held: Sequence[Claim]) -> int:
        """How many workers more the jobs' share allows."""
        allowed = [sys.maxsize]
        for name, limit in self._share.items():
            if asked := demand.resources.get(name, 0.0):
                used = sum(claim.count * claim.demand.resources.get(name, 0.0) for claim in held)
                allowed.append(int((limit - used + EPSILON) // asked))
        return min(allowed)

    def _has(self, nodes: Sequence[Node], demand: Demand) -> str:
        largest = self.parts.settings.training.largest
        has = f"the cluster has {amounts(total(nodes, demand))}{demand.where}"
        if largest:
            has += f", and {amounts(total(largest, demand))} at its largest (training.worker_groups)"
        if kept := reserved(self.parts.settings):
            has += ", of which inference keeps " + " and ".join(f"{claim.count} x {claim.demand}" for claim in kept)
        return has

    @staticmethod
    def _does_not_fit(workers: int, demand: Demand, has: str) -> FailedPrecondition:
        return FailedPrecondition(
            f"The job asks for {workers} worker{'s' if workers > 1 else ''} of {demand}, and {has}. Ask for fewer "
            "workers (num_workers), or add nodes.",
            reason="DOES_NOT_FIT",
            metadata={"workers": str(workers), "worker": str(demand)},
        )
