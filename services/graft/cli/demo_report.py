"""What `graft demo` has found as a report: tables, verdict, costs, lineage and the machine. Asks nobody anything."""

import os
import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from graft.api.v1 import fine_tuning_job_pb2
from graft.cli.asking import Asked
from graft.cli.comparing import difference_text
from graft.cli.demo_parts import Part
from graft.cli.lineage import Lineage
from graft.cli.output import short_id
from graft.data import samples
from graft.evaluation import charts
from graft.evaluation.report import Contestant, LossPoint, Report, Task
from graft.stack.usage import Peak

TARGET_POINTS = 15.0
"""What the sentiment adapter should gain on the better of the base's prompts, in percentage points."""
TIME_LIMIT_SECONDS = 600.0


@dataclass
class Trained:
    """A job of the demonstration, followed to its end."""

    part: Part
    job: fine_tuning_job_pb2.FineTuningJob
    heldout_digest: str
    dataset_digest: str
    first_token_seconds: float | None = None
    """From the start of publishing to the first token of the version's first streamed answer."""
    state_times: dict[str, float] = field(default_factory=dict)
    """Unix seconds at which each state began."""
    lineage: Lineage | None = None
    ended: bool = False

    @property
    def training_seconds(self) -> float:
        """From the first worker's start to the end of training."""
        return self.state_times["REGISTERING"] - self.state_times["STARTING"]


def report(tasks: list[Task], peak: Peak, seconds: float) -> Report:
    """The whole of it; it has passed when the first task's adapter wins."""
    advantage, target = 100 * tasks[0].advantage().mean, TARGET_POINTS
    passed = tasks[0].advantage().low > 0
    return Report(
        title="Graft demonstration",
        verdict=_verdict(tasks[0], passed)
        + (
            f" The target of {target:.0f} points is reached."
            if advantage >= target
            else f" The target of {target:.0f} points is missed."
        ),
        passed=passed,
        tasks=tuple(tasks),
        stack={
            "time, set-up aside": f"{_duration(seconds)} (limit {_duration(TIME_LIMIT_SECONDS)})",
            "memory of the stack": f"{peak.serving_bytes / 1e9:.1f} GB at most, summed PSS (limit 8 GB)",
            "memory of training workers": f"{peak.training_bytes / 1e9:.1f} GB at most, summed PSS",
        },
        machine=_machine(),
        created=datetime.now(UTC),
    )


def task(each: Trained, answers: list[list[str]], asked: list[Asked], costs: list[float]) -> Task:
    """One task as the report tells it. `answers` and `costs` are in the order of what was `asked`."""
    part, job, lineage = each.part, each.job, each.lineage
    assert lineage is not None, "the lineage is checked before anything is asked"
    names = part.contestant_names
    return Task(
        name=part.sample.name,
        title=part.sample.title,
        metric=part.metric,
        source=part.sample.source,
        license=part.sample.license,
        inputs=tuple(row["messages"][1]["content"] for row in part.scored),
        references=tuple(samples.answer(row) for row in part.scored),
        contestants=tuple(
            Contestant(name, question.model, tuple(given), part.score(given), cost)
            for name, question, given, cost in zip(names, asked, answers, costs, strict=True)
        ),
        curve=tuple(LossPoint(step, loss) for step, loss in lineage.losses),
        training={
            "trained tokens": f"{job.progress.trained_tokens:,}",
            "time to train": f"{each.training_seconds:.0f} s",
            "adapter size": f"{job.metrics['adapter_bytes'] / 1e6:.1f} MB",
            "publish to first token": "not measured"
            if each.first_token_seconds is None
            else f"{each.first_token_seconds:.1f} s",
        },
        lineage={
            "job": short_id(job.name),
            "model": job.fine_tuned_model,
            "MLflow run": lineage.run_id,
            "training data": each.dataset_digest,
            "held-out data": each.heldout_digest,
            "base model": lineage.tags["graft.base_model_digest"],
            "adapter": lineage.tags["graft.digest"],
            "code": lineage.tags["graft.code_version"],
            **dict(sorted(lineage.params.items())),
        },
    )


def _verdict(task: Task, passed: bool) -> str:
    found = task.advantage()
    gain = difference_text(found.mean, found.low, found.high, charts.PERCENT)
    rival = f"the better prompt of its base ({task.best_base().name.removeprefix('base, ')})"
    if passed:
        return f"The {task.name} adapter beats {rival} by {gain}."
    return f"The {task.name} adapter does not beat {rival} beyond doubt: {gain}."


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _machine() -> dict[str, str]:
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": cpu,
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / 1e9:.0f} GB",
        "system": platform.platform(),
        "Python": platform.python_version(),
    }
