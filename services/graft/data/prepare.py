"""Reads a validated data set into examples that fit the context, and measures it.

Owns the over-length policy. Does not know batches or devices (`graft.training`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from graft.data.formats import read_rows
from graft.data.rendering import Example, Tokenizer, render
from graft.domain.errors import FieldViolation, InvalidArgument
from graft.domain.jobs import OverLengthPolicy
from graft.domain.resources import DatasetFormat

__all__ = ["DataStats", "Example", "Prepared", "prepare"]


@dataclass(frozen=True)
class DataStats:
    """Measurements of a data set under one tokenizer, context and policy."""

    row_count: int
    example_count: int
    """Rows that are trained on."""
    tokens: int
    """Prompt and completion, over all examples."""
    completion_tokens: int
    """Tokens with loss."""
    longest_tokens: int
    """Longest row before the policy was applied."""
    median_tokens: int
    over_length_count: int
    """Rows longer than the context, whatever became of them."""


@dataclass(frozen=True)
class Prepared:
    """Examples in the file's order, and their measurements."""

    examples: tuple[Example, ...]
    stats: DataStats


def prepare(
    path: Path,
    format: DatasetFormat,
    tokenizer: Tokenizer,
    context_tokens: int,
    policy: OverLengthPolicy,
) -> Prepared:
    """Renders every row and applies the policy to those with more than `context_tokens` tokens.

    Raises InvalidArgument: OVER_LENGTH_EXAMPLES under the policy `fail`, naming the first 20 rows, and NO_EXAMPLES when
    nothing is left to learn from.
    """
    examples: list[Example] = []
    lengths: list[int] = []
    over_rows: list[int] = []
    for row_number, example in enumerate(_render_all(path, tokenizer), start=1):
        lengths.append(len(example.token_ids))
        if len(example.token_ids) <= context_tokens:
            examples.append(example)
            continue
        over_rows.append(row_number)
        if policy is OverLengthPolicy.TRUNCATE and (cut := _cut_prompt(example, context_tokens)) is not None:
            examples.append(cut)
    if over_rows and policy is OverLengthPolicy.FAIL:
        raise InvalidArgument(
            f"{len(over_rows)} of {len(lengths)} rows are longer than {context_tokens} tokens "
            f"(the longest has {max(lengths)}), and over_length_policy is fail. Shorten them, or drop or truncate.",
            reason="OVER_LENGTH_EXAMPLES",
            metadata={"over_length": str(len(over_rows))},
            violations=tuple(
                FieldViolation(f"row {number}", f"has {lengths[number - 1]} tokens") for number in over_rows[:20]
            ),
        )
    if not examples:
        raise InvalidArgument(
            f"None of the {len(lengths)} {format} rows fits {context_tokens} tokens; "
            f"the shortest has {min(lengths, default=0)}.",
            reason="NO_EXAMPLES",
        )
    kept = [len(example.token_ids) for example in examples]
    stats = DataStats(
        row_count=len(lengths),
        example_count=len(examples),
        tokens=sum(kept),
        completion_tokens=sum(sum(example.loss_mask) for example in examples),
        longest_tokens=max(lengths),
        median_tokens=int(median(kept)),
        over_length_count=len(over_rows),
    )
    return Prepared(tuple(examples), stats)


def _render_all(path: Path, tokenizer: Tokenizer) -> Iterator[Example]:
    for row in read_rows(path):
        yield render(row, tokenizer)


def _cut_prompt(example: Example, context_tokens: int) -> Example | None:
    """Drops tokens from the start, never a learned one. None when the learned part alone is too long."""
    start = len(example.token_ids) - context_tokens
    # One token must stay before the first learned one: it is predicted from something.
    if any(example.loss_mask[: start + 1]):
        return None
    return replace(example, token_ids=example.token_ids[start:], loss_mask=example.loss_mask[start:])
