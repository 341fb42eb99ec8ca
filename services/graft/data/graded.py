"""Prompts whose answers are graded, as sequences of tokens. Does not know files (`graft.data.prepare`) or graders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graft.data.canonical import GradedPrompt, canonical, messages
from graft.data.rendering import Example, Tokenizer, compact, prompt_ids
from graft.data.tasks.definition import TaskDefinition
from graft.data.tasks.rows import to_prompt
from graft.domain.errors import InvalidArgument
from graft.domain.resources import DatasetFormat


@dataclass(frozen=True)
class PromptExample:
    """A prompt as the inference service would make it, and the row that its answers are graded by."""

    token_ids: Sequence[int]
    row: Mapping[str, Any]


def graded_prompt(row: Mapping[str, Any], format: DatasetFormat, task: TaskDefinition | None) -> GradedPrompt:
    """The prompt of a row; of fields, the one that the task makes of them.

    Raises InvalidArgument NOT_A_GRADED_PROMPT for rows of another kind, and as `canonical` and `to_prompt`.
    """
    if task is not None and format is DatasetFormat.FIELDS:
        asked = to_prompt(task, row)
        return GradedPrompt(asked if isinstance(asked, str) else messages(asked), row)
    found = canonical(row, format)
    if not isinstance(found, GradedPrompt):
        raise InvalidArgument(
            f"{format} rows are no prompts to be graded. Use rows of a `prompt`, or of `messages` that end with the "
            "user's, and of what the grader judges by.",
            reason="NOT_A_GRADED_PROMPT",
        )
    return found


def render_prompt(row: GradedPrompt, tokenizer: Tokenizer) -> Example:
    """The prompt's tokens, none of them learned. Raises InvalidArgument as `prompt_ids`."""
    token_ids = prompt_ids(row.prompt, tokenizer)
    return compact(token_ids, [0] * len(token_ids))
