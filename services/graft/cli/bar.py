"""A progress bar for what a command does itself: reading a file, sending it."""

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console

BAR_SECONDS = 2.0
"""What takes longer shows a progress bar."""


class Bar:
    """A progress bar on standard error, if that is a terminal, for what has taken BAR_SECONDS and goes on."""

    def __init__(self) -> None:
        self._out = Console(stderr=True)
        self._began = time.monotonic()
        self._progress: Any = None
        self._task: Any = None
        self._description = ""
        self._total: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def begin(self, description: str, total: int | None) -> None:
        """The next part of the work; `total` is None where nobody knows it."""
        self._description, self._total = description, total
        if self._progress is not None:
            self._progress.update(self._task, description=description, total=total, completed=0)

    def at(self, done: int) -> None:
        """How much of the part is done; may be told by any thread."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done)
        elif self._out.is_terminal and time.monotonic() - self._began > BAR_SECONDS:
            from rich.progress import Progress

            self._progress = Progress(console=self._out, transient=True)
            self._task = self._progress.add_task(self._description, total=self._total, completed=done)
            self._progress.start()
