"""Reads a validated data set into what a method learns from, within the context, and measures it.

Owns the over-length policy, the cutting of documents and which tokens have loss. Does not know batches or devices
(`graft.training`).
"""

import pickle
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from statistics import median
from typing import Any

from graft.data.canonical import Preference, canonical
from graft.data.graded import PromptExample, graded_prompt, render_prompt
from graft.data.preference import PreferenceExample, render_preference
from graft.data.reading import naming_row, read_rows
from graft.data.rendering import Example, Tokenizer, render
from graft.data.split import Split
from graft.data.spool import Records, Spool, View
from graft.data.tasks.definition import TaskDefinition
from graft.data.tasks.rows import trained_as
from graft.domain.errors import FieldViolation, InvalidArgument
from graft.domain.jobs import LossOn, Method, OverLengthPolicy
from graft.domain.resources import DatasetFormat

__all__ = ["DataStats", "Example", "PreferenceExample", "Prepared", "PromptExample", "prepare", "render_row"]

REPORTED_ROWS = 20


@dataclass(frozen=True)
class DataStats:
    """Measurements of a data set under one tokenizer, context, policy and method."""

    row_count: int
    example_count: int
    """What an epoch has: rows that are trained on, or pieces of documents."""
    tokens: int
    """Prompt and completion, over all examples; of a preference both answers, each with its prompt."""
    completion_tokens: int
    """Tokens with loss."""
    longest_tokens: int
    """Longest row before the policy was applied; of a preference its longer answer with the prompt."""
    median_tokens: int
    """Of the sequences."""
    over_length_count: int
    """Rows longer than the context, whatever became of them."""


@dataclass(frozen=True)
class Prepared:
    """What is learned from, in the file's order, and its measurements. `pairs` are those of the preference method and
    `prompts` those of reinforcement, which have no `examples`. All are on disk, with the rows that graders read, and
    each is read when it is asked for."""

    examples: Sequence[Example]
    stats: DataStats
    pairs: Sequence[PreferenceExample] = ()
    prompts: Sequence[PromptExample] = ()

    @property
    def sequences(self) -> Sequence[Example]:
        """What a model should come to say: the examples, or the chosen answers; of prompts, whose answers are yet to be
        sampled, the prompts."""
        if self.pairs:
            return View(len(self.pairs), lambda index: self.pairs[index].chosen)
        prompts = self.prompts
        return self.examples or View(len(prompts), lambda index: _all_learned(Example(prompts[index].token_ids, b"")))

    def within(self, items: int, tokens: int) -> "Prepared":
        """The first of the examples or pairs, so many or so few that they have at most so many tokens; at least one."""
        sizes = chain((len(example.token_ids) for example in self.examples), (pair.tokens for pair in self.pairs))
        count, total = 0, 0
        for size in islice(sizes, items):
            total += size
            if count and total > tokens:
                break
            count += 1
        return replace(self, examples=self.examples[:count], pairs=self.pairs[:count])


def prepare(
    path: Path,
    format: DatasetFormat,
    tokenizer: Tokenizer,
    context_tokens: int,
    policy: OverLengthPolicy,
    split: Split | None = None,
    *,
    method: Method = Method.SUPERVISED,
    loss_on: LossOn = LossOn.COMPLETION,
    task: TaskDefinition | None = None,
) -> Prepared:
    """Renders every row, or those on one side of a `split`, and applies the policy to those with more than
    `context_tokens` tokens. Of a preference both answers must fit; what is cut from the prompt is cut from both. Of a
    prompt that is graded `context_tokens` is what its answer leaves of the context. Rows of fields are rendered through
    the `task`.

    The policy does not apply to self-supervised learning: longer documents are cut into pieces, and nothing is lost.
    `loss_on` is supervised learning's choice; the other methods have none.

    Raises InvalidArgument: OVER_LENGTH_EXAMPLES under the policy `fail`, naming the first 20 rows, NO_EXAMPLES when
    nothing is left to learn from, and as `canonical` and `render` for rows that are no text to learn, naming the row.
    """
    spool = Spool()
    graded = Records()
    lengths, sizes = array("L"), array("L")
    learned_tokens = 0
    over: list[FieldViolation] = []
    over_count = 0
    for row_number, row in enumerate(read_rows(path), start=1):
        if split is not None and not split.takes(row):
            continue
        sequences = _sequences(row, format, tokenizer, row_number, method, task)
        length = max(len(sequence.token_ids) for sequence in sequences)
        lengths.append(length)
        if length > context_tokens:
            over_count += 1
            if len(over) < REPORTED_ROWS:
                over.append(FieldViolation(f"row {row_number}", f"has {length} tokens"))
        kept: Iterable[Example] = ()
        if method is Method.SELF_SUPERVISED:
            kept = chain.from_iterable(_pieces(sequence, context_tokens) for sequence in sequences)
        elif length <= context_tokens:
            kept = sequences
        elif policy is OverLengthPolicy.TRUNCATE:
            kept = _cut_prompt(sequences, length - context_tokens)
        if method is Method.SUPERVISED and loss_on is LossOn.ALL:
            # Only now: the mask has said where a prompt may be cut.
            kept = map(_all_learned, kept)
        if method is Method.REINFORCEMENT and kept:
            graded.add(pickle.dumps(row, pickle.HIGHEST_PROTOCOL))
        for example in kept:
            spool.add(example)
            sizes.append(len(example.token_ids))
            # The first token of a sequence is predicted from nothing.
            learned_tokens += sum(example.loss_mask[1:])
    if over and policy is OverLengthPolicy.FAIL and method is not Method.SELF_SUPERVISED:
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
    if not spool:
        raise InvalidArgument(
            f"None of the {len(lengths)} {format} rows fits {context_tokens} tokens; "
            f"the shortest has {min(lengths, default=0)}.",
            reason="NO_EXAMPLES",
        )
    sequences_of_item = 2 if method is Method.PREFERENCE else 1
    stats = DataStats(
        row_count=len(lengths),
        example_count=len(spool) // sequences_of_item,
        tokens=sum(sizes),
        completion_tokens=learned_tokens,
        longest_tokens=max(lengths),
        median_tokens=int(median(sizes)),
        over_length_count=over_count,
    )
    examples = spool.read()
    if method is Method.PREFERENCE:
        pairs = View(stats.example_count, lambda index: PreferenceExample(*examples[2 * index : 2 * index + 2]))
        return Prepared((), stats, pairs)
    if method is Method.REINFORCEMENT:
        judged_by = graded.read(pickle.loads)
        prompts = View(len(judged_by), lambda index: PromptExample(examples[index].token_ids, judged_by[index]))
        return Prepared((), stats, prompts=prompts)
    return Prepared(examples, stats)


def render_row(
    row: Mapping[str, Any],
    format: DatasetFormat,
    tokenizer: Tokenizer,
    row_number: int,
    task: TaskDefinition | None = None,
) -> Example:
    """The example of a file's row. A refusal names the row, counted from 1."""
    with naming_row(row_number):
        return render(canonical(*trained_as(task, row, format)), tokenizer)


def _sequences(
    row: Mapping[str, Any],
    format: DatasetFormat,
    tokenizer: Tokenizer,
    row_number: int,
    method: Method,
    task: TaskDefinition | None,
) -> tuple[Example, ...]:
    """The example of a row, the two answers of a preference, or the prompt whose answers are graded."""
    if method not in (Method.PREFERENCE, Method.REINFORCEMENT):
        return (render_row(row, format, tokenizer, row_number, task),)
    with naming_row(row_number):
        if method is Method.REINFORCEMENT:
            return (render_prompt(graded_prompt(row, format, task), tokenizer),)
        found = canonical(row, format)
        if not isinstance(found, Preference):
            raise InvalidArgument(
                f"{format} rows have no two answers to choose from. Use `prompt`/`chosen`/`rejected` rows, or the "
                "supervised method.",
                reason="NOT_A_PREFERENCE",
            )
        pair = render_preference(found, tokenizer)
        return pair.chosen, pair.rejected


def _pieces(document: Example, context_tokens: int) -> Iterator[Example]:
    """A document in pieces. Each begins with the last token of the one before: every token but the first is predicted,
    and once."""
    for start in range(0, max(1, len(document.token_ids) - 1), context_tokens - 1):
        end = start + context_tokens
        yield Example(document.token_ids[start:end], document.loss_mask[start:end])


def _cut_prompt(sequences: Sequence[Example], tokens: int) -> tuple[Example, ...]:
    """Drops so many tokens from the start of each, never a learned one. Empty when the learned part is too long."""
    # One token must stay before the first learned one: it is predicted from something.
    if any(any(sequence.loss_mask[: tokens + 1]) for sequence in sequences):
        return ()
    return tuple(Example(sequence.token_ids[tokens:], sequence.loss_mask[tokens:]) for sequence in sequences)


def _all_learned(example: Example) -> Example:
    return Example(example.token_ids, bytes([1]) * len(example.token_ids))
