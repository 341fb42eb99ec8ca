"""What an evaluation asks of a data set's rows, and what it compares the answers with.

A row of completions is asked for its answer, a preference for the log-probabilities of both answers, a text for its
own, and a graded prompt for samples. The prompt is the one that training on the same row would render. Does not know
models, tokenizers or who answers.
"""

import hashlib
import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graft.data.canonical import Chat, Message, Pair, Preference, Text, Tool, canonical
from graft.data.graded import graded_prompt
from graft.data.reading import naming_row, read_rows
from graft.data.split import canonical_json
from graft.data.spool import View, spooled
from graft.data.tasks.definition import TaskDefinition
from graft.data.tasks.rows import FORMATS, inputs_of, trained_as
from graft.data.tasks.templates import render_choices
from graft.domain.errors import FieldViolation, InvalidArgument
from graft.domain.evaluations import METRICS
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
    """A prompt whose answers are graded."""

    prompt: Prompt
    row: Mapping[str, Any]
    """The whole row, as a grader sees it in training."""


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

    items: Sequence[Question]
    """On disk, each read when it is asked for."""
    labels: tuple[str, ...]
    """Of a classification; empty for free text."""
    metrics: tuple[str, ...]
    """Those that fit; the first decides."""
    max_tokens: int
    temperature: float
    stop: tuple[str, ...]
    title: str


def read_questions(
    path: Path, format: DatasetFormat, task: TaskDefinition | None = None, *, max_rows: int = 0, graded: bool = False
) -> Questions:
    """The questions of a validated file's rows, or of `max_rows` of them chosen by the hash of their content.

    `graded`: answers to rows of fields are judged by a grader rather than compared with the task's completion.

    Raises InvalidArgument, naming the row: INVALID_TASK_ROW for what a task's template misses and for an answer that is
    none of its choices, NOTHING_TO_ASK.
    """
    rows = enumerate(read_rows(path), start=1)
    items: Sequence[Question] = spooled(
        _numbered(number, row, format, task, graded=graded)
        for number, row in (_chosen(rows, max_rows) if max_rows else rows)
    )
    if not items:
        raise InvalidArgument("The data set has no rows to ask.", reason="NOTHING_TO_ASK")
    decoding = task.decoding if task else None
    labels = _task_labels(task) if format in FORMATS and not graded else ()
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


def _numbered(
    row_number: int, row: Mapping[str, Any], format: DatasetFormat, task: TaskDefinition | None, *, graded: bool
) -> Question:
    with naming_row(row_number):
        return question(row, format, task, graded=graded)


def question(
    row: Mapping[str, Any], format: DatasetFormat, task: TaskDefinition | None = None, *, graded: bool = False
) -> Question:
    """One row's question. Raises InvalidArgument for a row that has no answer to compare with."""
    if format is DatasetFormat.GRADED_PROMPTS or (graded and format is DatasetFormat.FIELDS):
        return Grade(_prompt(graded_prompt(row, format, task).prompt), row)
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
    Raises InvalidArgument (SHOTS_OF_ANOTHER_KIND) for raw text before a chat, and for turns before raw text.
    """
    if any(isinstance(shot.prompt, str) is not isinstance(prompt, str) for shot in shots):
        raise InvalidArgument(
            "Shots that are raw text cannot be shown before a chat, nor turns of a chat before raw text: take them "
            "from rows of the same format as those that are asked.",
            reason="SHOTS_OF_ANOTHER_KIND",
        )
    if isinstance(prompt, str):
        return SHOT_SEPARATOR.join([*(f"{shot.prompt}{shot.completion}" for shot in shots), prompt])
    system = tuple(message for message in prompt[:1] if message["role"] == "system")
    turns: list[Message] = []
    for shot in shots:
        assert not isinstance(shot.prompt, str)
        turns += [message for message in shot.prompt if message["role"] != "system"]
        turns.append({"role": "assistant", "content": shot.completion})
    return (*system, *turns, *prompt[len(system) :])


def choose_shots(questions: Questions, count: int) -> list[Ask]:
    """The first rows of a set, as many of each label as `count` allows, alternating.

    Raises InvalidArgument (TOO_FEW_SHOTS) when there are not so many.
    """
    of_label: dict[str, list[Ask]] = {label: [] for label in questions.labels or ("",)}
    for item in questions.items:
        if isinstance(item, Ask):
            rows = of_label.get(item.reference if questions.labels else "")
            if rows is not None and len(rows) < count:
                rows.append(item)
    longest = max(map(len, of_label.values()))
    chosen = [rows[place] for place in range(longest) for rows in of_label.values() if place < len(rows)]
    if len(chosen) < count:
        raise InvalidArgument(
            f"{count} shots were asked for, and the data set of shots has {len(chosen)} rows to show.",
            reason="TOO_FEW_SHOTS",
        )
    return chosen[:count]


def _chosen(rows: Iterable[tuple[int, Mapping[str, Any]]], count: int) -> Iterable[tuple[int, Mapping[str, Any]]]:
    def key(row: Mapping[str, Any]) -> bytes:
        return hashlib.blake2b(canonical_json(row), digest_size=16).digest()

    smallest = heapq.nsmallest(count, rows, key=lambda item: (key(item[1]), item[0]))
    return sorted(smallest, key=lambda item: item[0])


def _prompt(value: str | Sequence[Message]) -> Prompt:
    return value if isinstance(value, str) else tuple(value)


def _ask(
    prompt: Prompt, completion: str, tools: tuple[Tool, ...], task: TaskDefinition | None, choices: tuple[str, ...]
) -> Ask:
    ask = Ask(prompt, completion, completion.strip(), tools, choices)
    if task is None or not choices:
        return ask
    labels = _task_labels(task)
    reference = label_of(ask, labels, ask.reference)
    if reference not in labels:
        told = f"{reference[:80]!r} is none of the task's choices: {', '.join(labels)}"
        raise InvalidArgument(
            f"{task.completion.field}: {told}.",
            reason="INVALID_TASK_ROW",
            metadata={"task": task.name},
            violations=(FieldViolation(task.completion.field, told),),
        )
    return replace(ask, reference=reference)


def _task_labels(task: TaskDefinition | None) -> tuple[str, ...]:
    if task is None:
        return ()
    return task.labels if task.decoding.choose_label else task.decoding.choices


def _found_labels(items: Sequence[Question]) -> tuple[tuple[str, ...], Sequence[Question]]:
    """The labels that the rows' answers are, if they are few, and the questions with them as choices."""
    spelled: dict[str, str] = {}
    for item in items:
        if not isinstance(item, Ask):
            return (), items
        spelled[item.reference] = item.completion
        if len(spelled) > MOST_LABELS:
            return (), items
    if len(spelled) < 2 or len(items) < ROWS_A_LABEL * len(spelled):
        return (), items
    labels = tuple(sorted(spelled))
    choices = tuple(spelled[label] for label in labels)

    def held_to(index: int) -> Question:
        item = items[index]
        assert isinstance(item, Ask)
        return replace(item, choices=choices)

    return labels, View(len(items), held_to)


def _fitting(first: Question, labels: Sequence[str], task: TaskDefinition | None) -> tuple[str, ...]:
    """The task's metrics that can be computed from such questions, or else those that fit them."""
    match first:
        case Grade():
            return ("pass_at_1",)
        case Rank():
            return ("win_rate",)
        case Predict():
            # Bits per byte first: of two tokenizers, tokens cannot be compared.
            return ("bits_per_byte", "perplexity")
    told = tuple(name for name in task.metrics if METRICS[name] == "answers") if task is not None else ()
    return told or (("accuracy", "macro_f1") if labels else ("rouge_l", "token_f1"))
