"""Shows fine-tuning jobs as they go, one or several at once: live lines on a terminal, plain lines elsewhere.

Owns the rendering only: whoever follows the jobs calls `update`, from one thread a job if it likes.
"""

import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from graft.api.v1 import fine_tuning_job_pb2

Job = fine_tuning_job_pb2.FineTuningJob
Event = fine_tuning_job_pb2.FineTuningJobEvent

PLAIN_SECONDS = 10.0
"""Between two progress lines of one job in a log: an hour of training stays readable."""
QUALITIES = ("reward", "accuracy")
"""Metrics of a step that say more than the loss, where a method has one."""
_TRIAL_ENDS = {"finished": "green", "failed": "red", "ended_early": "yellow"}
_ENDS = {"succeeded": "green", "failed": "red", "cancelled": "yellow"}


def state_word(state: int) -> str:
    """`running` for STATE_RUNNING."""
    return Job.State.Name(Job.State.ValueType(state)).removeprefix("STATE_").lower()


@dataclass
class _Line:
    label: str
    task: TaskID | None
    state: str = ""
    quality: str = ""
    """The newest of QUALITIES, as it is shown."""
    trials: dict[int, TaskID] = field(default_factory=dict)
    """A sweep's, by number: on a terminal each is a line of its own."""
    printed_at_seconds: float = float("-inf")
    """When the last plain progress line was printed, on the monotonic clock."""


class JobsProgress:
    """One line a job: label, state, steps, loss, what else a method has, tokens per second, time left.

    with JobsProgress(console) as progress:
        progress.add("ft-1", "reviews")
        for update in graft.watch_job("ft-1"):
            progress.update("ft-1", update.fine_tuning_job, update.event)

    Off a terminal every change of state is a line, and progress is one at most every `plain_seconds` a job. Warnings
    and errors of the events are always told.
    """

    def __init__(self, console: Console, *, plain_seconds: float = PLAIN_SECONDS) -> None:
        self._console = console
        self._plain_seconds = plain_seconds
        self._lines: dict[str, _Line] = {}
        self._lock = threading.Lock()
        self._live: Progress | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            self._live = Progress(
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[state]}", table_column=Column(no_wrap=True, min_width=len("registering"))),
                BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=8)),
                TextColumn("{task.fields[steps]}", table_column=Column(no_wrap=True, justify="right")),
                TextColumn("{task.fields[loss]}", table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[speed]}", table_column=Column(no_wrap=True, justify="right")),
                TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True, justify="right")),
                console=console,
                expand=True,
            )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def add(self, key: str, label: str) -> None:
        """A job to show. `key` is what `update` names it by, `label` what is shown."""
        task = None
        if self._live is not None:
            task = self._live.add_task(label, total=None, state="", steps="", loss="", speed="", left="")
        with self._lock:
            self._lines[key] = _Line(label, task)

    def update(self, key: str, job: Job, event: Event | None = None) -> None:
        """What `WatchFineTuningJob` brought: the job as it is and, if there is one, the event."""
        with self._lock:
            line = self._lines[key]
            before = line.state
            # An event may be older than the job that comes with it: past changes are told in their order.
            if event is not None and event.type == "state" and "state" in event.data.fields:
                line.state = str(event.data["state"]).lower()
            elif event is None or not line.state:
                line.state = state_word(job.state)
            changed = line.state != before
            if event is not None and event.type == "metrics":
                line.quality = _quality(event)
            if self._live is not None and line.task is not None:
                self._show(self._live, line, line.task, job)
                if event is not None and "trial" in event.data.fields:
                    _show_trial(self._live, line, event)
            elif changed:
                text = event.message if event is not None and event.type == "state" else ""
                self._print(line, [*_numbers(job, line.quality), text])
                line.printed_at_seconds = time.monotonic()
            elif event is not None and event.type == "message" and "trial" in event.data.fields:
                self._print(line, [event.message])
            elif job.progress.step and time.monotonic() - line.printed_at_seconds >= self._plain_seconds:
                self._print(line, _numbers(job, line.quality))
                line.printed_at_seconds = time.monotonic()
            if (
                event is not None
                and event.level > Event.LEVEL_INFO
                and not (self._live is None and (changed or "trial" in event.data.fields))
            ):
                self._print(line, [event.message])

    def _show(self, live: Progress, line: _Line, task: TaskID, job: Job) -> None:
        state, style = line.state, _ENDS.get(line.state)
        numbers = _Numbers.of(job, line.quality)
        live.update(
            task,
            completed=job.progress.step,
            # Without a total the bar swings, which an ended job must not do.
            total=job.progress.total_steps or (1 if style else None),
            state=f"[{style}]{state}[/]" if style else state,
            steps=numbers.steps,
            loss="  ".join(filter(None, [numbers.loss, numbers.quality])),
            speed=numbers.speed,
            left="" if style else numbers.left,
        )

    def _print(self, line: _Line, parts: list[str]) -> None:
        width = max(len(other.label) for other in self._lines.values())
        text = "  ".join([line.label.ljust(width), line.state.ljust(len("registering")), *filter(None, parts)])
        self._console.print(text.rstrip(), markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class _Numbers:
    steps: str = ""
    loss: str = ""
    quality: str = ""
    speed: str = ""
    left: str = ""

    @classmethod
    def of(cls, job: Job, quality: str) -> "_Numbers":
        progress = job.progress
        if not progress.step:
            return cls()
        left = ""
        remaining_seconds = progress.remaining.ToTimedelta().total_seconds()
        # None is left before the last step where training stops early.
        if remaining_seconds > 0 and progress.step < progress.total_steps:
            left = f"{timedelta(seconds=round(remaining_seconds))} left"
        return cls(
            steps=f"{progress.step}/{progress.total_steps}",
            loss=f"loss {progress.loss:.4f}",
            quality=quality,
            speed=f"{progress.tokens_per_second:.0f} tokens/s" if progress.tokens_per_second else "",
            left=left,
        )


def _show_trial(live: Progress, line: _Line, event: Event) -> None:
    """The line of the event's trial: its state, step, loss and held-out loss."""
    data = event.data.fields
    number = int(data["trial"].number_value)
    if number not in line.trials:
        task = live.add_task(f"  trial {number}", total=None, state="running", steps="", loss="", speed="", left="")
        line.trials[number] = task
    task = line.trials[number]
    changes: dict[str, str] = {}
    if "state" in data:
        state = data["state"].string_value
        style = _TRIAL_ENDS.get(state)
        changes["state"] = f"[{style}]{state.replace('_', ' ')}[/]" if style else state
        changes["left"] = ""
    if "step" in data and "loss" in data:
        step, total_steps = int(data["step"].number_value), int(data["total_steps"].number_value)
        changes["steps"] = f"{step}/{total_steps}"
        changes["loss"] = f"loss {data['loss'].number_value:.4f}"
        live.update(task, completed=step, total=total_steps)
    if (held_out := data.get("best_validation_loss", data.get("validation_loss"))) and held_out.number_value:
        changes["speed"] = f"held-out {held_out.number_value:.4f}"
    live.update(task, **changes)  # type: ignore[arg-type] # fields of the task, whose values are text


def _numbers(job: Job, quality: str) -> list[str]:
    numbers = _Numbers.of(job, quality)
    steps = f"step {numbers.steps}" if numbers.steps else ""
    return [steps, numbers.loss, numbers.quality, numbers.speed, numbers.left]


def _quality(event: Event) -> str:
    for name in QUALITIES:
        if name in event.data.fields and event.data.fields[name].HasField("number_value"):
            return f"{name} {event.data.fields[name].number_value:.2f}"
    return ""
