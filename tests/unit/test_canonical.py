"""Rows of every format as the shapes that training consumes, and as tokens."""

from pathlib import Path
from typing import Any

import pytest

from graft.data.canonical import Chat, GradedPrompt, Pair, Preference, Text, canonical
from graft.data.rendering import prompt_ids, render
from graft.domain.errors import InvalidArgument
from graft.domain.resources import DatasetFormat as Format
from tests.support.tiny_llama import make_tiny_llama

USER = {"role": "user", "content": "q"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
SYSTEM = {"role": "system", "content": "s"}
TOOL = {"type": "function", "function": {"parameters": {"type": "object"}, "name": "f"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
TOOL_CHAT = {
    "messages": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
        GOOD,
    ],
    "tools": [TOOL],
}
TOOL_TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(question: str, answer: str) -> Chat:
    return Chat(({"role": "user", "content": question}, {"role": "assistant", "content": answer}))


@pytest.mark.parametrize(
    ("row", "format", "shape"),
    [
        ({"prompt": "p", "completion": "c"}, Format.PROMPT_COMPLETION, Pair("p", "c")),
        ({"text": "t", "label": 1}, Format.TEXT, Text("t")),
        ({"question": "q", "answer": "a"}, Format.QUESTION_ANSWER, chat("q", "a")),
        ({"question": "q", "answer": "a", "context": "c"}, Format.QUESTION_ANSWER, chat("c\n\nq", "a")),
        ({"instruction": "i", "input": "x", "output": "o"}, Format.ALPACA, chat("i\n\nx", "o")),
        ({"instruction": "i", "input": "", "output": "o"}, Format.ALPACA, chat("i", "o")),
        ({"messages": [USER, {**GOOD, "weight": 0}]}, Format.MESSAGES, Chat((USER, {**GOOD, "weight": 0}))),
        (
            {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}]},
            Format.SHAREGPT,
            Chat((SYSTEM, USER)),
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, Format.PREFERENCE, Preference("p", "a", "b")),
        (
            {"prompt": [USER], "chosen": [GOOD], "rejected": "bad"},
            Format.PREFERENCE,
            Preference((USER,), (GOOD,), (BAD,)),
        ),
        # A prompt that the conversations repeat, and one that only they hold.
        (
            {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            Format.PREFERENCE,
            Preference((USER,), (GOOD,), (BAD,)),
        ),
        (
            {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD]},
            Format.PREFERENCE,
            Preference((USER, GOOD, USER), (GOOD,), (BAD,)),
        ),
        (
            {"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]},
            Format.PREFERENCE,
            Preference((USER,), (GOOD,), (GOOD, USER, BAD)),
        ),
        (
            {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
            Format.OPENAI_PREFERENCE,
            Preference((USER,), (GOOD,), (BAD,)),
        ),
        ({"prompt": "1+1", "answer": 2}, Format.GRADED_PROMPTS, GradedPrompt("1+1", {"answer": 2})),
        ({"messages": [USER], "answer": 2}, Format.GRADED_PROMPTS, GradedPrompt((USER,), {"answer": 2})),
    ],
)
def test_each_format_becomes_its_shape(row: dict[str, Any], format: Format, shape: object) -> None:
    assert canonical(row, format) == shape


def test_fields_need_a_template() -> None:
    with pytest.raises(InvalidArgument) as caught:
        canonical({"review": "r"}, Format.FIELDS)
    assert caught.value.reason == "TEMPLATE_REQUIRED"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(make_tiny_llama(tmp_path_factory.mktemp("tiny")))


def _learned(example: Any, tokenizer: Any) -> str:
    pairs = zip(example.token_ids, example.loss_mask, strict=True)
    return str(tokenizer.decode([token for token, learned in pairs if learned]))


def test_a_text_is_learned_whole_with_its_end(tokenizer: Any) -> None:
    example = render(Text("héllo"), tokenizer)
    assert tokenizer.decode(list(example.token_ids)) == _learned(example, tokenizer) == "héllo<|im_end|>"


def test_calls_of_tools_are_learned_after_the_prompt_that_is_served(tokenizer: Any) -> None:
    served_messages = [
        USER,
        # As vLLM hands them to the template: no content is an empty one, and arguments are an object.
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]
    function = {"name": "f", "description": None, "parameters": {"type": "object"}}
    served_tools = [{"type": "function", "function": function}]
    tokenizer.chat_template, before = TOOL_TEMPLATE, tokenizer.chat_template
    try:
        row = canonical(TOOL_CHAT, Format.MESSAGES)
        assert isinstance(row, Chat)
        example = render(row, tokenizer)
        assert _learned(example, tokenizer) == '<call>f{"x": 1}</call><|im_end|>good<|im_end|>'
        for index in (1, 3):
            text = tokenizer.apply_chat_template(
                served_messages[:index], tools=served_tools, tokenize=False, add_generation_prompt=True
            )
            served = tokenizer.encode(text, add_special_tokens=False)
            assert list(example.token_ids[: len(served)]) == served
            assert prompt_ids(row.messages[:index], tokenizer, row.tools) == served
    finally:
        tokenizer.chat_template = before


def test_a_template_that_leaves_out_tools_or_calls_is_refused(tokenizer: Any) -> None:
    no_answers = TOOL_TEMPLATE.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' }}")
    before = tokenizer.chat_template
    for template, row, what in (
        (before, TOOL_CHAT, "`tools`"),
        (before, {**TOOL_CHAT, "tools": []}, "`tool_calls`"),
        (no_answers, TOOL_CHAT, "the answers of tools"),
    ):
        tokenizer.chat_template = template
        try:
            with pytest.raises(InvalidArgument, match=what) as caught:
                render(canonical(row, Format.MESSAGES), tokenizer)
            assert caught.value.reason == "CHAT_TEMPLATE_WITHOUT_TOOLS"
        finally:
            tokenizer.chat_template = before


def test_a_template_that_raises_is_told_with_its_own_words(tokenizer: Any) -> None:
    before = tokenizer.chat_template
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    try:
        with pytest.raises(InvalidArgument, match="no system here") as caught:
            render(Chat((SYSTEM, USER, GOOD)), tokenizer)
        assert caught.value.reason == "CHAT_TEMPLATE_REFUSED"
    finally:
        tokenizer.chat_template = before


def test_what_is_no_single_text_is_not_rendered_as_one(tokenizer: Any) -> None:
    for row in (Preference("p", "a", "b"), GradedPrompt("p")):
        with pytest.raises(InvalidArgument, match=type(row).__name__):
            render(row, tokenizer)


def test_rows_of_csv_train_as_those_of_jsonl(tmp_path: Path, tokenizer: Any) -> None:
    from graft.data.prepare import prepare
    from graft.domain.jobs import OverLengthPolicy

    (tmp_path / "rows.csv").write_text('question,answer,context\n"a, b?",yes,\n')
    (tmp_path / "rows.jsonl").write_text('{"question": "a, b?", "answer": "yes"}\n')
    both = [
        prepare(tmp_path / name, Format.QUESTION_ANSWER, tokenizer, 100, OverLengthPolicy.FAIL).examples
        for name in ("rows.csv", "rows.jsonl")
    ]
    assert list(both[0]) == list(both[1])
    assert _learned(both[0][0], tokenizer) == "yes<|im_end|>"
