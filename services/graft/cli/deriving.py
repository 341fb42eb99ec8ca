"""Shows how a base model is derived: a bar with the time left on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

PLAIN_SECONDS = 10.0
"""Between two lines of progress in a log."""


class Deriving:
    """with Deriving(console) as shown: derive(settings, request, shown.report)"""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("healing"),
            BarColumn(),
            TextColumn("step {task.completed:.0f} of {task.total:.0f}  {task.fields[told]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._printed_at_seconds = float("-inf")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def report(self, report: Mapping[str, Any]) -> None:
        """One of `graft.training.healing`'s reports."""
        match report["kind"]:
            case "phase":
                self._say(report["message"])
            case "cut":
                kept = " ".join(map(str, report["kept"]))
                self._say(
                    f"Kept layers {kept} (chosen by {report['chosen_by']}): held-out perplexity "
                    f"{report['perplexity_before']:.4g} before, {report['perplexity_after_cut']:.4g} after the cut."
                )
            case "step":
                self._step(report)

    def _step(self, report: Mapping[str, Any]) -> None:
        minutes, seconds = divmod(round(report["remaining_seconds"]), 60)
        told = f"loss {report['loss']:.3f}  {report['tokens_per_second']:.0f} tokens/s  {minutes}:{seconds:02} left"
        if self._console.is_terminal:
            if self._task is None:
                self._task = self._bar.add_task("", total=report["total_steps"], told="")
            self._bar.update(self._task, completed=report["step"], told=told)
        elif time.monotonic() - self._printed_at_seconds >= PLAIN_SECONDS or report["step"] == report["total_steps"]:
            self._printed_at_seconds = time.monotonic()
            self._say(f"step {report['step']} of {report['total_steps']}  {told}")

    def _say(self, text: str) -> None:
        if self._console.is_terminal:
            self._console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)
