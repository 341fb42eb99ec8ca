"""Claims jobs by lease and drives each through its states, one asyncio task a job.

Owns the leases, cancellation and failure; what a state does is in `steps`. A job is left exactly where it is when this
process stops or loses the lease: the run goes on, and the next owner adopts it.
"""

import asyncio
import os
import secrets
import socket
import time
from dataclasses import dataclass
from datetime import timedelta

import structlog

from graft.domain.errors import Aborted, GraftError, Internal, Unavailable
from graft.domain.jobs import FINAL, LIVE, EventLevel, Job, JobState
from graft.orchestrator.checking import Checker
from graft.orchestrator.context import Context, job_error
from graft.orchestrator.evaluations import Evaluations
from graft.orchestrator.following import stop_run
from graft.orchestrator.metrics import JOBS_CLAIMED, JOBS_HELD, LAST_PASS, PASS_SECONDS
from graft.orchestrator.mirror import Mirror
from graft.orchestrator.newer import unknown_in_job
from graft.orchestrator.ports import Parts
from graft.orchestrator.room import Room
from graft.orchestrator.steps import STEPS
from graft.orchestrator.tracking import Tracker

log = structlog.get_logger()

CLAIM_LIMIT = 64
"""Jobs taken at one turn; more follow at the next."""
TRAINS = frozenset({JobState.STARTING, JobState.RUNNING})
HAS_RUN = TRAINS | {JobState.REGISTERING, JobState.EVALUATING}


def owner_name() -> str:
    """This process's name as a lease owner; never used twice, so that a predecessor's lease is not taken for ours."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


@dataclass
class _Driven:
    context: Context
    task: asyncio.Task[None]
    missed: int = 0
    """Turns in a row at which the store did not count the job as ours."""


class Orchestrator:
    """The job loop. `run` until cancelled or `stop`ped."""

    def __init__(self, parts: Parts, owner: str | None = None) -> None:
        orchestrator = parts.settings.orchestrator
        self.parts = parts
        self.owner = owner or owner_name()
        self.mirror = Mirror(parts.store, parts.registry, orchestrator.registry_poll_seconds, orchestrator.poll_seconds)
        self._checker = Checker(parts.store, orchestrator.poll_seconds, parts.storage)
        self._room = Room(parts)
        self._lease = timedelta(seconds=orchestrator.lease_seconds)
        self._poll_seconds = orchestrator.poll_seconds
        self._driven: dict[str, _Driven] = {}
        self._ending: set[Tracker] = set()
        self._passed_on: set[str] = set()
        """Jobs of a newer Graft. They are not claimed again, but for cancelling them."""
        self._renew_due = 0.0
        self._store_down = False

    async def run(self) -> None:
        """Until cancelled; then leaves every job where it is and frees its leases."""
        mirror = asyncio.create_task(self.mirror.run())
        evaluations = asyncio.create_task(Evaluations(self.parts, self.owner).run())
        checks = asyncio.create_task(self._checker.run())
        try:
            while True:
                try:
                    with PASS_SECONDS.time():
                        await self._turn()
                    LAST_PASS.set_to_current_time()
                    self._store_down = False
                except Unavailable as error:
                    if not self._store_down:
                        self._store_down = True
                        log.warning("store_unavailable", error=error.message)
                await asyncio.sleep(self._poll_seconds)
        finally:
            mirror.cancel()
            evaluations.cancel()
            checks.cancel()
            JOBS_HELD.set(0)
            try:
                await self._leave()
            finally:
                # Evaluations free their lease, and whoever ends after this would find a store that is being closed.
                await asyncio.wait({mirror, evaluations, checks}, timeout=self.parts.limits.stop_seconds)

    async def _turn(self) -> None:
        store = self.parts.store
        if time.monotonic() >= self._renew_due:
            # A third of the lease: two renewals may fail before another owner takes over.
            self._renew_due = time.monotonic() + self._lease.total_seconds() / 3
            await store.renew_leases(self.owner, self._lease)
        JOBS_CLAIMED.inc(len(await store.claim_jobs(self.owner, self._lease, CLAIM_LIMIT, self._passed_on)))
        held = {job.id: job for job in await store.leased_jobs(self.owner)}
        JOBS_HELD.set(len(held))
        for job_id, driven in list(self._driven.items()):
            if driven.task.done():
                self._let_go(job_id)
                held.pop(job_id, None)  # it may have ended since it was read; if not, the next turn takes it
            elif job_id not in held:
                # Once may be a job that has just ended and is about to say so.
                driven.missed += 1
                if driven.missed >= 2:
                    log.warning("lease_lost", job=job_id)
                    driven.task.cancel()
            else:
                driven.missed = 0
        for job in held.values():
            if job.state not in LIVE:
                continue
            if job.id not in self._driven:
                self._take(job)
            if job.cancel_requested:
                self._driven[job.id].context.cancel_wish.set()
        self._ending = {tracker for tracker in self._ending if not tracker.task.done()}

    def _take(self, job: Job) -> None:
        context = Context(job, self.owner, self.parts, self._room, self.mirror)
        if job.state in TRAINS:
            self._room.hold(job)
        elif job.state is JobState.QUEUED:
            self._room.line_up(job)  # before any of them asks: a task reads its job's events first, few or many
        if job.state is not JobState.VALIDATING:
            log.info("job_adopted", job=job.id, state=job.state.value, attempt=job.attempt)
        self._driven[job.id] = _Driven(context, asyncio.create_task(self._drive(context), name=f"job {job.id}"))

    def _let_go(self, job_id: str) -> None:
        context = self._driven.pop(job_id).context
        self._room.free(job_id)
        if context.job.state in FINAL:
            self._ending.update(context.trackers)  # they still send what MLflow has not got
        else:
            for tracker in context.trackers:
                tracker.close()

    async def _drive(self, context: Context) -> None:
        """One job to its end. Leaves without a trace when the job is no longer ours."""
        adopted = False
        while not adopted or context.job.state in LIVE:
            try:
                if not adopted:
                    await context.adopt()
                    adopted = True
                    if context.job.cancel_requested:
                        context.cancel_wish.set()
                    elif unknown := unknown_in_job(context.job):
                        await self._pass_on(context, unknown)
                        return
                    continue
                await self._step(context)
            except Aborted as error:
                log.warning("job_dropped", job=context.job.id, reason=error.reason)
                return
            except Exception as error:  # noqa: BLE001 - a job in trouble must end neither the loop nor other jobs
                # The store or, while a run is being stopped, the cluster does not answer: again from what is stored.
                log.warning("job_waits", job=context.job.id, error=str(error), kind=type(error).__name__)
                adopted = False
                if not isinstance(error, Unavailable):
                    self._room.step_aside(context.job.id)  # a defect that may last: the others must not wait for it
                await asyncio.sleep(self.parts.limits.retry_seconds)

    async def _pass_on(self, context: Context, unknown: tuple[str, ...]) -> None:
        """Leaves a job of a newer Graft as it is, for an orchestrator of that version, and says so."""
        job = context.job
        text = (
            f"An older orchestrator does not know {', '.join(unknown)}, and leaves this job to a newer one. "
            "Where there is none, the job waits: cancel it, or upgrade."
        )
        await context.say("passed-on", text, {"unknown": list(unknown)}, level=EventLevel.WARN)
        log.warning("job_passed_on", job=job.id, state=job.state.value, unknown=unknown)
        self._passed_on.add(job.id)
        await self.parts.store.release_leases(self.owner, job.id)

    async def _step(self, context: Context) -> None:
        # A job that is to be cancelled does nothing before: it may be one of a newer Graft.
        error = None if context.cancel_wish.is_set() else await self._work(context)
        if context.cancel_wish.is_set():
            await context.refresh()
            if context.job.state in LIVE:
                await self._end(context, JobState.CANCELLED, "Cancelled as requested.")
        elif error is not None:
            await self._fail(context, error)

    async def _work(self, context: Context) -> BaseException | None:
        """Its state's step, until it has ended or the job is to be cancelled; what it has raised."""
        step = asyncio.ensure_future(STEPS[context.job.state](context))
        wish = asyncio.ensure_future(context.cancel_wish.wait())
        try:
            await asyncio.wait({step, wish}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            wish.cancel()
            if not step.done():
                step.cancel()
                await asyncio.wait({step})
        return None if step.cancelled() else step.exception()

    async def _fail(self, context: Context, error: BaseException) -> None:
        if isinstance(error, Aborted) or (isinstance(error, Unavailable) and error.reason == "STORE_UNAVAILABLE"):
            raise error  # not the job's fault
        if not isinstance(error, GraftError):
            log.error("step_failed", job=context.job.id, state=context.job.state.value, exc_info=error)
            error = Internal(
                f"A defect in Graft ended the job in {context.job.state}: {type(error).__name__}. The orchestrator's "
                f"log has the rest under job {context.job.id}.",
                reason="INTERNAL",
            )
        await self._end(context, JobState.FAILED, error.message, error)

    async def _end(self, context: Context, state: JobState, message: str, error: GraftError | None = None) -> None:
        if context.job.state in HAS_RUN:
            try:
                await stop_run(context)
            except Unavailable as trouble:
                if error is None or trouble.reason == "STORE_UNAVAILABLE":
                    raise  # a job is not CANCELLED while its run may be alive: tried again
                log.warning("run_not_stopped", job=context.job.id, attempt=context.job.attempt, error=trouble.message)
            context.track(None).finish("KILLED" if state is JobState.CANCELLED else "FAILED")
        await context.move(state, message, error=job_error(error) if error else None)

    async def _leave(self) -> None:
        tasks = [driven.task for driven in self._driven.values()]
        trackers = [
            *self._ending,
            *(tracker for driven in self._driven.values() for tracker in driven.context.trackers),
        ]
        for task in tasks:
            task.cancel()
        for tracker in trackers:
            tracker.leave()
        if leaving := [*tasks, *(tracker.task for tracker in trackers)]:
            await asyncio.wait(leaving, timeout=self.parts.limits.stop_seconds)
        for tracker in trackers:
            tracker.close()
        await self.parts.store.release_leases(self.owner)
        log.info("leases_released", owner=self.owner, jobs=len(tasks))
