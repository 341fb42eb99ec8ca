"""What is made of a data set's rows is kept on disk: memory does not grow with the rows."""

import json
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from graft.data.prepare import prepare
from graft.data.questions import Ask, Grade, Questions, choose_shots, read_questions
from graft.data.spool import Records, spooled
from graft.domain.jobs import Method, OverLengthPolicy
from graft.domain.resources import DatasetFormat

ROW_CHARACTERS = 20_000
ROWS = 500
"""10 MB of text."""
MOST_BYTES = 3_000_000


class Words:
    """A token a word."""

    eos_token_id = 0

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        del add_special_tokens
        return [len(word) for word in text.split()]

    def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **_: Any) -> str:
        return "".join(f"{one['role']}: {one['content']}\n" for one in conversation)


def _file(folder: Path, **fields: str) -> Path:
    path = folder / "rows.jsonl"
    with path.open("w") as file:
        for number in range(ROWS):
            file.write(json.dumps({"prompt": f"{number}?", **fields, "id": number}) + "\n")
    return path


def test_items_come_back_equal_and_in_their_order() -> None:
    items = spooled([Ask("1?", " one", "one"), Grade(({"role": "user", "content": "2?"},), {"answer": 2.5})])
    assert list(items) == [Ask("1?", " one", "one"), Grade(({"role": "user", "content": "2?"},), {"answer": 2.5})]
    assert (len(items), items[-1], items[:1]) == (2, items[1], (Ask("1?", " one", "one"),))
    assert len(spooled([])) == 0
    records = Records()
    for text in (b"", b"one", b""):
        records.add(text)
    assert list(records.read(bytes)) == [b"", b"one", b""]


@pytest.mark.parametrize("method", [Method.REINFORCEMENT, None])
def test_rows_that_a_grader_reads_are_not_held_in_memory(tmp_path: Path, method: Method | None) -> None:
    path = _file(tmp_path, tests="x" * ROW_CHARACTERS)
    tracemalloc.start()
    try:
        read: Questions | Any
        if method is None:
            read = read_questions(path, DatasetFormat.GRADED_PROMPTS).items
        else:
            read = prepare(
                path, DatasetFormat.GRADED_PROMPTS, Words(), 100, OverLengthPolicy.FAIL, method=method
            ).prompts
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
    assert len(read) == ROWS
    assert [item.row["id"] for item in read] == list(range(ROWS))


def test_questions_and_the_rows_that_shots_are_chosen_from_are_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for number in range(ROWS):
            asked = f"{number}? {'x' * ROW_CHARACTERS}"
            file.write(json.dumps({"prompt": asked, "completion": "yes" if number % 3 else "no"}) + "\n")
    tracemalloc.start()
    try:
        questions = read_questions(path, DatasetFormat.PROMPT_COMPLETION)
        shots = choose_shots(questions, 4)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
    assert questions.labels == ("no", "yes")
    assert [(shot.reference, str(shot.prompt).split("?")[0]) for shot in shots] == [
        ("no", "0"),
        ("yes", "1"),
        ("no", "3"),
        ("yes", "2"),
    ]
    assert all(isinstance(item, Ask) and item.choices == ("no", "yes") for item in questions.items)
