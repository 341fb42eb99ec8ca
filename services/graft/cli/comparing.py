"""How the command shows comparisons to people: as tables and sentences.

Owns the form; what is compared and what follows from it is `graft.evaluation.comparison`.
"""

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from graft.domain.units import count_text, size_text
from graft.evaluation import figures
from graft.evaluation.charts import Scale
from graft.evaluation.comparison import ComparedTask, Comparison, scale_of
from graft.evaluation.confusion import Confusion
from graft.evaluation.figures import Figure


def difference_text(value: float, low: float, high: float, scale: Scale) -> str:
    """`+22.5 points (95% interval +17.0 to +28.0)`."""
    interval = f"95% interval {scale.difference(low)} to {scale.difference(high)}"
    return f"{scale.difference(value)}{scale.difference_unit} ({interval})"


def figure_table(names: str, headers: Sequence[str]) -> Table:
    """An empty table: a column of names, then one of numbers for each header."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    # Names fold between words, and are never squeezed out; numbers do not fold.
    table.add_column(names, min_width=10)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def comparison_table(comparison: Comparison, task: ComparedTask) -> Table:
    """One task: two lines for each candidate, so that three metrics, speed and size fit a terminal of 80 columns."""
    metrics = [figures.metric(name) for name in task.metrics]
    headers = [metric.title if metric.higher_is_better else f"{metric.title} ↓" for metric in metrics]
    costs = ("p50 s\np95 s", "tokens/s\nparams", "memory\nsize")
    table = figure_table("model", [*(f"{header}\n95%" for header in headers), *costs])
    results = {result.candidate: result for result in task.results}
    for candidate in comparison.candidates:
        if candidate.name not in results:
            continue
        speed = results[candidate.name].speed
        table.add_row(
            # Never markup: names may hold brackets.
            Text(candidate.name, style="bold green" if candidate.tuned else ""),
            *(_figure_text(task.figures[m.name].get(candidate.name), scale_of(m)) for m in metrics),
            f"{_number(speed.latency_p50_seconds, '.2f')}\n{_number(speed.latency_p95_seconds, '.2f')}",
            f"{_number(speed.tokens_per_second, '.1f')}\n{_amount(candidate.parameters, count_text)}",
            f"{_amount(candidate.memory_bytes, size_text)}\n{_amount(candidate.size_bytes, size_text)}",
        )
    return table


def confusion_table(matrix: Confusion) -> Table:
    """A row for each label as the reference, a column for each as the answer, then other answers and the scores."""
    table = figure_table("reference", [])
    for label in [*matrix.labels, "other", "recall", "precision", "F1"]:
        table.add_column(Text(label), justify="right", no_wrap=True)
    for place, score in enumerate(matrix.scores()):
        counts = [
            Text(f"{count:,}", style="bold" if column == place else "")
            for column, count in enumerate(matrix.counts[place])
        ]
        shares = [_number(value, ".3f") for value in (score.recall, score.precision, score.f1)]
        table.add_row(Text(score.label), *counts, *shares)
    return table


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Each task's table, the confusion of the two that the answer is about, and the answer."""

    def say(text: str, style: str | None = None) -> None:
        # Never markup, for the same reason.
        console.print(Text(text), style=style, soft_wrap=True)

    def show(table: Table) -> None:
        if console.is_terminal:
            console.print(table, highlight=False)
        else:  # a file or a pipe has no width to fit
            console.print(table, highlight=False, width=1000, crop=False)

    gains = {gain.task.name: gain for gain in comparison.gains}
    for task in comparison.tasks:
        less = any(not figures.metric(name).higher_is_better for name in task.metrics)
        say(f"\n{task.title}, {task.n} rows; 95% intervals{'; ↓ less is better' if less else ''}", "bold")
        show(comparison_table(comparison, task))
        gain = gains.get(task.name)
        for candidate in (gain.tuned, gain.rival) if gain else ():
            if candidate.name in task.confusions:
                say(f"Answers of {candidate.name} by reference")
                show(confusion_table(task.confusions[candidate.name]))
    style = {"better": "bold green", "worse": "bold red"}.get(comparison.outcome, "bold")
    say(f"{comparison.answer}. {comparison.headline}", style)
    for remark in comparison.remarks:
        say(remark)


def _figure_text(figure: Figure | None, scale: Scale) -> Text:
    if figure is None:
        return Text("–")
    low, high = (scale.score(end).removesuffix(scale.unit) for end in (figure.low, figure.high))
    return Text.assemble((scale.score(figure.value), "bold"), "\n", (f"{low}–{high}", "dim"))


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _amount(value: int | None, text: Callable[[int], str]) -> str:
    return "–" if value is None else text(value)
