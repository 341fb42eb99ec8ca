"""The different values of each field of a file's rows, as long as they are few enough to be a task's labels.

Counted once, while a file is validated, in memory that neither rows nor values can grow; so that who needs the labels
later need not read the file again. Does not know tasks' definitions.
"""

from collections.abc import Mapping
from typing import Any

from graft.data.tasks.definition import MAX_DEFINITION_CHARACTERS
from graft.data.tasks.reading import MAX_LABELS
from graft.data.tasks.rows import text_of
from graft.domain.errors import InvalidArgument

MAX_FIELDS = 64
"""Twice as many as a task may have. Of a file with more, the first that are seen are counted."""


class FieldValues:
    """What `take` has seen."""

    def __init__(self) -> None:
        self._values: dict[str, set[str]] = {}
        self._characters: dict[str, int] = {}
        self._many: set[str] = set()

    def take(self, row: Mapping[str, Any]) -> None:
        """A good row. Values that are no text, number or truth value are not counted: no label is."""
        for field, value in row.items():
            if field in self._many:
                continue
            if field not in self._values:
                if len(self._values) == MAX_FIELDS:
                    continue
                self._values[field], self._characters[field] = set(), 0
            self._add(field, value)

    def found(self) -> dict[str, tuple[str, ...]]:
        """By field, in alphabetical order: an empty text where it has no other, and nothing at all where there are more
        than MAX_LABELS, or more than fit into a definition: more than MAX_DEFINITION_CHARACTERS together."""
        return {
            field: () if field in self._many else tuple(sorted(values)) or ("",)
            for field, values in self._values.items()
        }

    def _add(self, field: str, value: Any) -> None:
        try:
            text = text_of(value, field)
        except InvalidArgument:
            return
        values = self._values[field]
        if text is None or not text.strip() or text in values:
            return
        values.add(text)
        self._characters[field] += len(text)
        if len(values) > MAX_LABELS or self._characters[field] > MAX_DEFINITION_CHARACTERS:
            self._many.add(field)
            values.clear()
