"""What every grader takes and gives. Knows no grader."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from graft.domain.errors import InvalidArgument

DETAIL_CHARACTERS = 300
"""The longest `Grade.detail`: one goes into a job's samples for each completion that is shown."""


@dataclass(frozen=True)
class GradeItem:
    """One completion to grade. `row` is the data set's row that its prompt was made of."""

    row: Mapping[str, Any]
    completion: str


@dataclass(frozen=True)
class Grade:
    """What a completion earned. `reward` is finite, `detail` one short line that says why."""

    reward: float
    passed: bool
    detail: str


class Grader(Protocol):
    """Grades completions in batches: a grade an item, in the items' order."""

    def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        """
        Raises:
            InvalidArgument: a row lacks what the grader needs.
            FailedPrecondition: the grader cannot work here: nothing was wrong with the completions.
            Unavailable: the grader may work later.
        """
        ...


def verdict(passed: bool, detail: str) -> Grade:
    """The grade of a check that passes or does not: a reward of 1 or 0."""
    return Grade(1.0 if passed else 0.0, passed, shorten(detail))


def shorten(text: str, characters: int = DETAIL_CHARACTERS) -> str:
    """`text` on one line, cut to `characters`."""
    line = " ".join(text.split())
    return line if len(line) <= characters else line[: characters - 1] + "…"


def value_of(row: Mapping[str, Any], field: str) -> Any:
    """The row's field. Raises InvalidArgument when there is none."""
    if row.get(field) is None:
        raise InvalidArgument(
            f"The grader needs the field {field!r} of each row; this row has {sorted(row)}. "
            "Add it to the data set, or name another in the grader's settings.",
            reason="ROW_FIELD_MISSING",
            metadata={"field": field},
        )
    return row[field]


def text_of(row: Mapping[str, Any], field: str) -> str:
    """The row's field as text, a number as Python writes it. Raises InvalidArgument when it is missing or neither."""
    value = value_of(row, field)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InvalidArgument(
            f"The field {field!r} of a row is a {type(value).__name__}; the grader compares text. Give a string.",
            reason="ROW_FIELD_TYPE",
            metadata={"field": field},
        )
    return str(value)
