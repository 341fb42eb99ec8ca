"""Reads a validated data set into examples that fit the context, and measures it.

Owns the over-length policy. Does not know batches or devices (`graft.training`).
"""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from graft.data.canonical import canonical
from graft.data.reading import read_rows
from graft.data.rendering import Example, Tokenizer, render
from graft.data.split import Split
from graft.domain.errors import FieldViolation, InvalidArgument
from graft.domain.jobs import OverLengthPolicy
from graft.domain.resources import DatasetFormat

__all__ = ["DataStats", "Example", "Prepared", "prepare", "render_row"]

REPORTED_ROWS = 20


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
    split: Split | None = None,
) -> Prepared:
    """Renders every row, or those on one side of a `split`, and applies the policy to those with more than
    `context_tokens` tokens.

    Raises InvalidArgument: OVER_LENGTH_EXAMPLES under the policy `fail`, naming the first 20 rows, NO_EXAMPLES when
    nothing is left to learn from, and as `canonical` and `render` for rows that are no text to learn, naming the row.
    """
    examples: list[Example] = []
    lengths = array("L")
    over: list[FieldViolation] = []
    over_count = 0
    for row_number, row in enumerate(read_rows(path), start=1):
        if split is not None and not split.takes(row):
            continue
        example = render_row(row, format, tokenizer, row_number)
        lengths.append(len(example.token_ids))
        if len(example.token_ids) <= context_tokens:
            examples.append(example)
            continue
        over_count += 1
        if len(over) < REPORTED_ROWS:
            over.append(FieldViolation(f"row {row_number}", f"has {len(example.token_ids)} tokens"))
        if policy is OverLengthPolicy.TRUNCATE and (cut := _cut_prompt(example, context_tokens)) is not None:
            examples.append(cut)
    if over and policy is OverLengthPolicy.FAIL:
        raise InvalidArgument(
            f"{over_count} of {len(lengths)} rows are longer than {context_tokens} tokens "
            f"(the longest has {max(lengths)}), and over_length_policy is fail. Shorten them, or drop or truncate.",
            reason="OVER_LENGTH_EXAMPLES",
            metadata={"over_length": str(over_count)},
            violations=tuple(over),
        )
    if not lengths:
        side = "held out" if split is not None and split.held_out else "left to train on"
        raise InvalidArgument(
            f"No row is {side}: the data set is too small for this validation_fraction. Change it, or name a "
            "validation data set.",
            reason="NO_EXAMPLES",
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
        over_length_count=over_count,
    )
    return Prepared(tuple(examples), stats)


def render_row(row: Mapping[str, Any], format: DatasetFormat, tokenizer: Tokenizer, row_number: int) -> Example:
    """The example of a file's row. A refusal names the row, counted from 1."""
    try:
        return render(canonical(row, format), tokenizer)
    except InvalidArgument as error:
        raise InvalidArgument(
            f"Row {row_number}: {error.message}",
            reason=error.reason,
            metadata=error.metadata,
            violations=(FieldViolation(f"row {row_number}", error.message),),
        ) from None


def _cut_prompt(example: Example, context_tokens: int) -> Example | None:
    """Drops tokens from the start, never a learned one. None when the learned part alone is too long."""
    start = len(example.token_ids) - context_tokens
    # One token must stay before the first learned one: it is predicted from something.
    if any(example.loss_mask[: start + 1]):
        return None
    return Example(example.token_ids[start:], example.loss_mask[start:])
