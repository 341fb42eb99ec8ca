"""Turns a data set row into token ids and a loss mask, through the base model's own tokenizer and chat template.

The prompt part of a chat is rendered exactly as an inference service renders it (`add_generation_prompt=True`), so that
the served prompt is the trained prompt, token for token. Does not know files or lengths (`graft.data.prepare`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from graft.domain.errors import InvalidArgument


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Token ids of a text."""

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """The text of a chat."""


@dataclass(frozen=True)
class Example:
    """One training sequence. `loss_mask[i]` says whether `token_ids[i]` is predicted with loss; both have length T."""

    token_ids: list[int]
    loss_mask: list[bool]


def render(row: Mapping[str, Any], tokenizer: Tokenizer) -> Example:
    """The example of a validated row. Loss on completions and their end token, or on assistant turns with weight 1.

    Raises InvalidArgument when the chat template changes earlier turns: the mask would be wrong.
    """
    return _render_chat(row["messages"], tokenizer) if "messages" in row else _render_pair(row, tokenizer)


def _render_pair(row: Mapping[str, Any], tokenizer: Tokenizer) -> Example:
    # Encoded apart, because the service sees the prompt alone: a merge across the border would never occur there.
    prompt = tokenizer.encode(row["prompt"], add_special_tokens=True)
    completion = tokenizer.encode(row["completion"], add_special_tokens=False)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return Example(prompt + completion + end, [False] * len(prompt) + [True] * (len(completion) + len(end)))


def _render_chat(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> Example:
    token_ids: list[int] = []
    loss_mask: list[bool] = []
    done = ""

    def extend(text: str, *, learned: bool) -> None:
        pieces = tokenizer.encode(text, add_special_tokens=False)
        token_ids.extend(pieces)
        loss_mask.extend([learned] * len(pieces))

    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(turns[:index], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turns[: index + 1], tokenize=False, add_generation_prompt=False)
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
    return Example(token_ids, loss_mask)
