"""A process for work that is slow to stop or heavy in memory: an order in, reports out, gone with its parent.

The parent calls `run("graft.some.module", order, on_report)`. The module calls `receive` first, then `tell` for each
report; the last one says how it ended. Owns both ends of the pipes; does not know what is ordered.

The order is the first line of the child's standard input, which stays open: when it ends, the parent is gone.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

END_SECONDS = 10.0
"""How long the process has to end when it is told to."""

OnReport = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Ended:
    """How a child has ended."""

    report: dict[str, Any]
    """Its last; `{"kind": "nothing"}` when there was none."""
    exit_code: int
    last_line: str
    """Of its standard error."""

    @property
    def cause(self) -> str:
        """For people, of a child that did not tell how it ended."""
        if self.exit_code < 0:
            likely = ", most likely for memory" if -self.exit_code == signal.SIGKILL else ""
            return f"its process was ended by signal {-self.exit_code} ({_signal_name(-self.exit_code)}){likely}"
        return f"exit code {self.exit_code}: {self.last_line or 'it said nothing'}"


def run(
    module: str,
    order: Mapping[str, Any],
    on_report: OnReport,
    environment: Mapping[str, str] | None = None,
    *,
    show_errors: bool = False,
) -> Ended:
    """Runs the module to its end, and passes its reports on. Whatever ends this wait ends the process.

    `show_errors` lets the user see its standard error, progress bars for one, rather than keep it for `last_line`.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if show_errors else log,
            text=True,
            # Ctrl-C is for the command alone, which then ends the process; in one group both would hear it.
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            report: dict[str, Any] = {"kind": "nothing"}
            try:
                process.stdin.write(json.dumps(order) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                pass  # it has ended, and its log says why
            for line in process.stdout:
                report = json.loads(line)
                on_report(report)
            process.wait()
        finally:
            _end(process)
        return Ended(report, process.returncode, _last_line(log))


def receive(on_orphaned: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """In the child: the order. When the parent is gone `on_orphaned` is called with it, and the process ends.

    From here on standard output is for reports alone: what libraries print goes to standard error.
    """
    global _reports
    _reports = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    order: dict[str, Any] = json.loads(sys.stdin.readline())

    def watch() -> None:
        sys.stdin.read()
        on_orphaned(order)
        os._exit(1)  # the only way out of the other threads' work

    threading.Thread(target=watch, daemon=True).start()
    return order


def tell(kind: str, **data: object) -> None:
    """In the child: one report. Raises BrokenPipeError when nobody listens any more."""
    print(json.dumps({"kind": kind} | data), file=_reports, flush=True)


_reports: IO[str] | None = None
"""Standard output, before `receive` has it."""


def _end(process: "subprocess.Popen[str]") -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
