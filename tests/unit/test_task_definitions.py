"""Definitions of tasks: what they say, every fault that they can have, and rows rendered through them."""

import json
import subprocess
import sys
from typing import Any

import pytest
import yaml

from graft.data.tasks import catalog
from graft.data.tasks.definition import load
from graft.data.tasks.rows import to_prompt, to_training_row, trained_as
from graft.data.tasks.templates import render_choices, render_prompt
from graft.domain.errors import InvalidArgument, NotFound
from graft.domain.resources import DatasetFormat

PLAIN: dict[str, Any] = {
    "name": "films",
    "fields": {"review": "The text."},
    "completion": "verdict",
    "user": "Judge: {{ review }}",
}


def faults(**changed: Any) -> dict[str, str]:
    with pytest.raises(InvalidArgument) as caught:
        load(yaml.safe_dump({**PLAIN, **changed}, sort_keys=False))
    assert caught.value.reason == "INVALID_TASK"
    return {fault.field: fault.description for fault in caught.value.violations}


def test_every_built_in_task_is_read_written_and_read_alike() -> None:
    assert set(catalog.names()) == {
        "sentiment", "text-classification", "question-answering", "summarisation", "code-generation", "chat", "custom"
    }  # fmt: skip
    for name in catalog.names():
        task = catalog.builtin(name)
        assert task.name == name
        assert task.description
        assert task.metrics
        again = load(task.to_text())
        assert again == task
        assert again.digest == task.digest


def test_a_task_that_does_not_exist_names_what_was_meant() -> None:
    with pytest.raises(NotFound, match="did you mean 'sentiment'"):
        catalog.builtin("sentment")
    with pytest.raises(NotFound, match="code-generation, custom"):
        catalog.builtin("../../secret")


def test_the_digest_is_of_what_a_definition_says_and_not_of_how_it_is_written() -> None:
    from_yaml, from_json = load(yaml.safe_dump(PLAIN)), load(json.dumps(PLAIN, indent="\t"))
    assert from_yaml == from_json
    assert load(yaml.safe_dump({**PLAIN, "user": "Judge {{ review }}"})).digest != from_yaml.digest


def test_labels_are_the_text_that_stands_there() -> None:
    for text in ("labels: [yes, no, 1, on, 1.50]", '{"labels": ["yes", "no", 1, "on", "1.50"]}'):
        plain = {**PLAIN, **yaml.load(text, Loader=yaml.BaseLoader)}
        assert load(yaml.safe_dump(plain)).labels == ("yes", "no", "1", "on", "1.50")


def test_all_faults_are_told_together_each_with_its_field() -> None:
    told = faults(
        name="Films!",
        version=0,
        fild="x",
        labels=["a"],
        user="line\n{{ film }}",
        metrics=["acuracy"],
        decoding={"max_tokens": "many", "temperature": 9, "choises": []},
    )
    assert list(told) == [
        "fild", "decoding.choises", "labels", "name", "version", "user", "metrics[0]", "decoding.max_tokens",
        "decoding.temperature",
    ]  # fmt: skip
    assert "did you mean 'fields'" in told["fild"]
    assert "did you mean 'choices'" in told["decoding.choises"]
    assert "did you mean 'accuracy'" in told["metrics[0]"]
    assert told["user"] == "line 2: uses 'film', which is not declared; declared: review, labels"
    assert told["decoding.temperature"] == "is not a number from 0 to 2"


@pytest.mark.parametrize(
    ("changed", "field", "told"),
    [
        ({"fields": {}}, "fields", "is missing"),
        ({"fields": ["review"]}, "fields", "not a mapping"),
        ({"fields": {"my review": "x"}}, "fields.my review", "is no name"),
        ({"fields": {"labels": "x"}}, "fields.labels", "is no name"),
        ({"fields": {"review": {"optinal": True}}}, "fields.review.optinal", "did you mean 'optional'"),
        ({"fields": {"review": {"optional": "maybe"}}}, "fields.review.optional", "neither true nor false"),
        ({"completion": ""}, "completion", "is missing"),
        ({"completion": "review"}, "completion", "the prompt would hold the answer"),
        ({"completion": {"field": "ok", "template": "{{ review }}"}}, "completion.template", "does not use 'ok'"),
        ({"user": ""}, "user", "is missing"),
        ({"prompt": "{{ review }}"}, "prompt", "give one or the other"),
        ({"user": "{{ review }"}, "user", "line 1"),
        ({"user": ["x"]}, "user", "not a text"),
        ({"labels": "from somewhere"}, "labels", "'auto'"),
        ({"labels": ["a", "a"]}, "labels[1]", "stands there already"),
        ({"labels": [f"l{n}" for n in range(257)]}, "labels", "256 are allowed"),
        ({"decoding": {"choices": "labels"}}, "decoding.choices", "it has none"),
        ({"decoding": ["x"]}, "decoding", "not a mapping"),
        ({"name": ""}, "name", "is missing"),
        ({"version": "1.5"}, "version", "whole number"),
        ({"description": "x" * 8000}, "", "8000 are allowed"),
    ],
)  # fmt: skip
def test_a_fault_names_its_field_and_the_fix(changed: dict[str, Any], field: str, told: str) -> None:
    assert told in faults(**changed)[field]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "not a mapping"),
        ("just text", "not a mapping"),
        ("name: x\nname: y", "line 2: 'name' occurs twice"),
        ('{"name": "x", "name": "y"}', "'name' occurs twice"),
        ("a: &a [x]\nb: *a", "line 2: anchors and aliases"),
        ("name: [x", "line 1"),
        ("name: !!python/object/apply:os.system [ls]", "is not a text"),
        ("[" * 3000, "nested too deeply"),
        ('{"a":' * 1500, "nested too deeply"),
        ("name: \x00", "is not YAML"),
        ("? [a, b]\n: c", "line 1"),
    ],
)
def test_what_is_not_readable_is_refused_with_its_line(text: str, told: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        load(text)
    assert told in caught.value.message


def test_a_row_becomes_the_turns_of_a_chat_with_its_answer() -> None:
    row = {"review": "  A joy.  ", "sentiment": "positive", "id": 7}
    asked = {"role": "user", "content": "Is this review positive or negative?\n\nA joy."}
    task = catalog.builtin("sentiment")
    assert to_training_row(task, row) == {"messages": [asked, {"role": "assistant", "content": "positive"}]}
    assert to_prompt(task, row) == render_prompt(task, {"review": "  A joy.  "}) == [asked]
    assert render_choices(task, {"review": "x"}) == ("positive", "negative")


def test_one_question_template_reads_rows_with_and_without_a_context() -> None:
    task = catalog.builtin("question-answering")
    (alone,) = to_prompt(task, {"question": "Who?"})
    (within,) = to_prompt(task, {"question": "Who?", "context": "Ada did.\n"})
    assert alone == {"role": "user", "content": "Who?"}
    assert within == {"role": "user", "content": "Ada did.\n\nWho?"}
    for nothing in ("", None):
        assert to_prompt(task, {"question": "Who?", "context": nothing}) == [alone]


def test_a_raw_prompt_and_a_completion_with_a_template_of_its_own() -> None:
    changes = {
        "user": "",
        "prompt": "{{ review }}\nVerdict:",
        "completion": {"field": "good", "template": " {{ good }}"},
    }
    task = load(yaml.safe_dump({**PLAIN, **changes, "labels": ["true", "false"], "decoding": {"choices": "labels"}}))
    made = to_training_row(task, {"review": 7, "good": True})
    assert made == {"prompt": "7\nVerdict:", "completion": " true"}
    assert render_choices(task, {"review": "7"}) == (" true", " false")


def test_a_task_of_conversations_learns_chats_as_they_are_and_serves_the_same_turns() -> None:
    task = catalog.builtin("chat")
    turns = [{"role": "user", "content": " Hi\n"}, {"role": "assistant", "content": "Hello"}]
    assert trained_as(task, {"messages": turns}, DatasetFormat.MESSAGES) == (
        {"messages": turns},
        DatasetFormat.MESSAGES,
    )
    assert to_training_row(task, {"message": " Hi\n", "reply": "Hello"}) == {"messages": turns}
    assert render_prompt(task, {"message": "Hi", "system": "Be kind."})[0] == {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"sentiment": "positive"}, {"review": "is missing (The text to judge)"}),
        ({"review": " ", "sentiment": None}, {"sentiment": "nothing to learn", "review": "is missing"}),
        ({"review": "x", "sentiment": "fine"}, {"sentiment": "'fine' is no label of the task: positive, negative"}),
        ({"review": ["x"], "sentiment": "positive"}, {"review": "is a list or an object"}),
        ({"review": "x", "sentiment": {}}, {"sentiment": "is a list or an object"}),
    ],
)
def test_a_row_that_does_not_fit_names_every_field(row: dict[str, Any], told: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        to_training_row(catalog.builtin("sentiment"), row)
    assert caught.value.reason == "INVALID_TASK_ROW"
    found = {fault.field: fault.description for fault in caught.value.violations}
    assert found.keys() == told.keys()
    for field, description in told.items():
        assert description in found[field]


def test_missing_and_unknown_inputs_are_told_together() -> None:
    with pytest.raises(InvalidArgument) as caught:
        render_prompt(catalog.builtin("question-answering"), {"questoin": "Who?"})
    assert [fault.field for fault in caught.value.violations] == ["inputs.questoin", "inputs.question"]
    assert "it needs question, and may have context" in caught.value.message


def test_tasks_need_neither_tokenizers_nor_torch() -> None:
    script = (
        "import sys, graft.data.tasks.rows; print([m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.strip() == "[]"
