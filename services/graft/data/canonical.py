"""Turns a validated row of any format into one of the few shapes that training consumes. Pure functions.

Does not know tokenizers (`graft.data.rendering`), nor the templates of tasks, which turn `fields` rows into text.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graft.data.rows import SHAREGPT_ROLES
from graft.domain.errors import InvalidArgument
from graft.domain.resources import DatasetFormat

Row = Mapping[str, Any]
Message = Mapping[str, Any]
"""`role`, `content` and, as they apply, `weight`, `tool_calls`, `tool_call_id`: an OpenAI message as the inference
service hands it to the chat template, arguments of calls as objects."""
Messages = tuple[Message, ...]
Tool = Mapping[str, Any]


@dataclass(frozen=True)
class Chat:
    """A conversation. Learned are the assistant's messages of weight 1, which is the weight of those without one."""

    messages: Messages
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True)
class Pair:
    """A raw prompt and its completion, which is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """Raw text, all of it learned."""

    text: str


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt. All three are texts, or all three are messages."""

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True)
class GradedPrompt:
    """A prompt whose answers are graded."""

    prompt: str | Messages
    row: Row = field(default_factory=dict)
    """The row's other fields: what the grader judges by."""


Canonical = Chat | Pair | Text | Preference | GradedPrompt


def canonical(row: Row, format: DatasetFormat) -> Canonical:
    """The canonical shape of a row that `graft.data.rows` finds no fault with.

    Raises InvalidArgument (TEMPLATE_REQUIRED) for `fields`: only a task's template knows what they mean.
    """
    if format is DatasetFormat.FIELDS:
        raise InvalidArgument(
            "Rows of named fields become text through a task's template. Name a task, or upload another format.",
            reason="TEMPLATE_REQUIRED",
        )
    return _SHAPES[format](row)


def _messages_row(row: Row) -> Chat:
    return Chat(messages(row["messages"]), tools(row.get("tools") or ()))


def _question(row: Row) -> Chat:
    return _turn((row.get("context"), row["question"]), row["answer"])


def _alpaca(row: Row) -> Chat:
    return _turn((row["instruction"], row.get("input")), row["output"])


def _turn(parts: Sequence[str | None], answer: str) -> Chat:
    """One question, its parts a blank line apart, and its answer."""
    question = "\n\n".join(part for part in parts if part and part.strip())
    return Chat(({"role": "user", "content": question}, {"role": "assistant", "content": answer}))


def _sharegpt(row: Row) -> Chat:
    return Chat(
        tuple({"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"])
    )


def _preference(row: Row) -> Preference:
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        return Preference(prompt, chosen, rejected)
    asked, better, worse = _as_messages(prompt, "user"), _as_messages(chosen), _as_messages(rejected)
    if prompt is None:
        # Both are whole conversations: what they share is what was asked. An answer is never shared whole.
        most = min(len(better), len(worse)) - 1
        shared = next((index for index in range(most) if better[index] != worse[index]), max(most, 0))
        asked = better[:shared]
    elif better[: len(asked)] == asked == worse[: len(asked)] and min(len(better), len(worse)) > len(asked):
        shared = len(asked)
    else:
        shared = 0
    return Preference(asked, better[shared:], worse[shared:])


def _as_messages(value: Any, role: str = "assistant") -> Messages:
    if value is None:
        return ()
    return ({"role": role, "content": value},) if isinstance(value, str) else messages(value)


def _openai_preference(row: Row) -> Preference:
    given = row["input"]
    return Preference(
        messages(given["messages"]),
        messages(row["preferred_output"]),
        messages(row["non_preferred_output"]),
        tools(given.get("tools") or ()),
    )


def _graded(row: Row) -> GradedPrompt:
    key = "prompt" if "prompt" in row else "messages"
    asked = row[key]
    rest = {name: value for name, value in row.items() if name != key}
    return GradedPrompt(asked if isinstance(asked, str) else messages(asked), rest)


def messages(given: Sequence[Mapping[str, Any]]) -> Messages:
    """OpenAI messages as the inference service hands them to the chat template."""
    return tuple(map(_message, given))


def _message(given: Mapping[str, Any]) -> Message:
    made = dict(given)
    made["content"] = given.get("content") or ""
    if not made.get("tool_calls"):
        made.pop("tool_calls", None)
    else:
        made["tool_calls"] = [_call(call) for call in given["tool_calls"]]
    return made


def _call(given: Mapping[str, Any]) -> Mapping[str, Any]:
    function = dict(given["function"])
    arguments = function["arguments"]
    # Templates write arguments as JSON of their own; OpenAI's are a string of JSON.
    function["arguments"] = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
    return {**given, "function": function}


def tools(given: Sequence[Mapping[str, Any]]) -> tuple[Tool, ...]:
    """Tools with the fields, in the order, that the inference service hands to the chat template: templates write them
    as they come, so that another order would be another prompt."""
    made = []
    for tool in given:
        function = tool["function"]
        kept = {name: function.get(name) for name in ("name", "description", "parameters")}
        if function.get("strict") is not None:
            kept["strict"] = function["strict"]
        made.append({"type": "function", "function": kept})
    return tuple(made)


_SHAPES: dict[DatasetFormat, Callable[[Row], Canonical]] = {
    DatasetFormat.MESSAGES: _messages_row,
    DatasetFormat.PROMPT_COMPLETION: lambda row: Pair(row["prompt"], row["completion"]),
    DatasetFormat.TEXT: lambda row: Text(row["text"]),
    DatasetFormat.QUESTION_ANSWER: _question,
    DatasetFormat.ALPACA: _alpaca,
    DatasetFormat.SHAREGPT: _sharegpt,
    DatasetFormat.PREFERENCE: _preference,
    DatasetFormat.OPENAI_PREFERENCE: _openai_preference,
    DatasetFormat.GRADED_PROMPTS: _graded,
}
