"""What a good row of each format is: every fault of a row, each with its field. Knows neither files nor tokenizers."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from graft.data.layouts import LAYOUTS, Fault, shown
from graft.domain.resources import DatasetFormat

Row = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
"""`from` of a ShareGPT turn, and the role that it is."""
_ROOT = re.compile(r"[.\[]")
_NOTHING = "is empty: there is nothing to learn"


def row_faults(row: Row, format: DatasetFormat, *, declared: bool = False) -> list[Fault]:
    """Every fault of a row of `format`. Keys that the format does not have are ignored when it was `declared`."""
    layout = LAYOUTS[format]
    faults: list[Fault] = []
    if not (declared or layout.open):
        faults += ((shown(key), "is not a known key; remove it") for key in row if key not in layout.keys)
    own = [*((key, "is missing") for key in layout.required if key not in row), *_CHECKS[format](row)]
    if own:
        # In the order of the format's keys: the first is the one that is told.
        order = {key: place for place, key in enumerate(layout.required + layout.optional)}
        faults += sorted(own, key=lambda fault: order.get(_ROOT.split(fault[0])[0], len(order)))
    return faults


def text_fault(text: Any) -> str | None:
    """What keeps a value from being a text that a tokenizer reads."""
    if not isinstance(text, str):
        return "is not a string"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has half a surrogate pair (character {error.start}), which is no text"
    return None


def _nested_fault(value: Any) -> str | None:
    """What keeps any text inside a value from being one."""
    fault = text_fault(json.dumps(value, ensure_ascii=False, default=str))
    return fault and "has half a surrogate pair, which is no text"


def _texts(row: Row, *keys: str) -> Iterator[Fault]:
    for key in keys:
        if key in row and (fault := text_fault(row[key])):
            yield key, fault


def _learned_text(row: Row, key: str) -> Iterator[Fault]:
    yield from _texts(row, key)
    if isinstance(row.get(key), str) and not row[key].strip():
        yield key, _NOTHING


def _pair(row: Row) -> Iterator[Fault]:
    yield from _texts(row, "prompt")
    yield from _learned_text(row, "completion")


def _text(row: Row) -> Iterator[Fault]:
    yield from _learned_text(row, "text")


def _question(row: Row) -> Iterator[Fault]:
    yield from _texts(row, "question", "context")
    yield from _learned_text(row, "answer")


def _alpaca(row: Row) -> Iterator[Fault]:
    yield from _texts(row, "instruction", "input")
    yield from _learned_text(row, "output")


def _chat(row: Row) -> Iterator[Fault]:
    if "messages" in row:
        yield from message_faults(row["messages"], "messages")
    if "tools" in row:
        yield from _tool_faults(row["tools"], "tools")


def _sharegpt(row: Row) -> Iterator[Fault]:
    turns = row.get("conversations")
    if "conversations" not in row:
        return
    if not isinstance(turns, list) or not turns:
        yield "conversations", "is not a list with at least one turn"
        return
    learned = False
    for index, turn in enumerate(turns):
        field = f"conversations[{index}]"
        if not isinstance(turn, dict):
            yield field, "is not an object"
            continue
        yield from _unknown(turn, ("from", "value"), field)
        who = turn.get("from")
        role = SHAREGPT_ROLES.get(who) if isinstance(who, str) else None
        if role is None:
            yield f"{field}.from", f"is {shown(repr(who))}; it must be one of {', '.join(SHAREGPT_ROLES)}"
        elif role == "system" and index:
            yield f"{field}.from", "a system turn must come first"
        yield from _content(turn.get("value"), f"{field}.value", learned=role == "assistant")
        learned = learned or role == "assistant"
    if not learned:
        yield "conversations", "no turn of the assistant to learn from"


def _preference(row: Row) -> Iterator[Fault]:
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        yield from message_faults(prompt, "prompt", learned=False)
    elif "prompt" in row:
        yield from _texts(row, "prompt")
    for key in ("chosen", "rejected"):
        value = row.get(key)
        if isinstance(value, list):
            yield from message_faults(value, key, bare=True)
        elif key in row:
            yield from _learned_text(row, key)
            if "prompt" not in row and isinstance(value, str):
                yield (
                    "prompt",
                    "is missing; it may be left out only where `chosen` and `rejected` are lists of messages",
                )
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if "prompt" not in row and isinstance(chosen, list) and isinstance(rejected, list) and chosen[:1] != rejected[:1]:
        yield "prompt", "is missing, and `chosen` and `rejected` share no first message that could be it"
    if "chosen" in row and chosen == rejected:
        yield "rejected", "is what was chosen: there is nothing to prefer"


def _openai_preference(row: Row) -> Iterator[Fault]:
    given = row.get("input")
    if "input" in row and not isinstance(given, dict):
        yield "input", 'is not an object such as {"messages": [...]}'
    elif isinstance(given, dict):
        yield from _unknown(given, ("messages", "tools", "parallel_tool_calls"), "input")
        yield from message_faults(given.get("messages"), "input.messages", learned=False)
        if "tools" in given:
            yield from _tool_faults(given["tools"], "input.tools")
    for key in ("preferred_output", "non_preferred_output"):
        if key in row:
            yield from message_faults(row[key], key, bare=True)
    if "preferred_output" in row and row["preferred_output"] == row.get("non_preferred_output"):
        yield "non_preferred_output", "is what was preferred: there is nothing to prefer"


def _graded(row: Row) -> Iterator[Fault]:
    if "prompt" in row:  # messages beside it are a reference field
        yield from _prompt(row)
    elif "messages" in row:
        messages = row["messages"]
        yield from message_faults(messages, "messages", learned=False)
        last = messages[-1] if isinstance(messages, list) and messages else None
        if isinstance(last, dict) and last.get("role") not in ("user", "tool"):
            yield f"messages[{len(messages) - 1}].role", "the last message must be the user's: its answer is graded"
    else:
        yield "prompt", "is missing, and so is `messages`"
    if "completion" in row:
        yield "completion", "a prompt to be graded has none; name a reference answer otherwise, for example `answer`"


def _prompt(row: Row) -> Iterator[Fault]:
    if isinstance(row["prompt"], list):
        yield from message_faults(row["prompt"], "prompt", learned=False)
        return
    yield from _texts(row, "prompt")
    if isinstance(row["prompt"], str) and not row["prompt"].strip():
        yield "prompt", "is empty: there is nothing to answer"


def _fields(row: Row) -> Iterator[Fault]:
    if not row:
        yield "", "has no fields"
    for key, value in row.items():
        if isinstance(value, str):
            if fault := text_fault(value):
                yield shown(key), fault
        elif value is not None and not isinstance(value, int | float | bool):
            yield shown(key), "is neither a string, a number, true, false nor null"


def message_faults(messages: Any, field: str, *, learned: bool = True, bare: bool = False) -> Iterator[Fault]:
    """Faults of a list of OpenAI messages.

    `learned`: one message at least must be the assistant's, and count. `bare`: it continues other messages, so that a
    tool's answer may refer to a call that is not here.
    """
    if not isinstance(messages, list) or not messages:
        yield field, "is not a list with at least one message"
        return
    found = False
    calls: set[str] = set()
    for index, message in enumerate(messages):
        where = f"{field}[{index}]"
        if not isinstance(message, dict):
            yield where, "is not an object"
            continue
        yield from _message(message, where, first=index == 0, calls=calls, bare=bare)
        found = found or (message.get("role") == "assistant" and message.get("weight", 1) != 0)
    if learned and not found:
        yield field, "no assistant message to learn from"


def _message(message: dict[str, Any], where: str, *, first: bool, calls: set[str], bare: bool) -> Iterator[Fault]:
    yield from _unknown(message, ("role", "content", "weight", "tool_calls", "tool_call_id"), where)
    role = message.get("role")
    if role not in ROLES:
        yield f"{where}.role", f"is {shown(repr(role))}; it must be one of {', '.join(ROLES)}"
    elif role == "system" and not first:
        yield f"{where}.role", "a system message must come first"
    called = message.get("tool_calls")
    if called is not None:
        if role != "assistant":
            yield f"{where}.tool_calls", "only assistant messages call tools"
        else:
            yield from _call_faults(called, f"{where}.tool_calls", calls)
    if not (called and message.get("content") is None):
        # A message that calls a tool may say nothing beside it.
        yield from _content(message.get("content"), f"{where}.content", learned=role == "assistant" and not called)
    if role == "tool":
        answered = message.get("tool_call_id")
        if not isinstance(answered, str):
            yield f"{where}.tool_call_id", "is missing: it tells which call this answers"
        elif answered not in calls and not bare:
            yield f"{where}.tool_call_id", f"{shown(repr(answered))} is no id of a call before"
    elif "tool_call_id" in message:
        yield f"{where}.tool_call_id", "only tool messages have one"
    if "weight" in message:
        if role != "assistant":
            yield f"{where}.weight", "only assistant messages have a weight"
        elif message["weight"] not in (0, 1) or isinstance(message["weight"], bool):
            yield f"{where}.weight", "is not 0 or 1"


def _content(content: Any, field: str, *, learned: bool) -> Iterator[Fault]:
    if fault := text_fault(content):
        yield field, fault
    elif learned and not content.strip():
        yield field, _NOTHING


def _call_faults(called: Any, field: str, calls: set[str]) -> Iterator[Fault]:
    if not isinstance(called, list) or not called:
        yield field, "is not a list with at least one call"
        return
    for index, call in enumerate(called):
        where = f"{field}[{index}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or call.get("type", "function") != "function":
            yield where, 'is not an object such as {"id", "type": "function", "function": {"name", "arguments"}}'
            continue
        if isinstance(call.get("id"), str):
            calls.add(call["id"])
        if fault := text_fault(function.get("name")):
            yield f"{where}.function.name", fault
        elif fault := _nested_fault(function):
            yield f"{where}.function", fault
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, dict):
            yield f"{where}.function.arguments", "is not a JSON object"


def _tool_faults(tools: Any, field: str) -> Iterator[Fault]:
    if not isinstance(tools, list):
        yield field, "is not a list"
        return
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type", "function") != "function":
            yield f"{field}[{index}]", 'is not an object such as {"type": "function", "function": {"name", …}}'
        elif fault := text_fault(function.get("name")):
            yield f"{field}[{index}].function.name", fault
        elif fault := _nested_fault(function):
            yield f"{field}[{index}].function", fault


def _unknown(value: dict[str, Any], known: tuple[str, ...], field: str) -> Iterator[Fault]:
    for key in value:
        if key not in known:
            yield f"{field}.{shown(key)}", "is not a known key; remove it"


_CHECKS: dict[DatasetFormat, Callable[[Row], Iterator[Fault]]] = {
    DatasetFormat.MESSAGES: _chat,
    DatasetFormat.PROMPT_COMPLETION: _pair,
    DatasetFormat.TEXT: _text,
    DatasetFormat.QUESTION_ANSWER: _question,
    DatasetFormat.ALPACA: _alpaca,
    DatasetFormat.SHAREGPT: _sharegpt,
    DatasetFormat.PREFERENCE: _preference,
    DatasetFormat.OPENAI_PREFERENCE: _openai_preference,
    DatasetFormat.GRADED_PROMPTS: _graded,
    DatasetFormat.FIELDS: _fields,
}
