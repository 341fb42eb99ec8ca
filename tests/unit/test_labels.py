"""Which values of a file's fields may be labels, counted while the file is validated."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from graft.data.formats import FileValidator, validate_file
from graft.data.labels import MAX_FIELDS, FieldValues
from graft.data.tasks.definition import MAX_DEFINITION_CHARACTERS
from graft.domain.resources import DatasetFormat


def counted(rows: Sequence[Mapping[str, Any]], declared: DatasetFormat | None) -> Mapping[str, tuple[str, ...]]:
    validator = FileValidator(declared)
    for row in rows:
        validator.feed(json.dumps(row).encode() + b"\n")
    return validator.finish().labels


def test_values_are_counted_as_the_texts_that_a_task_reads() -> None:
    rows = [{"text": f"text {n}", "label": ("b", "a", None, 1, " ", True)[n % 6], "note": ""} for n in range(300)]
    assert counted(rows, DatasetFormat.FIELDS) == {"text": (), "label": ("1", "a", "b", "true"), "note": ("",)}


def test_values_of_a_csv_file_and_of_recognised_formats_count_alike(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\nx,b\ny,a\nz,b\n")
    assert validate_file(file, DatasetFormat.FIELDS).labels == {"text": ("x", "y", "z"), "label": ("a", "b")}
    assert counted([{"question": "q", "answer": "yes"}], None) == {"question": ("q",), "answer": ("yes",)}


@pytest.mark.parametrize(
    "row", [{"prompt": "p", "completion": "c"}, {"text": "t"}, {"messages": [{"role": "assistant", "content": "a"}]}]
)
def test_rows_that_no_template_reads_are_not_counted(row: dict[str, Any]) -> None:
    assert counted([row], None) == {}


def test_what_is_kept_grows_neither_with_values_nor_with_fields() -> None:
    values = FieldValues()
    for number in range(1000):
        values.take({"long": "x" * (number + 1), "few": str(number % 3), f"field {number}": "a"})
    found = values.found()
    assert (found["long"], found["few"], len(found)) == ((), ("0", "1", "2"), MAX_FIELDS)
    assert sum(len(text) for texts in found.values() for text in texts) <= MAX_FIELDS * MAX_DEFINITION_CHARACTERS
