"""What rows are asked, and what their answers are compared with."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from graft.data.prepare import prepare
from graft.data.questions import Ask, Grade, choose_shots, label_of, read_questions, with_shots
from graft.data.tasks import catalog
from graft.data.tasks.definition import load
from graft.domain.errors import InvalidArgument
from graft.domain.jobs import Method, OverLengthPolicy
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


class Bytes:
    """A token a byte."""

    eos_token_id = 0

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        del add_special_tokens
        return list(text.encode())

    def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **_: Any) -> str:
        return "".join(f"{one['role']}: {one['content']}\n" for one in conversation)


@pytest.mark.parametrize(
    "asked", [{"prompt": "def one():"}, {"messages": [{"role": "user", "content": "Write one()."}]}]
)
def test_a_grader_sees_the_same_row_in_an_evaluation_as_in_training(tmp_path: Path, asked: dict[str, Any]) -> None:
    row = {**asked, "tests": "assert one() == 1"}
    path = _file(tmp_path, [row])
    (item,) = read_questions(path, DatasetFormat.GRADED_PROMPTS).items
    trained = prepare(
        path, DatasetFormat.GRADED_PROMPTS, Bytes(), 100, OverLengthPolicy.FAIL, method=Method.REINFORCEMENT
    )
    assert isinstance(item, Grade)
    assert item.row == trained.prompts[0].row == row


def test_a_grader_sees_the_same_row_of_fields_in_an_evaluation_as_in_training(tmp_path: Path) -> None:
    rows = [{"film": f"Film {number}", "tests": "assert stars"} for number in range(10)]
    path = _file(tmp_path, rows)
    read = read_questions(path, DatasetFormat.FIELDS, RATING, graded=True)
    trained = prepare(
        path, DatasetFormat.FIELDS, Bytes(), 100, OverLengthPolicy.FAIL, method=Method.REINFORCEMENT, task=RATING
    )
    assert [item.row for item in read.items if isinstance(item, Grade)] == [one.row for one in trained.prompts] == rows
    assert next(item.prompt for item in read.items if isinstance(item, Grade)) == "Film: Film 0"
    assert (read.labels, read.metrics, read.max_tokens) == ((), ("pass_at_1",), 6)


def test_an_answer_that_is_none_of_the_tasks_choices_is_refused_naming_its_row(tmp_path: Path) -> None:
    for choices in ("labels", '["1", "2"]'):
        task = load(RATING.to_text().replace("choices: labels", f"choices: {choices}"))
        rows = [{"film": "Alien", "stars": "2"}, {"film": "Cube", "stars": "1"}, {"film": "Saw", "stars": "5"}]
        path = _file(tmp_path, rows)
        for max_rows in (0, 3):
            with pytest.raises(InvalidArgument, match=r"Row 3: stars: '.*5.*' is no.* the task") as error:
                read_questions(path, DatasetFormat.FIELDS, task, max_rows=max_rows)
            assert error.value.reason == "INVALID_TASK_ROW"
        assert read_questions(_file(tmp_path, rows[:2]), DatasetFormat.FIELDS, task).labels == ("1", "2")


def test_the_row_that_misses_a_field_is_named_by_its_place_in_the_file(tmp_path: Path) -> None:
    path = _file(tmp_path, [*({"film": str(n), "stars": "1"} for n in range(9)), {"stars": "1"}])
    with pytest.raises(InvalidArgument, match=r"^Row 10: film: is missing"):
        read_questions(path, DatasetFormat.FIELDS, RATING)


def test_chats_of_a_task_with_labels_are_compared_by_what_they_answer(tmp_path: Path) -> None:
    task = load(
        "name: talk\nversion: 1\nfields: {text: x}\ncompletion: label\nlabels: [good, bad]\nuser: '{{ text }}'\n"
        "conversations: true\nmetrics: [accuracy]\ndecoding: {choices: labels}"
    )
    chat = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Quite good."}]
    read = read_questions(_file(tmp_path, [{"messages": chat}]), DatasetFormat.MESSAGES, task)
    assert (read.labels, read.metrics) == ((), ("accuracy",))


def test_metrics_that_are_not_asked_for_are_those_that_the_rows_allow(tmp_path: Path) -> None:
    path = _file(tmp_path, [{"instruction": "Double x.", "output": "2 * x"}])
    code = catalog.builtin("code-generation")
    assert code.metrics[0] == "pass_at_1"
    assert read_questions(path, DatasetFormat.ALPACA, code).metrics == ("chrf",)
    graded = load(code.to_text().replace("- chrf\n", ""))
    assert read_questions(path, DatasetFormat.ALPACA, graded).metrics == ("rouge_l", "token_f1")
    texts = _file(tmp_path, [{"text": "Once."}])
    assert read_questions(texts, DatasetFormat.TEXT).metrics == ("bits_per_byte", "perplexity")


def test_shots_of_another_kind_are_not_left_out_in_silence(tmp_path: Path) -> None:
    path = _file(tmp_path, [{"prompt": "2 is", "completion": " even"}])
    shots = choose_shots(read_questions(path, DatasetFormat.PROMPT_COMPLETION), 1)
    with pytest.raises(InvalidArgument) as error:
        with_shots(({"role": "user", "content": "4 is?"},), shots)
    assert error.value.reason == "SHOTS_OF_ANOTHER_KIND"
