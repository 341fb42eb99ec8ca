"""The HTML page of a comparison: what of it is drawn where.

Owns the page's selections (points of the scatter, examples); what is compared is `graft.evaluation.comparison`, the
layout `comparison.html.jinja`, drawn by `graft.evaluation.pages`.
"""

from dataclasses import dataclass
from datetime import UTC
from pathlib import Path

from graft.evaluation import charts, figures, pages
from graft.evaluation.comparison import Candidate, ComparedTask, Comparison, scale_of
from graft.evaluation.figures import Answered, Figure


def render(comparison: Comparison) -> str:
    """One HTML page that asks the network for nothing and needs no script."""
    return pages.render(
        "comparison.html.jinja",
        comparison=comparison,
        created=comparison.created.astimezone(UTC),
        metric_of=figures.metric,
        scale_of=scale_of,
        scatter=_scatter,
        examples_of=_examples,
    )


def write(comparison: Comparison, path: Path) -> Path:
    """Renders to `path`, as `pages.write` does."""
    return pages.write(render(comparison), path)


@dataclass(frozen=True)
class _Scatter:
    """Latency against quality: the axes, and the candidates that have both, by place."""

    x: charts.Axis
    y: charts.Axis
    points: tuple[tuple[int, Candidate, float, Figure], ...]


def _scatter(comparison: Comparison, task: ComparedTask) -> _Scatter | None:
    metric = figures.metric(task.metrics[0])
    speeds = {result.candidate: result.speed.latency_p50_seconds for result in task.results}
    points = [
        (place, each, latency, task.figures[metric.name][each.name])
        for place, each in enumerate(comparison.candidates, 1)
        if (latency := speeds.get(each.name)) is not None and each.name in task.figures[metric.name]
    ]
    if len(points) < 2:
        return None
    lows, highs = [figure.low for *_, figure in points], [figure.high for *_, figure in points]
    return _Scatter(
        charts.axis(0, max(latency for _, _, latency, _ in points)),
        charts.score_axis(lows, highs, scale_of(metric), metric.largest),
        tuple(points),
    )


@dataclass(frozen=True)
class _Examples:
    references: tuple[str, ...]
    said: tuple[pages.Said, ...]
    scale: charts.Scale
    exact: bool


def _examples(comparison: Comparison, task: ComparedTask) -> _Examples | None:
    """Answers, scored by the task's first metric that scores single rows; by accuracy where macro-F1 is all."""
    of_answers = [name for name in task.metrics if figures.metric(name).row is Answered]
    answered = [result for result in task.results if Answered in result.rows]
    if not task.inputs or not of_answers or not answered:
        return None
    by_row = [name for name in of_answers if not figures.metric(name).labels]
    name = by_row[0] if by_row else "accuracy"
    gain = next((each for each in comparison.gains if each.task is task), None)
    said = []
    for result in answered:
        kept = [row for row in result.rows[Answered] if isinstance(row, Answered)]
        scores = figures.scores(name, kept)
        assert scores is not None, "metrics of answers other than macro-F1 score single rows"
        main = gain is not None and result.candidate == gain.tuned.name
        said.append(pages.Said(result.candidate, [row.answer for row in kept], scores, main))
    references = tuple(" / ".join(row.references) for row in answered[0].rows[Answered] if isinstance(row, Answered))
    return _Examples(references, tuple(said), scale_of(figures.metric(name)), name in ("accuracy", "exact_match"))
