"""Turns canonical rows into token ids and a loss mask, through the base model's own tokenizer and chat template.

The prompt part of a chat is rendered exactly as an inference service renders it (`add_generation_prompt=True`), so that
the served prompt is the trained prompt, token for token. Does not know files or lengths (`graft.data.prepare`).
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from graft.data.canonical import Canonical, Chat, Message, Pair, Text, Tool
from graft.domain.errors import InvalidArgument


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Token ids of a text."""

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = ...,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> str:
        """The text of a chat."""


@dataclass(frozen=True)
class Example:
    """One training sequence. `loss_mask[i]` says whether `token_ids[i]` is predicted with loss; both have length T."""

    token_ids: Sequence[int]
    loss_mask: Sequence[int]


def compact(token_ids: Sequence[int], loss_mask: Sequence[int]) -> Example:
    """An example of 5 bytes a token; in lists it would take 44."""
    return Example(array("i", token_ids), bytes(loss_mask))


def render(row: Canonical, tokenizer: Tokenizer) -> Example:
    """The example of a row. Loss on completions and their end token, on assistant turns with weight 1, or on all of a
    text but what precedes its first token.

    Raises InvalidArgument: CHAT_TEMPLATE_NOT_PREFIX_STABLE when the chat template changes earlier turns (the mask would
    be wrong), CHAT_TEMPLATE_WITHOUT_TOOLS when it leaves tools out, CHAT_TEMPLATE_REFUSED when it fails,
    NOT_A_SEQUENCE for rows that are more or less than one sequence.
    """
    if isinstance(row, Chat):
        return _render_chat(row, tokenizer)
    if isinstance(row, Pair):
        return _render_pair(row, tokenizer)
    if isinstance(row, Text):
        return _render_text(row, tokenizer)
    raise InvalidArgument(
        f"A row of {type(row).__name__} is not one text to learn. Train preferences with the preference method, graded "
        "prompts with reinforcement.",
        reason="NOT_A_SEQUENCE",
    )


def prompt_ids(prompt: str | Sequence[Message], tokenizer: Tokenizer, tools: Sequence[Tool] = ()) -> list[int]:
    """Token ids of a prompt as the inference service makes them: of a text as a completion's, of messages as a chat's.

    Raises InvalidArgument as `render`.
    """
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, add_special_tokens=True)
    chat = _Template(Chat(tuple(prompt), tuple(tools)), tokenizer)
    return tokenizer.encode(chat.text(len(prompt), answer_next=True), add_special_tokens=False)


def _render_pair(row: Pair, tokenizer: Tokenizer) -> Example:
    # Encoded apart, because the service sees the prompt alone: a merge across the border would never occur there.
    prompt = tokenizer.encode(row.prompt, add_special_tokens=True)
    completion = tokenizer.encode(row.completion, add_special_tokens=False) + _end(tokenizer)
    return compact(prompt + completion, [0] * len(prompt) + [1] * len(completion))


def _render_text(row: Text, tokenizer: Tokenizer) -> Example:
    plain = tokenizer.encode(row.text, add_special_tokens=False)
    whole = tokenizer.encode(row.text, add_special_tokens=True)
    start = len(whole) - len(plain)  # a tokenizer that begins every text with a token of its own
    end = _end(tokenizer)
    return compact(whole + end, [0] * start + [1] * (len(plain) + len(end)))


def _end(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _render_chat(row: Chat, tokenizer: Tokenizer) -> Example:
    token_ids: list[int] = []
    loss_mask: list[int] = []
    done = ""

    def extend(text: str, *, learned: bool) -> None:
        pieces = tokenizer.encode(text, add_special_tokens=False)
        token_ids.extend(pieces)
        loss_mask.extend([int(learned)] * len(pieces))

    chat = _Template(row, tokenizer)
    for index, message in enumerate(row.messages):
        if message["role"] != "assistant":
            continue
        prompt = chat.text(index, answer_next=True)
        whole = chat.text(index + 1, answer_next=False)
        if not (prompt.startswith(done) and whole.startswith(prompt)):
            raise InvalidArgument(
                "The base model's chat template rewrites earlier turns, so the answer's tokens cannot be told apart. "
                "Use `prompt`/`completion` rows with this base model.",
                reason="CHAT_TEMPLATE_NOT_PREFIX_STABLE",
            )
        extend(prompt[len(done) :], learned=False)
        # Templates write a line break after the end token; generation stops before it, so it is not learned.
        answer = whole[len(prompt) :]
        extend(answer.rstrip("\n"), learned=message.get("weight", 1) != 0)
        done = prompt + answer.rstrip("\n")
    return compact(token_ids, loss_mask)


class _Template:
    """A chat's text by the base model's template. Refuses one that leaves out what the chat has."""

    def __init__(self, row: Chat, tokenizer: Tokenizer) -> None:
        self._turns = [{name: value for name, value in turn.items() if name != "weight"} for turn in row.messages]
        self._tools = list(row.tools)
        self._tokenizer = tokenizer
        if self._tools and self._apply(self._turns, self._tools) == self._apply(self._turns, []):
            raise _left_out("`tools`")
        called = any("tool_calls" in turn for turn in self._turns)
        silent = [{name: value for name, value in turn.items() if name != "tool_calls"} for turn in self._turns]
        if called and self._apply(self._turns, self._tools) == self._apply(silent, self._tools):
            raise _left_out("`tool_calls`")
        mute = [{**turn, "content": ""} if turn["role"] == "tool" else turn for turn in self._turns]
        if mute != self._turns and self._apply(self._turns, self._tools) == self._apply(mute, self._tools):
            raise _left_out("the answers of tools")

    def text(self, turns: int, *, answer_next: bool) -> str:
        """Of the first `turns` messages, and with `answer_next` of what comes before the assistant's answer."""
        return self._apply(self._turns[:turns], self._tools, answer_next=answer_next)

    def _apply(self, turns: Any, tools: Any, *, answer_next: bool = False) -> str:
        given: dict[str, Any] = {"tools": tools} if tools else {}
        try:
            return self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=answer_next, **given
            )
        except Exception as error:
            # Templates are programs of the base model: jinja2's errors, and whatever Python raises inside.
            if type(error).__module__.startswith("jinja2") or isinstance(error, TypeError | KeyError | ValueError):
                raise InvalidArgument(
                    f"The base model's chat template refuses a conversation: {error}. Bring the roles into the order "
                    "that it expects, or use another base model.",
                    reason="CHAT_TEMPLATE_REFUSED",
                ) from error
            raise


def _left_out(what: str) -> InvalidArgument:
    return InvalidArgument(
        f"The base model's chat template leaves out {what}: the model would never see them. Use a base model whose "
        "template renders tools, or write them into the messages.",
        reason="CHAT_TEMPLATE_WITHOUT_TOOLS",
    )
