"""What an evaluation asks of a data set's rows, and what it compares the answers with.

A row of completions is asked for its answer, a preference for the log-probabilities of both answers, a text for its
own, and a graded prompt for samples. The prompt is the one that training on the same row would render. Does not know
models, tokenizers or who answers.
"""

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graft.data.canonical import Chat, GradedPrompt, Message, Pair, Preference, Text, Tool, canonical
from graft.data.reading import read_rows
from graft.data.split import canonical_json
from graft.data.tasks.definition import TaskDefinition
from graft.data.tasks.rows import FORMATS, inputs_of, to_prompt, trained_as
from graft.data.tasks.templates import render_choices
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
    completion: str
    """The good answer as training learns it, white space and a task's template included."""
    reference: str
    """What an answer is compared with: the completion without white space around it, or its label."""
    tools: tuple[Tool, ...] = ()
    choices: tuple[str, ...] = ()
    """Of a classification: the completion of each of the questions' labels, to which the answer is held. A model that
    learned ` yes` would hesitate between `yes` and `no`."""


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
    """Of a classification; empty for free text."""
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
    labels = _task_labels(task)
    if not labels:
        labels, items = _found_labels(items)
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
    choices = render_choices(task, inputs_of(task, row)) if task is not None and format in FORMATS else ()
    if isinstance(found, Pair):
        return _ask(found.prompt, found.completion, (), task, choices)
    if isinstance(found, Chat):
        *asked, answer = found.messages
        if answer["role"] != "assistant":
            raise InvalidArgument("A chat that is asked must end with the assistant's turn.", reason="NOTHING_TO_ASK")
        return _ask(tuple(asked), str(answer["content"]), found.tools, task, choices)
    if isinstance(found, Preference):
        return Rank(_prompt(found.prompt), _prompt(found.chosen), _prompt(found.rejected), found.tools)
    assert isinstance(found, Text)
    return Predict(found.text)


def label_of(ask: Ask, labels: Sequence[str], answer: str) -> str:
    """The label whose completion an answer is; the answer itself where it is none."""
    for label, choice in zip(labels, ask.choices, strict=False):
        if choice.strip() == answer.strip():
            return label
    return answer


def with_shots(prompt: Prompt, shots: Sequence[Ask]) -> Prompt:
    """The prompt after `shots`: as earlier turns of the same chat, or as raw text before it.

    Of shots in a chat only the turns count, since the prompt has a system message of its own.
    """
    if isinstance(prompt, str):
        shown = [f"{shot.prompt}{shot.completion}" for shot in shots if isinstance(shot.prompt, str)]
        return SHOT_SEPARATOR.join([*shown, prompt])
    system = tuple(message for message in prompt[:1] if message["role"] == "system")
    turns: list[Message] = []
    for shot in shots:
        if not isinstance(shot.prompt, str):
            turns += [message for message in shot.prompt if message["role"] != "system"]
            turns.append({"role": "assistant", "content": shot.completion})
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


def _ask(
    prompt: Prompt, completion: str, tools: tuple[Tool, ...], task: TaskDefinition | None, choices: tuple[str, ...]
) -> Ask:
    labels = _task_labels(task) if choices else ()
    ask = Ask(prompt, completion, completion.strip(), tools, choices)
    return replace(ask, reference=label_of(ask, labels, ask.reference))


def _task_labels(task: TaskDefinition | None) -> tuple[str, ...]:
    if task is None:
        return ()
    return task.labels if task.decoding.choose_label else task.decoding.choices


def _found_labels(items: tuple[Question, ...]) -> tuple[tuple[str, ...], tuple[Question, ...]]:
    """The labels that the rows' answers are, if they are few, and the questions with them as choices."""
    asks = [item for item in items if isinstance(item, Ask)]
    spelled = {item.reference: item.completion for item in asks}
    if len(asks) < len(items) or not 2 <= len(spelled) <= MOST_LABELS or len(asks) < ROWS_A_LABEL * len(spelled):
        return (), items
    labels = tuple(sorted(spelled))
    choices = tuple(spelled[label] for label in labels)
    return labels, tuple(replace(ask, choices=choices) for ask in asks)


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
