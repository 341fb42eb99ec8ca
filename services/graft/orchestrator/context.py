"""One job in this orchestrator's hands: what is known of it, and every write that concerns it.

A step is run again from its start when an orchestrator adopts the job, so each message carries a key in its event's
data: what the stored events already say is not said twice.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import structlog

from graft.domain.errors import Aborted, GraftError, Unavailable
from graft.domain.jobs import Checkpoint, Event, EventLevel, Job, JobError, JobState, Progress, Resolved
from graft.domain.resources import BaseModel, Dataset
from graft.orchestrator.files import fetch_results
from graft.orchestrator.metrics import ATTEMPTS_LOST, JOB_MOVES
from graft.orchestrator.mirror import Mirror
from graft.orchestrator.ports import Parts
from graft.orchestrator.room import Room
from graft.orchestrator.threads import call, to_the_end
from graft.orchestrator.tracking import Tracker
from graft.store.protocol import Store

log = structlog.get_logger()
T = TypeVar("T")

EVENT_PAGE = 1000


@dataclass(frozen=True)
class Material:
    """What a job works on."""

    base: BaseModel
    dataset: Dataset
    validation: Dataset | None


async def stored_events(store: Store, job: Job) -> list[Event]:
    """All events of a job, in order."""
    events: list[Event] = []
    while True:
        page = await store.list_events(job.project, job.id, events[-1].sequence if events else 0, EVENT_PAGE)
        events.extend(page)
        if len(page) < EVENT_PAGE:
            return events


@dataclass
class Context:
    """A claimed job. `job` is the row as last read or written."""

    job: Job
    owner: str
    parts: Parts
    room: Room
    mirror: Mirror
    cancel_wish: asyncio.Event = field(default_factory=asyncio.Event)
    trackers: list[Tracker] = field(default_factory=list)
    """MLflow runs that this context writes: the last is the current attempt's."""
    said: dict[str, dict[str, object]] = field(default_factory=dict)
    """Data of the keyed events, by key."""
    cursor: int = 0
    """Sequence of the last report of the current attempt that the stored events tell."""
    _writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """The step and the tracker both write; `job` must end as the last row written, not the last one returned."""

    @property
    def output_dir(self) -> Path:
        """Where the current attempt writes."""
        return self.parts.output_dir(self.job)

    async def adopt(self) -> None:
        """Reads the row and what has been said, whoever said it."""
        await self.refresh()
        self.cursor = 0  # what is known may be an earlier attempt's: the move to this one was not heard of
        for event in await stored_events(self.parts.store, self.job):
            if isinstance(key := event.data.get("key"), str):
                self.said[key] = event.data
            report = event.data.get("report")
            if event.data.get("attempt") == self.job.attempt and isinstance(report, int):
                self.cursor = max(self.cursor, report)

    async def refresh(self) -> None:
        """Reads the row again."""
        async with self._writing:
            self.job = await self.parts.store.get_job(self.job.project, self.job.id)

    async def material(self) -> Material:
        """The job's base model and data sets. Raises NotFound."""
        store, spec = self.parts.store, self.job.spec
        return Material(
            base=await store.get_base_model(spec.base_model),
            dataset=await store.get_dataset(self.job.project, spec.training_dataset),
            validation=await store.get_dataset(self.job.project, spec.validation_dataset)
            if spec.validation_dataset
            else None,
        )

    async def fetch_results(self) -> None:
        """Brings what the run has left to `output_dir`, from the shared storage where there is one."""
        storage, job = self.parts.storage, self.job
        await self.patiently("The storage", lambda: call(fetch_results, storage, job, self.output_dir))

    async def move(
        self,
        state: JobState,
        message: str,
        *,
        error: JobError | None = None,
        fine_tuned_model: str | None = None,
        next_attempt: bool = False,
    ) -> None:
        """Moves the job and writes one line to the log. Raises Aborted when the lease is lost."""

        async def write() -> None:
            async with self._writing:
                before = self.job.state
                self.job = await self.parts.store.transition(
                    self.job,
                    self.owner,
                    state,
                    message=message,
                    error=error,
                    fine_tuned_model=fine_tuned_model,
                    next_attempt=next_attempt,
                )
            JOB_MOVES.labels(state.value, error.reason if error else "").inc()
            if next_attempt:
                self.cursor = 0
                ATTEMPTS_LOST.inc()
            log.info(
                "job_state",
                job=self.job.id,
                project=self.job.project,
                before=before.value,
                state=state.value,
                attempt=self.job.attempt,
                message=message,
                reason=error.reason if error else None,
            )

        await to_the_end(write())

    async def record(
        self,
        *,
        progress: Progress | None = None,
        resolved: tuple[Resolved, ...] | None = None,
        metrics: dict[str, float] | None = None,
        mlflow_run_id: str | None = None,
        checkpoint: Checkpoint | None = None,
        event: tuple[EventLevel, str, str, dict[str, object]] | None = None,
    ) -> None:
        """Writes to the job. Raises Aborted when the lease is lost."""

        async def write() -> None:
            async with self._writing:
                self.job = await self.parts.store.record(
                    self.job,
                    self.owner,
                    progress=progress,
                    resolved=resolved,
                    metrics=metrics,
                    mlflow_run_id=mlflow_run_id,
                    checkpoint=checkpoint,
                    event=event,
                )

        await to_the_end(write())

    async def say(
        self,
        key: str,
        message: str,
        data: dict[str, object] | None = None,
        *,
        level: EventLevel = EventLevel.INFO,
        resolved: tuple[Resolved, ...] | None = None,
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Writes a `message` event, with what else is given, unless an event with this key is stored."""
        if key in self.said:
            return
        data = {"key": key, **(data or {})}
        await self.record(resolved=resolved, metrics=metrics, event=(level, "message", message, data))
        self.said[key] = data

    def track(self, material: Material | None) -> Tracker:
        """The current attempt's MLflow run, started once. Without `material` only to end it."""
        if self.trackers and self.trackers[-1].attempt == self.job.attempt:
            return self.trackers[-1]
        job = self.job
        # What a sweep chooses is known at its end, and a parameter cannot be written again.
        swept = ("learning_rate", "lora.rank", "lora.alpha") if job.spec.sweep else ()
        params = {item.name: str(item.value) for item in job.resolved if item.name not in swept}
        params |= {"base_model": job.spec.base_model, "method": job.spec.method or "", "tuning": job.spec.tuning}
        tags = {"graft.adapter": job.adapter}
        if material is not None:
            tags["graft.dataset_digest"] = material.dataset.digest
            tags["graft.base_model_digest"] = material.base.digest
            if material.validation is not None:
                tags["graft.validation_dataset_digest"] = material.validation.digest

        async def on_run(run_id: str) -> None:
            try:
                await self.record(mlflow_run_id=run_id)
            except Aborted:  # the job has ended or is another's now: its row is closed to us, MLflow's run is not
                log.info("mlflow_run_not_recorded", job=job.id, mlflow_run_id=run_id)

        async def on_trouble(message: str) -> None:
            try:
                await self.say(f"tracking-{job.attempt}", message, level=EventLevel.WARN)
            except (Aborted, Unavailable):
                log.info("tracking_trouble_not_told", job=job.id)

        self.trackers.append(Tracker(self.parts.registry, self.parts.limits, job, params, tags, on_run, on_trouble))
        return self.trackers[-1]

    async def patiently(self, what: str, ask: Callable[[], Awaitable[T]]) -> T:
        """Asks until the answer is not Unavailable, with one event when the waiting begins and one when it ends.

        `what` begins a sentence, as in "The engine". Raises Unavailable when the limit has passed.
        """
        limits = self.parts.limits
        started = time.monotonic()
        waiting = False
        while True:
            try:
                answer = await ask()
            except Unavailable as error:
                left_seconds = started + limits.unavailable_seconds - time.monotonic()
                if left_seconds <= 0:
                    raise Unavailable(
                        f"{what} has been unavailable for {limits.unavailable_seconds:.0f} s: {error.message}",
                        reason=error.reason,
                    ) from error
                if not waiting:
                    waiting = True
                    await self.say(
                        f"waiting-{what}-{self.job.attempt}-{self.job.state}",
                        f"{what} is not available yet: {error.message} Trying again for up to "
                        f"{limits.unavailable_seconds:.0f} s.",
                        {"reason": error.reason},
                        level=EventLevel.WARN,
                    )
                await asyncio.sleep(min(limits.retry_seconds, max(left_seconds, 0)))
                continue
            if waiting:
                await self.say(f"back-{what}-{self.job.attempt}-{self.job.state}", f"{what} is available.")
            return answer


def job_error(error: GraftError) -> JobError:
    """A job's error as the client sees it."""
    return JobError(error.code, error.reason, error.message)
