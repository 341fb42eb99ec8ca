"""RUNNING: a run's reports become progress, events, checkpoints and MLflow metrics, each once.

Every stored event carries the sequence of the report that it came from. The highest one of an attempt is the cursor
from which the next owner of the job goes on polling.
"""

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

from graft.domain.errors import KINDS, FailedPrecondition, GraftError, Internal, Unavailable
from graft.domain.jobs import Checkpoint, EventLevel, JobState, Progress
from graft.orchestrator.context import Context
from graft.orchestrator.sampling import LOOKS_AFTER_KILL, forget_policies
from graft.orchestrator.threads import ask_ray
from graft.orchestrator.tracking import Tracker
from graft.training.failures import WORKER_DIED
from graft.training.spec import ENDS, Report, RunStatus
from graft.training.sweep import choose

_PROGRESS = tuple(item.name for item in fields(Progress))


async def poll(context: Context, after_sequence: int) -> RunStatus:
    """The current attempt's run, with its reports after `after_sequence`."""
    job = context.job
    return await context.patiently(
        "The training cluster",
        lambda: ask_ray(context.parts.runs.poll, job.id, job.attempt, after_sequence),
    )


async def stop_run(context: Context) -> None:
    """Ends the current attempt's run and frees what it holds. Idempotent. Raises Aborted when the lease is lost."""
    job = context.job
    await context.record()  # the store's fence: another owner's run must not be ended by us
    await ask_ray(context.parts.runs.cancel, job.id, job.attempt)
    await ask_ray(context.parts.runs.release, job.id, job.attempt)
    await forget_policies(context, LOOKS_AFTER_KILL)


async def follow(context: Context) -> None:
    """Follows the run to its end. Raises what it failed with."""
    end = context.said.get(_end_key(context))
    if end is None:
        tracker = context.track(await context.material())
        end = await _Follower(context, tracker).follow()
    if end is None:
        await give_up_attempt(context)
    elif end["kind"] == "finished":
        await forget_policies(context)
        await context.move(JobState.REGISTERING, "Training has finished.")
    elif end["kind"] == "failed":
        kind = KINDS.get(str(end.get("code", "")), Internal)
        error = kind(
            str(end.get("message") or "Training failed without a message."),
            reason=str(end.get("reason") or "TRAINING_FAILED"),
        )
        if error.reason != WORKER_DIED:
            raise error
        await _next_attempt(context, "The run has lost a training worker", error)
    else:
        raise FailedPrecondition(
            "The run was cancelled on the Ray cluster, and not by a request to Graft. Create the job again.",
            reason="RUN_CANCELLED",
        )


async def give_up_attempt(context: Context) -> None:
    """The run died without a last report: the next attempt, or the end. Raises Unavailable after the last one."""
    job, most = context.job, context.parts.limits.max_attempts
    last = Unavailable(
        f"The training run died {most} times without a report of why. Look for killed workers (memory, lost nodes) "
        f"in Ray's logs; the last output is under runs/{job.id}/{job.attempt} in Graft's home.",
        reason="RUN_LOST",
    )
    await _next_attempt(context, "The training run died without a report", last)


async def _next_attempt(context: Context, what: str, last: GraftError) -> None:
    """Queues the job again. `what` begins a sentence; `last` is raised when this was the last attempt."""
    job, most = context.job, context.parts.limits.max_attempts
    if job.attempt >= most:
        raise last
    # Ray may take a minute to tell a host that is gone from one that is slow.
    await context.patiently("The training cluster", lambda: stop_run(context))
    context.track(None).finish("FAILED")
    context.room.line_up(job)
    message = f"{what} (attempt {job.attempt} of {most}). Trying again."
    await context.move(JobState.QUEUED, message, next_attempt=True)


def _end_key(context: Context) -> str:
    return f"end-{context.job.attempt}"


@dataclass
class _Follower:
    context: Context
    tracker: Tracker
    pending: dict[object, Report] = field(default_factory=dict)
    """The newest metrics report that no event tells yet; of a sweep, by trial."""
    kept_report_seconds: float = float("-inf")
    kept_wall_seconds: float = float("-inf")
    seen: int = field(init=False)
    """Sequence of the last report taken; the stored cursor stays behind it while metrics are pending."""

    def __post_init__(self) -> None:
        self.seen = self.context.cursor

    async def follow(self) -> dict[str, object] | None:
        """Data of the end's event, or None when the run is gone without one."""
        while True:
            status = await poll(self.context, self.seen)
            end = await self._take(status.reports)
            if end is not None:
                return end
            if not status.reports and not (status.exists and status.alive):
                await self._flush()
                return None
            if status.alive:
                await asyncio.sleep(self.context.parts.settings.orchestrator.poll_seconds)

    async def _take(self, reports: Sequence[Report]) -> dict[str, object] | None:
        interval_seconds = self.context.parts.limits.event_interval_seconds
        for report in reports:
            self.seen = report.sequence
            if report.kind == "metrics":
                self._log(report)
                trial = report.data.get("trial")
                self.pending.pop(trial, None)
                self.pending[trial] = report
                # By its held-out loss a trial is judged: none is left out.
                judged = trial is not None and "validation_loss" in report.data
                if judged or report.time_seconds - self.kept_report_seconds >= interval_seconds:
                    await self._flush()
                continue
            await self._flush()
            if report.kind == "checkpoint":
                await self._checkpoint(report)
            elif report.kind in ENDS:
                return await self._end(report)
            else:
                await self._message(report)
        if time.monotonic() - self.kept_wall_seconds >= interval_seconds:
            await self._flush()
        return None

    def _log(self, report: Report) -> None:
        trial = report.data.get("trial")
        prefix = "" if trial is None else f"trial-{trial}/"
        metrics = {
            prefix + name: value
            for name, value in _numbers(report.data).items()
            if name not in ("step", "total_steps", "trial")
        }
        self.tracker.log(metrics, _step(report))

    def _data(self, report: Report) -> dict[str, object]:
        # JSON has no NaN and no infinity, and PostgreSQL refuses them.
        told = {name: str(value) if _not_finite(value) else value for name, value in report.data.items()}
        return {**told, "attempt": self.context.job.attempt, "report": report.sequence}

    async def _flush(self) -> None:
        reports, self.pending = self.pending, {}
        for report in reports.values():  # by sequence, so that the cursor passes none
            await self._keep(report)

    async def _keep(self, report: Report) -> None:
        self.kept_report_seconds, self.kept_wall_seconds = report.time_seconds, time.monotonic()
        before = self.context.job.progress or Progress()
        trial, sweep = report.data.get("trial"), report.data.get("sweep")
        whole = sweep if isinstance(sweep, dict) else {}
        told = {name: value for name, value in _numbers({**report.data, **whole}).items() if name in _PROGRESS}
        for name in ("step", "total_steps", "trained_tokens"):
            if name in told:
                told[name] = int(told[name])
        progress = replace(before, **told)  # type: ignore[arg-type] # names are Progress's own, values its numbers
        message = f"Step {progress.step} of {progress.total_steps}, loss {progress.loss:.4f}"
        if trial is not None:
            message = f"Trial {trial}: step {_step(report)}, loss {progress.loss:.4f}"
        for name in ("reward", "accuracy"):
            if name in (numbers := _numbers(report.data)):
                message += f", {name} {numbers[name]:.2f}"
        message += "."
        await self.context.record(progress=progress, event=(EventLevel.INFO, "metrics", message, self._data(report)))
        self.context.cursor = report.sequence

    async def _checkpoint(self, report: Report) -> None:
        metrics = report.data.get("metrics")
        checkpoint = Checkpoint(
            step=_step(report),
            create_time=await self.context.parts.store.now(),
            uri=str(report.data.get("uri") or report.data.get("path") or ""),
            attempt=self.context.job.attempt,
            metrics=_numbers(metrics) if isinstance(metrics, dict) else {},
        )
        event = (EventLevel.INFO, "checkpoint", f"Checkpoint at step {checkpoint.step}.", self._data(report))
        await self.context.record(checkpoint=checkpoint, event=event)
        self.context.cursor = report.sequence

    async def _message(self, report: Report) -> None:
        level = report.data.get("level")
        known = level if isinstance(level, str) and level in set(EventLevel) else EventLevel.INFO
        text = str(report.data.get("message") or ("Training has started." if report.kind == "started" else report.kind))
        await self.context.record(event=(EventLevel(known), "message", text, self._data(report)))
        self.context.cursor = report.sequence

    async def _end(self, report: Report) -> dict[str, object]:
        texts = {
            "finished": str(report.data.get("message") or "The last step is done."),
            "failed": "The run has failed.",
            "cancelled": "The run was stopped.",
        }
        data = {**self._data(report), "kind": report.kind}
        metrics = _numbers(report.data) if report.kind == "finished" else None
        chosen = report.data.get("chosen")
        resolved = choose(self.context.job.resolved, chosen) if isinstance(chosen, dict) else None
        await self.context.say(_end_key(self.context), texts[report.kind], data, metrics=metrics, resolved=resolved)
        self.context.cursor = report.sequence
        return data


def _step(report: Report) -> int:
    step = report.data.get("step", 0)
    return int(step) if isinstance(step, int | float) else 0


def _numbers(data: dict[str, object]) -> dict[str, float]:
    return {
        name: value
        for name, value in data.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and not _not_finite(value)
    }


def _not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
