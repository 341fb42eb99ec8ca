"""What rows are asked, and what their answers are compared with."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.data.questions import Ask, choose_shots, label_of, read_questions, with_shots
from graft.data.tasks.definition import load
from graft.domain.resources import DatasetFormat

RATING = load(
    """
name: rating
version: 1
fields:
  film: What it is called.
completion: {field: stars, template: " {{ film }} has {{ stars }} stars"}
labels: ["1", "2"]
prompt: "Film: {{ film }}"
decoding: {max_tokens: 6, choices: labels}
"""
)


def _file(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _asks(folder: Path, rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[Ask]]:
    read = read_questions(_file(folder, rows), DatasetFormat.PROMPT_COMPLETION)
    return read.labels, [item for item in read.items if isinstance(item, Ask)]


def test_answers_of_a_classification_are_held_to_the_completions_as_they_were_learned(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "completion": " yes\n" if n % 2 else "no"} for n in range(10)]
    labels, asks = _asks(tmp_path, rows)
    assert labels == ("no", "yes")
    assert {ask.choices for ask in asks} == {("no", " yes\n")}
    assert [ask.reference for ask in asks[:2]] == ["no", "yes"]
    assert label_of(asks[0], labels, " yes") == "yes"
    assert label_of(asks[0], labels, "perhaps") == "perhaps"


def test_many_different_answers_are_free_text(tmp_path: Path) -> None:
    labels, asks = _asks(tmp_path, [{"prompt": f"{n}?", "completion": str(n)} for n in range(10)])
    assert labels == ()
    assert {ask.choices for ask in asks} == {()}


def test_choices_of_a_task_are_rendered_for_each_row_and_told_as_its_labels(tmp_path: Path) -> None:
    path = _file(tmp_path, [{"film": "Alien", "stars": "2"}, {"film": "Cube", "stars": "1"}])
    read = read_questions(path, DatasetFormat.FIELDS, RATING)
    first, second = read.items
    assert isinstance(first, Ask)
    assert isinstance(second, Ask)
    assert read.labels == ("1", "2")
    assert first.choices == (" Alien has 1 stars", " Alien has 2 stars")
    assert (first.reference, second.reference) == ("2", "1")
    assert label_of(second, read.labels, "Cube has 2 stars") == "2"


def test_shots_read_as_the_rows_that_they_are(tmp_path: Path) -> None:
    path = _file(tmp_path, [{"prompt": "2 is", "completion": " even"}, {"prompt": "3 is", "completion": " odd"}])
    shots = choose_shots(read_questions(path, DatasetFormat.PROMPT_COMPLETION), 2)
    assert with_shots("4 is", shots) == "2 is even\n\n3 is odd\n\n4 is"
