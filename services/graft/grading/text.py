"""Graders that look at the completion's text: exact match, regular expression, number.

Knows no process, network or library but `regex`, whose searches can be given a limit of time: Python's own `re`
backtracks for ever on such as `(a+)+$`, and completions are what a model makes of them.
"""

import math
from collections.abc import Sequence
from typing import Any

from graft.domain.errors import InvalidArgument
from graft.domain.grading import REFERENCE_FIELD
from graft.grading.items import Grade, GradeItem, text_of, value_of, verdict
from graft.grading.packages import needed

_NUMBER = (
    r"(?<![\w.])[-+]?"
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]+)?"
)
"""Digits with or without groups of thousands, a fraction and an exponent; not those inside a word, nor a sign that
follows a digit (`5-3` has 5 and 3)."""
SEARCH_TIMEOUT_SECONDS = 1.0
"""A search of a completion of 4,000 characters takes microseconds unless it backtracks."""


class ExactMatch:
    """The completion is the row's reference."""

    def __init__(self, field: str = REFERENCE_FIELD, ignore_case: bool = False, strip: bool = True) -> None:
        self._field = field
        self._ignore_case = ignore_case
        self._strip = strip

    def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        """1 for a match, 0 for none."""
        return [self._grade(item) for item in items]

    def _grade(self, item: GradeItem) -> Grade:
        reference = text_of(item.row, self._field)
        if self._normal(item.completion) == self._normal(reference):
            return verdict(True, "equals the reference")
        return verdict(False, f"{item.completion!r} is not {reference!r}")

    def _normal(self, text: str) -> str:
        text = text.strip() if self._strip else text
        return text.casefold() if self._ignore_case else text


class Regex:
    """A pattern is found in the completion, and may have to capture the row's reference."""

    def __init__(self, pattern: str, field: str | None = None, timeout_seconds: float = SEARCH_TIMEOUT_SECONDS) -> None:
        self._search = Search(pattern, timeout_seconds)
        self._field = field

    def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        """1 where the pattern is found (and captured the reference), else 0."""
        return [self._grade(item) for item in items]

    def _grade(self, item: GradeItem) -> Grade:
        reference = None if self._field is None else text_of(item.row, self._field).strip()
        try:
            found = self._search.first(item.completion)
        except TimeoutError:
            return verdict(False, "the search took too long")
        if found is None:
            return verdict(False, "the pattern is not in the completion")
        if reference is not None and found.strip() != reference:
            return verdict(False, f"captured {found!r}, which is not {reference!r}")
        return verdict(True, f"captured {found!r}")


class Numeric:
    """A number of the completion is near the row's reference."""

    def __init__(
        self,
        field: str = REFERENCE_FIELD,
        absolute_tolerance: float = 0.0,
        relative_tolerance: float = 1e-9,
        extract: str = "last_number",
    ) -> None:
        self._field = field
        self._absolute_tolerance = absolute_tolerance
        self._relative_tolerance = relative_tolerance
        self._last = Search(_NUMBER, SEARCH_TIMEOUT_SECONDS)
        self._search = None if extract == "last_number" else Search(extract, SEARCH_TIMEOUT_SECONDS)

    def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        """1 where the number is within the tolerance, else 0."""
        return [self._grade(item) for item in items]

    def _grade(self, item: GradeItem) -> Grade:
        reference = _number(value_of(item.row, self._field))
        if reference is None:
            raise InvalidArgument(
                f"The field {self._field!r} of a row is {item.row[self._field]!r}, which is no number.",
                reason="ROW_FIELD_TYPE",
                metadata={"field": self._field},
            )
        try:
            value = self._extract(item.completion.replace("\N{MINUS SIGN}", "-"))
        except TimeoutError:
            return verdict(False, "the search took too long")
        if value is None:
            return verdict(False, "no number was found")
        near = math.isclose(value, reference, rel_tol=self._relative_tolerance, abs_tol=self._absolute_tolerance)
        return verdict(near, f"{value:.12g} {'is' if near else 'is not'} near {reference:.12g}")

    def _extract(self, completion: str) -> float | None:
        if self._search is None:
            return _number(self._last.last(completion))
        return _number(self._search.first(completion))


class Search:
    """A compiled pattern whose searches end in time."""

    def __init__(self, pattern: str, timeout_seconds: float) -> None:
        regex = needed("regex")
        try:
            self._compiled = regex.compile(pattern)
        except regex.error as error:
            raise InvalidArgument(
                f"{pattern!r} is not a regular expression: {error}", reason="INVALID_GRADER"
            ) from None
        self._timeout_seconds = timeout_seconds

    def first(self, text: str) -> str | None:
        """Group 1 of the first match, the whole of it without groups ("" for a group that took no part), or None.

        Raises:
            TimeoutError: the search took longer than its limit.
        """
        match = self._compiled.search(text, timeout=self._timeout_seconds)
        if match is None:
            return None
        return str(match.group(1 if self._compiled.groups else 0) or "")

    def last(self, text: str) -> str | None:
        """The whole of the last match, or None. Raises TimeoutError."""
        found = None
        for match in self._compiled.finditer(text, timeout=self._timeout_seconds):
            found = match.group()
        return found


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value.replace(",", "").strip() if isinstance(value, str) else value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
