"""The report of a comparison: what was measured, and one HTML file of it that needs nothing else to be read.

Owns the report's types and its file; the picture of each number is `graft.evaluation.charts`, the page
`report.html.jinja`. Does not know how the answers were got. Inputs and answers come from strangers, so the page
escapes everything, and its content security policy forbids scripts and every load.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from graft.domain.errors import InvalidArgument
from graft.evaluation import charts
from graft.evaluation.bootstrap import LEVEL, RESAMPLES, Interval, interval, paired_difference

_EXAMPLES = 8  # two or three screens: more is read by nobody
_FOLD_AT_CHARACTERS = 480  # about eight lines of a column; the rest of a longer text opens on request


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
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        report=report,
        created=report.created.astimezone(UTC),
        level=f"{LEVEL:.0%}",
        resamples=f"{RESAMPLES:,}",
        scale_of=_scale_of,
        score_axis=_score_axis,
        difference_axis=_difference_axis,
        loss_chart=charts.loss_chart,
        examples=_examples,
        fold=_fold,
    )


def write(report: Report, path: Path) -> Path:
    """Renders to `path` in UTF-8, whole or not at all, making its folder if need be. Returns `path`."""
    # UTF-8 has no bytes for half a surrogate pair, which JSON can carry: a browser shows its reference as U+FFFD.
    page = render(report).encode("utf-8", "xmlcharrefreplace")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_bytes(page)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    return path


def _scale_of(task: Task) -> charts.Scale:
    return charts.PERCENT if task.metric == "accuracy" else charts.PLAIN


def _score_axis(intervals: Sequence[Interval], scale: charts.Scale) -> charts.Axis:
    """Around all intervals, within the scale: a dot and a whisker show places, not lengths, and need no zero."""
    low = max(0.0, min(each.low for each in intervals) - 0.02)
    high = min(1.0, max(each.high for each in intervals) + 0.02)
    return charts.axis(low * scale.factor, high * scale.factor)


def _difference_axis(difference: Interval, scale: charts.Scale) -> charts.Axis:
    """Around the interval and zero."""
    low, high = min(0.0, difference.low), max(0.0, difference.high)
    return charts.axis(low * scale.factor, high * scale.factor)


def _examples(task: Task) -> list[int]:
    """Rows to show, in the data set's order within each kind: scores differ, answers differ, all agree.

    Nothing else decides, so the rows favour nobody.
    """

    def kind(row: int) -> int:
        if len({contestant.scores[row] for contestant in task.contestants}) > 1:
            return 0
        return 1 if len({contestant.answers[row] for contestant in task.contestants}) > 1 else 2

    return sorted(range(len(task.references)), key=kind)[:_EXAMPLES]


def _fold(text: str) -> tuple[str, str]:
    """The start of a long text, cut between words where it has any, and the rest."""
    if len(text) <= _FOLD_AT_CHARACTERS * 5 // 4:  # nobody wants to unfold half a line
        return text, ""
    head = text[:_FOLD_AT_CHARACTERS]
    cut = max(head.rfind(" "), head.rfind("\n"))
    cut = cut if cut > _FOLD_AT_CHARACTERS // 2 else _FOLD_AT_CHARACTERS
    return text[:cut], text[cut:]
