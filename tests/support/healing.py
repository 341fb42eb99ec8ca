"""The times that tests of cut links note: shown at the end of a run, for docs/clusters.md. They are the machine's, and
never asserted. A `conftest.py` takes its fixture and its hook from here.
"""

from collections.abc import Callable
from typing import Protocol

import pytest

HEALING = "healing"


class Note(Protocol):
    """Keeps a row: what was cut, when an error came and which, and how long after the mending the next answer."""

    def __call__(self, what: str, *, error_seconds: float | None, told: str, heal_seconds: float) -> None:
        """`error_seconds` is None where nobody was told anything but to wait."""


@pytest.fixture
def note(record_property: Callable[[str, object], None]) -> Note:
    def keep(what: str, *, error_seconds: float | None, told: str, heal_seconds: float) -> None:
        error = "–" if error_seconds is None else f"{error_seconds:.0f} s"
        record_property(HEALING, f"| {what} | {error} | {told} | {heal_seconds:.0f} s |")

    return keep


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table, if a test that passed has noted anything."""
    passed = [report for report in terminalreporter.getreports("passed") if report.when == "call"]
    rows = [row for report in passed for name, row in report.user_properties if name == HEALING]
    if rows:
        terminalreporter.section("Time to heal")
        for line in ("| cut | error after | told as | answered, after the mending |", "|---|---|---|---|", *rows):
            terminalreporter.write_line(str(line))
