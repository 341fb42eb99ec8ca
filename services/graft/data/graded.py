"""Prompts whose answers are graded, as sequences of tokens. Does not know files (`graft.data.prepare`) or graders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graft.data.canonical import GradedPrompt
from graft.data.rendering import Example, Tokenizer, compact, prompt_ids


@dataclass(frozen=True)
class PromptExample:
    """A prompt as the inference service would make it, and the row that its answers are graded by."""

    token_ids: Sequence[int]
    row: Mapping[str, Any]


def render_prompt(row: GradedPrompt, tokenizer: Tokenizer) -> Example:
    """The prompt's tokens, none of them learned. Raises InvalidArgument as `prompt_ids`."""
    token_ids = prompt_ids(row.prompt, tokenizer)
    return compact(token_ids, [0] * len(token_ids))
