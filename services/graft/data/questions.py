"""What an evaluation asks of a data set's rows, and what it compares the answers with.

A row of completions is asked for its answer, a preference for the log-probabilities of both answers, a text for its
own, and a graded prompt for samples. The prompt is the one that training on the same row would render. Does not know
models, tokenizers or who answers.
"""

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.data.canonical import Chat, GradedPrompt, Message, Pair, Preference, Text, Tool, canonical
from graft.data.reading import read_rows
from graft.data.split import canonical_json
from graft.data.tasks.definition import TaskDefinition
from graft.data.tasks.rows import FORMATS, to_prompt, trained_as
from graft.domain.errors import InvalidArgument
from graft.domain.resources import DatasetFormat

MOST_LABELS = 20
ROWS_A_LABEL = 5
"""Answers are labels when there are at most so many different ones, and so many rows for each."""
DEFAULT_MAX_TOKENS = 64
SHOT_SEPARATOR = "\n\n"
"""Between raw prompts shown as examples."""

Prompt = str | tuple[Message, ...]


@dataclass(frozen=True)
class Ask:
    """A prompt to be answered, and what a good answer is."""

    prompt: Prompt
    reference: str
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True)
class Grade:
    """A prompt whose answers are graded by the row's other fields."""

    prompt: Prompt
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Rank:
    """Two answers of which the first should be likelier."""

    prompt: Prompt
    chosen: Prompt
    rejected: Prompt
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True)
class Predict:
    """A text to be predicted."""

    text: str


Question = Ask | Grade | Rank | Predict


@dataclass(frozen=True)
class Questions:
    """All that is asked, in the file's order, and how answers are generated."""

    items: tuple[Question, ...]
    labels: tuple[str, ...]
    """Every possible answer of a classification, to which answers are held; empty for free text."""
    metrics: tuple[str, ...]
    """Those that fit; the first decides."""
    max_tokens: int
    temperature: float
    stop: tuple[str, ...]
    title: str


def read_questions(
    path: Path, format: DatasetFormat, task: TaskDefinition | None = None, *, max_rows: int = 0
) -> Questions:
    """The questions of a validated file's rows, or of `max_rows` of them chosen by the hash of their content.

    Raises InvalidArgument: INVALID_TASK_ROW naming what a task's template misses, NOTHING_TO_ASK.
    """
    rows = read_rows(path) if not max_rows else _chosen(read_rows(path), max_rows)
    items = tuple(question(row, format, task) for row in rows)
    if not items:
        raise InvalidArgument("The data set has no rows to ask.", reason="NOTHING_TO_ASK")
    decoding = task.decoding if task else None
    labels = task.labels if task and task.decoding.choose_label else ()
    labels = labels or tuple(decoding.choices if decoding else ()) or _labels(items)
    return Questions(
        items,
        labels,
        _fitting(items[0], labels, task),
        decoding.max_tokens if decoding else DEFAULT_MAX_TOKENS,
        decoding.temperature if decoding else 0.0,
        decoding.stop if decoding else (),
        task.name if task else format.value.replace("_", " "),
    )


def question(row: Mapping[str, Any], format: DatasetFormat, task: TaskDefinition | None = None) -> Question:
    """One row's question. Raises InvalidArgument for a row that has no answer to compare with."""
    if format is DatasetFormat.GRADED_PROMPTS and task is None:
        found = canonical(row, format)
        assert isinstance(found, GradedPrompt)
        return Grade(_prompt(found.prompt), found.row)
    if task is not None and format is DatasetFormat.GRADED_PROMPTS:
        return Grade(_prompt(to_prompt(task, row)), row)
    trained, shape = trained_as(task if format in FORMATS else None, row, format)
    found = canonical(trained, shape)
    if isinstance(found, Pair):
        return Ask(found.prompt, found.completion.strip())
    if isinstance(found, Chat):
        *asked, answer = found.messages
        if answer["role"] != "assistant":
            raise InvalidArgument("A chat that is asked must end with the assistant's turn.", reason="NOTHING_TO_ASK")
        return Ask(tuple(asked), str(answer["content"]).strip(), found.tools)
    if isinstance(found, Preference):
        return Rank(_prompt(found.prompt), _prompt(found.chosen), _prompt(found.rejected), found.tools)
    assert isinstance(found, Text)
    return Predict(found.text)


def with_shots(prompt: Prompt, shots: Sequence[Ask]) -> Prompt:
    """The prompt after `shots`: as earlier turns of the same chat, or as raw text before it.

    Of shots in a chat only the turns count, since the prompt has a system message of its own.
    """
    if isinstance(prompt, str):
        shown = [f"{shot.prompt.rstrip()} {shot.reference}" for shot in shots if isinstance(shot.prompt, str)]
        return SHOT_SEPARATOR.join([*shown, prompt])
    system = tuple(message for message in prompt[:1] if message["role"] == "system")
    turns: list[Message] = []
    for shot in shots:
        if not isinstance(shot.prompt, str):
            turns += [message for message in shot.prompt if message["role"] != "system"]
            turns.append({"role": "assistant", "content": shot.reference})
    return (*system, *turns, *prompt[len(system) :])


def choose_shots(questions: Questions, count: int) -> list[Ask]:
    """The first rows of a set, as many of each label as `count` allows, alternating.

    Raises InvalidArgument (TOO_FEW_SHOTS) when there are not so many.
    """
    asks = [item for item in questions.items if isinstance(item, Ask)]
    chosen = asks
    if questions.labels:
        by_label = [[ask for ask in asks if ask.reference == label] for label in questions.labels]
        longest = max(map(len, by_label))
        chosen = [rows[place] for place in range(longest) for rows in by_label if place < len(rows)]
    if len(chosen) < count:
        raise InvalidArgument(
            f"{count} shots were asked for, and the data set of shots has {len(chosen)} rows to show.",
            reason="TOO_FEW_SHOTS",
        )
    return chosen[:count]


def _chosen(rows: Iterable[Mapping[str, Any]], count: int) -> Iterator[Mapping[str, Any]]:
    def key(row: Mapping[str, Any]) -> bytes:
        return hashlib.blake2b(canonical_json(row), digest_size=16).digest()

    smallest = heapq.nsmallest(count, enumerate(rows), key=lambda item: (key(item[1]), item[0]))
    return (row for _, row in sorted(smallest, key=lambda item: item[0]))


def _prompt(value: str | Sequence[Message]) -> Prompt:
    return value if isinstance(value, str) else tuple(value)


def _labels(items: Sequence[Question]) -> tuple[str, ...]:
    answers = [item.reference for item in items if isinstance(item, Ask)]
    found = set(answers)
    if not 2 <= len(found) <= MOST_LABELS or len(answers) < ROWS_A_LABEL * len(found):
        return ()
    return tuple(sorted(found))


def _fitting(first: Question, labels: Sequence[str], task: TaskDefinition | None) -> tuple[str, ...]:
    match first:
        case Grade():
            return ("pass_at_1",)
        case Rank():
            return ("win_rate",)
        case Predict():
            return ("perplexity", "bits_per_byte")
    if task is not None and task.metrics:
        return task.metrics
    return ("accuracy", "macro_f1") if labels else ("rouge_l", "token_f1")
