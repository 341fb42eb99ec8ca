"""How `graft demo` tells what it found: tables and sentences for people, one object with `--json`."""

from typing import Any

from rich.console import Console

from graft.cli.comparing import difference_text, figure_table
from graft.cli.demo import Outcome
from graft.evaluation import charts


def print_outcome(console: Console, outcome: Outcome) -> None:
    """The table of each task, the verdict, and where the report lies."""
    report = outcome.report

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, highlight=False, soft_wrap=True)

    for task in report.tasks:
        scale = charts.PERCENT if task.metric == "accuracy" else charts.PLAIN
        say(f"\n{task.title}, {len(task.references)} held-out rows", "bold")
        table = figure_table("answered by", (task.metric, "95% interval", "CPU s / 1000 answers"))
        for contestant, interval in zip(task.contestants, task.intervals(), strict=True):
            cost = contestant.cpu_seconds_per_thousand
            table.add_row(
                contestant.name,
                scale.score(interval.mean),
                f"{scale.score(interval.low)} to {scale.score(interval.high)}",
                "" if cost is None else f"{cost:.0f}",
            )
        console.print(table)
        say(f"adapter {task.contestants[-1].model}: " + ", ".join(f"{k} {v}" for k, v in task.training.items()))
        gain = task.advantage()
        say(f"over {task.best_base().name}: {difference_text(gain.mean, gain.low, gain.high, scale)}")
    say("")
    for label, value in report.stack.items():
        say(f"{label}: {value}")
    say(report.verdict, "bold green" if report.passed else "bold red")
    say(f"Report: {outcome.path}")
    say(f'Ask it yourself: graft up --detach, then graft chat {report.tasks[0].contestants[-1].model} "A fine film."')


def as_json(outcome: Outcome) -> dict[str, Any]:
    """What `--json` prints."""
    report = outcome.report
    return {
        "passed": report.passed,
        "verdict": report.verdict,
        "report": str(outcome.path),
        "seconds": outcome.seconds,
        "peak_pss_bytes": {"stack": outcome.peak.serving_bytes, "training_workers": outcome.peak.training_bytes},
        "tasks": [
            {
                "name": task.name,
                "metric": task.metric,
                "rows": len(task.references),
                "contestants": [
                    {
                        "name": contestant.name,
                        "model": contestant.model,
                        "score": vars(interval),
                        "cpu_seconds_per_thousand": contestant.cpu_seconds_per_thousand,
                    }
                    for contestant, interval in zip(task.contestants, task.intervals(), strict=True)
                ],
                "advantage": vars(task.advantage()),
                "training": dict(task.training),
                "lineage": dict(task.lineage),
            }
            for task in report.tasks
        ],
        "machine": dict(report.machine),
    }
