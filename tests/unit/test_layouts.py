"""Which format a row is recognised as, what is refused as ambiguous, and what a declaration settles."""

import json
from typing import Any

import pytest

from graft.data.formats import FileReport, FileValidator
from graft.domain.errors import InvalidArgument
from graft.domain.resources import DatasetFormat as Format

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "2"}


def report(*rows: object, declared: Format | None = None) -> FileReport:
    validator = FileValidator(declared)
    validator.feed("".join(json.dumps(row) + "\n" for row in rows).encode())
    return validator.finish()


def refused(*rows: object, declared: Format | None = None) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        report(*rows, declared=declared)
    return caught.value


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": [USER, ANSWER]}, Format.MESSAGES),
        ({"messages": [USER, CALL, RESULT, ANSWER], "tools": [TOOL]}, Format.MESSAGES),
        ({"prompt": "p", "completion": "c"}, Format.PROMPT_COMPLETION),
        ({"text": "t"}, Format.TEXT),
        ({"question": "q", "answer": "a"}, Format.QUESTION_ANSWER),
        ({"question": "q", "answer": "a", "context": "c"}, Format.QUESTION_ANSWER),
        ({"instruction": "i", "output": "o"}, Format.ALPACA),
        ({"instruction": "i", "input": "", "output": "o"}, Format.ALPACA),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, Format.SHAREGPT),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, Format.PREFERENCE),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}, Format.PREFERENCE),
        ({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, Format.PREFERENCE),
        (
            {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [OTHER]},
            Format.OPENAI_PREFERENCE,
        ),
        ({"prompt": "1+1", "answer": 2}, Format.GRADED_PROMPTS),
        ({"prompt": [USER], "tests": ["f(1) == 2"]}, Format.GRADED_PROMPTS),
    ],
)
def test_each_format_is_recognised_by_its_keys(row: dict[str, Any], format: Format) -> None:
    assert report(row, row).format is format
    assert report(row, declared=format).ignored == ()


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": "t", "label": 1}, ["text (would ignore `label`)", "fields (would ignore nothing)"]),
        (
            {"messages": [USER, ANSWER], "prompt": "p", "chosen": "c"},
            ["messages (would ignore `prompt`, `chosen`)", "preference (lacks `rejected`, would ignore `messages`)"],
        ),
        (
            {"messages": [ANSWER, USER], "answer": "a"},
            ["messages (would ignore `answer`)", "graded_prompts (would ignore nothing)"],
        ),
        (
            {"prompt": "p", "completion": "c", "chosen": "a", "rejected": "b"},
            [
                "prompt_completion (would ignore `chosen`, `rejected`)",
                "preference (would ignore `completion`)",
            ],
        ),
        (
            {"instruction": "i", "input": "", "output": "o", "text": "t"},
            ["text (would ignore `instruction`, `input`, `output`)", "alpaca (would ignore `text`)"],
        ),
        (
            {"prompt": "p", "question": "q", "answer": "a"},
            ["question_answer (would ignore `prompt`)", "graded_prompts"],
        ),
    ],
)
def test_an_ambiguous_file_is_refused_with_the_candidates_and_what_each_would_ignore(
    row: dict[str, Any], told: list[str]
) -> None:
    error = refused(row, row)
    assert error.reason == "AMBIGUOUS_DATASET"
    assert error.message.startswith("line 1 may be ")
    for candidate in told:
        assert candidate in error.message
    assert error.metadata["candidates"].split(", ") == [candidate.split(" (")[0] for candidate in told]
    assert f"--format {told[0].split()[0]}" in error.message
    # What the message advises works: the first candidate, and every other that lacks nothing.
    for candidate in told:
        if "lacks" not in candidate and "graded" not in candidate:
            declared = Format(candidate.split(" (")[0])
            assert report(row, declared=declared).format is declared


def test_a_declaration_ignores_other_keys_and_tells_which() -> None:
    assert report({"text": "t", "label": 1, "id": 2}, declared=Format.TEXT).ignored == ("label", "id")
    assert report({"text": "t", "label": 1}, declared=Format.FIELDS).ignored == ()
    assert len(report({"text": "t"} | {f"k{n}": n for n in range(99)}, declared=Format.TEXT).ignored) == 20
    error = refused({"text": "t", "label": 1}, declared=Format.ALPACA)
    assert [fault.field for fault in error.violations] == ["line 1: instruction"]


def test_a_typing_error_is_told_as_one_and_not_as_another_format() -> None:
    pair = {"prompt": "p", "completion": "c"}
    (fault,) = refused(pair, {"prompt": "p", "completon": "c"}).violations
    assert (fault.field, fault.description.split(" (")[0]) == ("line 2: completon", "is not a known key; remove it")
    (fault,) = refused({"instruction": "i", "input": "x"}).violations
    assert (fault.field, fault.description) == ("line 1: output", "is missing")


def test_a_prompt_with_nothing_to_judge_it_by_is_allowed_beside_others_and_when_declared() -> None:
    assert report({"prompt": "p", "answer": "a"}, {"prompt": "q"}).format is Format.GRADED_PROMPTS
    assert report({"prompt": "p"}, declared=Format.GRADED_PROMPTS).row_count == 1
    assert report({"messages": [USER]}, declared=Format.GRADED_PROMPTS).row_count == 1
    assert refused({"prompt": "p"}).violations[0].field == "line 1: completion"


@pytest.mark.parametrize(
    ("row", "declared", "field", "reason"),
    [
        ({"text": " "}, None, "text", "nothing to learn"),
        ({"question": "q", "answer": ""}, None, "answer", "nothing to learn"),
        ({"question": 1, "answer": "a"}, None, "question", "not a string"),
        ({"instruction": "i", "output": "o", "id": 1}, None, "id", "known key"),
        ({"conversations": []}, None, "conversations", "at least one"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, None, "conversations[0].from", "'bot'"),
        ({"conversations": [{"from": "human", "value": "x"}]}, None, "conversations", "no turn of the assistant"),
        ({"prompt": "p", "chosen": "a"}, None, "rejected", "missing"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, None, "rejected", "nothing to prefer"),
        ({"chosen": "a", "rejected": "b"}, None, "prompt", "is missing"),
        ({"chosen": [ANSWER], "rejected": [OTHER]}, None, "prompt", "share no first message"),
        ({"prompt": "p", "chosen": [USER], "rejected": "b"}, None, "chosen", "no assistant message"),
        (
            {"input": {}, "preferred_output": [ANSWER], "non_preferred_output": [OTHER]},
            None,
            "input.messages",
            "at least one",
        ),
        ({"prompt": "", "answer": "a"}, None, "prompt", "nothing to answer"),
        ({"messages": [USER, ANSWER]}, Format.GRADED_PROMPTS, "messages[1].role", "must be the user's"),
        ({"prompt": "p", "completion": "c"}, Format.GRADED_PROMPTS, "completion", "has none"),
        ({"a": [1]}, Format.FIELDS, "a", "neither a string"),
        ({"messages": [USER, {**CALL, "tool_calls": []}]}, None, "messages[1].tool_calls", "at least one call"),
        ({"messages": [USER, CALL, {**RESULT, "tool_call_id": "9"}]}, None, "messages[2].tool_call_id", "'9'"),
        ({"messages": [USER, RESULT, ANSWER]}, None, "messages[1].tool_call_id", "no id of a call"),
        ({"messages": [{**USER, "tool_calls": []}, ANSWER]}, None, "messages[0].tool_calls", "only assistant"),
        ({"messages": [USER, ANSWER], "tools": [{}]}, None, "tools[0]", "not an object"),
        (
            {"messages": [USER, ANSWER], "tools": [{"function": {"name": "f", "description": "\ud800"}}]},
            None,
            "tools[0].function",
            "surrogate",
        ),
    ],
)
def test_a_bad_row_of_any_format_is_told_with_its_field(
    row: dict[str, Any], declared: Format | None, field: str, reason: str
) -> None:
    fault = refused(row, declared=declared).violations[0]
    assert fault.field == f"line 1: {field}"
    assert reason in fault.description


def test_arguments_of_a_call_that_are_no_json_are_refused() -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": "x=1"}}
    fault = refused({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}).violations[0]
    assert fault.field == "line 1: messages[1].tool_calls[0].function.arguments"
