"""The report of a comparison: what was measured, and one HTML file of it that needs nothing else to be read.

Owns the types of `graft demo`'s report: prompts of one base against one adapter. The page is `report.html.jinja`, drawn
by `graft.evaluation.pages`. Does not know how the answers were got. Any number of models are compared by
`graft.evaluation.comparison`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from graft.domain.errors import InvalidArgument
from graft.evaluation import charts, pages
from graft.evaluation.bootstrap import Interval, interval, paired_difference


@dataclass(frozen=True)
class Contestant:
    """A model with a way of prompting it, and what it answered.

    Attributes:
        name: what the reader calls it: `base, few-shot (8)`, `adapter`.
        model: the public model id that answered.
        scores: in [0, 1], one a row.
        cpu_seconds_per_thousand: of a thousand answers; `None` where it was not measured.
    """

    name: str
    model: str
    answers: tuple[str, ...]
    scores: tuple[float, ...]
    cpu_seconds_per_thousand: float | None


@dataclass(frozen=True)
class LossPoint:
    """The training loss, in nats per completion token, of one optimizer step."""

    step: int
    loss: float


@dataclass(frozen=True)
class Task:
    """One task: its rows, who answered them, and how the adapter came to be.

    Attributes:
        metric: `accuracy` or `ROUGE-L`.
        contestants: the adapter is the last; the others are prompts of its base model.
        training: label to value, both as the reader sees them.
        lineage: label to value: digests, run, versions.

    Raises:
        InvalidArgument: a contestant lacks rows, or the adapter has nobody to be compared with.
    """

    name: str
    title: str
    metric: str
    source: str
    license: str
    inputs: tuple[str, ...]
    references: tuple[str, ...]
    contestants: tuple[Contestant, ...]
    curve: tuple[LossPoint, ...]
    training: Mapping[str, str]
    lineage: Mapping[str, str]

    def __post_init__(self) -> None:
        if len(self.contestants) < 2:
            raise InvalidArgument(
                f"Task {self.name!r} needs the adapter and at least one prompt of its base model.",
                reason="TOO_FEW_CONTESTANTS",
            )
        counts = {"inputs": len(self.inputs)}
        for contestant in self.contestants:
            counts[f"answers of {contestant.name!r}"] = len(contestant.answers)
            counts[f"scores of {contestant.name!r}"] = len(contestant.scores)
        wrong = [f"{count} {what}" for what, count in counts.items() if count != len(self.references)]
        if wrong:
            raise InvalidArgument(
                f"Task {self.name!r} has {len(self.references)} references, but {', '.join(wrong)}.",
                reason="UNEQUAL_LENGTHS",
            )

    def intervals(self) -> list[Interval]:
        """The mean score of each contestant, in their order."""
        return [interval(contestant.scores) for contestant in self.contestants]

    def best_base(self) -> Contestant:
        """The prompt of the base model with the highest mean; the first of equals."""
        return max(self.contestants[:-1], key=lambda contestant: sum(contestant.scores))

    def advantage(self) -> Interval:
        """The adapter's mean score less that of `best_base`, row by row.

        The best prompt is chosen on the rows it is then compared on, which favours the base model.
        """
        return paired_difference(self.contestants[-1].scores, self.best_base().scores)


@dataclass(frozen=True)
class Report:
    """What one HTML file says.

    Attributes:
        verdict: one sentence.
        stack: what running it took, label to value.
        machine: where it ran, label to value.
    """

    title: str
    verdict: str
    passed: bool
    tasks: tuple[Task, ...]
    stack: Mapping[str, str]
    machine: Mapping[str, str]
    created: datetime


def render(report: Report) -> str:
    """One HTML page that asks the network for nothing and needs no script."""
    return pages.render(
        "report.html.jinja",
        report=report,
        created=report.created.astimezone(UTC),
        scale_of=_scale_of,
        loss_chart=charts.loss_chart,
        said=_said,
    )


def write(report: Report, path: Path) -> Path:
    """Renders to `path`, as `pages.write` does."""
    return pages.write(render(report), path)


def _scale_of(task: Task) -> charts.Scale:
    return charts.PERCENT if task.metric == "accuracy" else charts.PLAIN


def _said(task: Task) -> list[pages.Said]:
    adapter = task.contestants[-1]
    return [pages.Said(each.name, each.answers, each.scores, each is adapter) for each in task.contestants]
