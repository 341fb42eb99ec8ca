"""Measures a validated data set: lengths, duplicates, leakage, balance, conflicts, and how long training would take.

Reads each file once, row by row, in memory that does not grow with it: a count for each distinct length is kept there,
and what rows are compared by on disk (`graft.data.row_hashes`).
"""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.data.canonical import Canonical, Chat, GradedPrompt, Messages, Pair, Preference, Text, canonical
from graft.data.formats import FileReport
from graft.data.reading import read_rows
from graft.data.rendering import Tokenizer, prompt_ids, render
from graft.data.row_hashes import FIRST_ROWS, RowHashes
from graft.data.tasks.definition import TaskDefinition
from graft.data.tasks.rows import CONVERSATIONS, FORMATS, labelled, trained_as
from graft.domain.errors import FieldViolation, InvalidArgument
from graft.domain.reports import DatasetReport, FoundRows, LabelCount, LengthBin, TrainingEstimate
from graft.domain.resources import DatasetFormat

MEASURED_TOKENS_PER_SECOND = 384.0
MEASURED_PARAMETERS = 135_000_000
"""Training SmolLM2-135M in float32 with LoRA on two cores of a Xeon: `benchmarks/results/training.json`."""
MOST_LABELS = 50
"""Distinct completions beyond it are texts and not labels."""
LONGEST_LABEL_CHARACTERS = 80
BINS = 10


@dataclass(frozen=True)
class Base:
    """The base model that a data set is measured for."""

    id: str
    tokenizer: Tokenizer
    context_tokens: int
    parameter_count: int


def analyse(
    path: Path,
    file: FileReport,
    *,
    base: Base | None = None,
    task: TaskDefinition | None = None,
    held_out: tuple[Path, FileReport] | None = None,
    epochs: float = 1.0,
    tokens_per_second: float | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> DatasetReport:
    """Measures `path`, of which `file` is what its validation told, and what `held_out` shares with it.

    Without a `base` lengths are counted in characters. `tokens_per_second` is by default MEASURED_TOKENS_PER_SECOND
    scaled by the number of parameters, which training is about proportional to. `progress` is told the rows read, of
    both files.

    Rows of fields are measured as the `task` renders them; their labels and conflicts are of the field that it learns,
    and what is no field of it is not compared. Raises InvalidArgument for a task that the file does not fit
    (TASK_UNFIT), or whose labels it does not have (INVALID_LABELS), and ResourceExhausted when the disk for temporary
    files is full.
    """
    if task is not None:
        _check_task(task, file.format)
        task = labelled(task, read_rows(path))
    with RowHashes() as hashes, RowHashes() as held_out_hashes:
        rows = _Rows(file.format, base, task, hashes)
        for number, row in enumerate(read_rows(path), start=1):
            rows.add(row, number)
            progress(number)
        others = None
        if held_out is not None:
            others = _Rows(held_out[1].format, None, task, held_out_hashes)
            for number, row in enumerate(read_rows(held_out[0]), start=1):
                others.add(row, number)
                progress(file.row_count + number)
        return rows.report(file, others, epochs, tokens_per_second)


def default_tokens_per_second(parameter_count: int) -> float:
    """Tokens a second that training a base of so many parameters may be expected to reach on two CPU cores."""
    return MEASURED_TOKENS_PER_SECOND * MEASURED_PARAMETERS / max(1, parameter_count)


class _Rows:
    """What is remembered of the rows of one file."""

    def __init__(
        self, format: DatasetFormat, base: Base | None, task: TaskDefinition | None, hashes: RowHashes
    ) -> None:
        """`task` applies to formats whose rows are fields for a template, as training applies it."""
        self._format = format
        self._task = task if format in FORMATS else None
        self._base = base
        self._lengths: Counter[int] = Counter()
        self._labels: Counter[str] | None = Counter()
        self._hashes = hashes
        self._empty = _Found()
        self._over = _Found()
        self._unusable = _Found()
        self._refusal = ""
        self._tokens = 0
        self._learned = 0
        self._fitting_tokens = 0

    def add(self, row: Mapping[str, Any], number: int) -> None:
        """Takes the row of this number."""
        shape, known = self._shape(row, number), self._task is None and self._format is not DatasetFormat.FIELDS
        asked, answer = _parts(shape) if shape is not None and known else _fields(row, self._task)
        self._hashes.add(_hash([asked, answer] if known or self._task else row), _hash(asked), _hash(answer))
        self._empty.add(number, not _text_of(asked).strip())
        self._label(answer)
        if shape is None:
            if self._task is None:
                self._lengths[_characters(row)] += 1
        elif self._base is None:
            self._lengths[_characters(shape)] += 1
        else:
            self._measure(shape, self._base, number)

    def _shape(self, row: Mapping[str, Any], number: int) -> Canonical | None:
        """What training makes of a row: None of fields without a task, and of a row that does not fit its task."""
        if self._task is None:
            return None if self._format is DatasetFormat.FIELDS else canonical(row, self._format)
        try:
            return canonical(*trained_as(self._task, row, self._format))
        except InvalidArgument as error:
            self._refuse(number, error)
            return None

    def _refuse(self, number: int, error: InvalidArgument) -> None:
        self._unusable.add(number, True)
        self._refusal = self._refusal or f"Row {number}: {error.message}"

    def _label(self, answer: Any) -> None:
        if self._labels is None:
            return
        if isinstance(answer, str) and answer.strip() and len(answer) <= LONGEST_LABEL_CHARACTERS:
            self._labels[answer.strip()] += 1
            if len(self._labels) <= MOST_LABELS:
                return
        self._labels = None

    def _measure(self, shape: Canonical, base: Base, number: int) -> None:
        try:
            length, tokens, learned = _tokens(shape, base.tokenizer)
        except InvalidArgument as error:
            self._refuse(number, error)
            return
        self._lengths[length] += 1
        self._tokens += tokens
        self._learned += learned
        self._over.add(number, length > base.context_tokens)
        if length <= base.context_tokens:
            self._fitting_tokens += tokens

    def report(
        self, file: FileReport, others: "_Rows | None", epochs: float, tokens_per_second: float | None
    ) -> DatasetReport:
        """All that was found."""
        untold = self._format is DatasetFormat.FIELDS and self._task is None
        base = None if untold else self._base
        notes = [self._refusal] if self._refusal else []
        if others is not None and others._format is not self._format:
            notes.append(
                f"The held-out file is {others._format}: only inputs that are written alike are found in both."
            )
        if untold:
            notes.append("Rows of named fields become tokens through a task's template: name the task to count them.")
        estimate = None
        if base is not None and self._format is DatasetFormat.GRADED_PROMPTS:
            notes.append("How long reinforcement takes depends on the answers that are sampled: no time is estimated.")
        elif base is not None:
            estimate = _estimate(base, self._fitting_tokens, epochs, tokens_per_second)
        return DatasetReport(
            format=file.format.value,
            row_count=file.row_count,
            size_bytes=file.size_bytes,
            base_model=base.id if base else "",
            ignored_fields=file.ignored,
            length_unit="tokens" if base else "characters",
            shortest=min(self._lengths, default=0),
            median=_median(self._lengths),
            longest=max(self._lengths, default=0),
            histogram=_histogram(self._lengths),
            duplicates=self._hashes.duplicates(),
            empty=self._empty.told(),
            conflicting=self._hashes.conflicts(),
            labels=self._label_counts(file.row_count),
            tokens=self._tokens if base else None,
            learned_tokens=self._learned if base else None,
            context_tokens=base.context_tokens if base else None,
            over_length=self._over.told() if base else None,
            unusable=self._unusable.told() if base or self._task else None,
            held_out_row_count=len(others._hashes) if others is not None else None,
            leaked=self._hashes.leaked(others._hashes) if others is not None else None,
            estimate=estimate,
            notes=tuple(notes),
            task=self._task.name if self._task else "",
        )

    def _label_counts(self, row_count: int) -> tuple[LabelCount, ...]:
        if not self._labels or 2 * len(self._labels) > row_count:
            return ()
        return tuple(LabelCount(label, count) for label, count in self._labels.most_common())


class _Found:
    """Counts rows and keeps the numbers of the first."""

    def __init__(self) -> None:
        self._count = 0
        self._first: list[int] = []

    def add(self, number: int, found: bool) -> None:
        if found:
            self._count += 1
            if len(self._first) < FIRST_ROWS:
                self._first.append(number)

    def told(self) -> FoundRows:
        return FoundRows(self._count, tuple(self._first))


def _parts(shape: Canonical) -> tuple[Any, Any]:
    """What is asked, and what is answered; None where there is no one answer to agree on."""
    if isinstance(shape, Pair):
        return shape.prompt, shape.completion
    if isinstance(shape, Text):
        return shape.text, None
    if isinstance(shape, Preference):
        return _plain(shape.prompt), [_plain(shape.chosen), _plain(shape.rejected)]
    if isinstance(shape, GradedPrompt):
        return _plain(shape.prompt), dict(shape.row)
    last = max((index for index, turn in enumerate(shape.messages) if turn["role"] == "assistant"), default=0)
    answer = shape.messages[last]
    return _plain(shape.messages[:last]), answer if "tool_calls" in answer else answer["content"]


def _fields(row: Mapping[str, Any], task: TaskDefinition | None) -> tuple[Any, Any]:
    """The inputs and the answer of a task's row; without a task all but `label`, and that."""
    answers = task.completion.field if task else "label"
    inputs = [one.name for one in task.fields] if task else [key for key in row if key != answers]
    answer = row.get(answers)
    return {name: row[name] for name in inputs if row.get(name) is not None}, None if answer is None else str(answer)


def _check_task(task: TaskDefinition, format: DatasetFormat) -> None:
    if format not in FORMATS and not (task.conversations and format in CONVERSATIONS):
        description = (
            f"makes prompts of {', '.join(task.required)}, and {format} rows hold their prompt already; leave the task "
            f"out, or declare the rows as {DatasetFormat.FIELDS}"
        )
        raise InvalidArgument(
            f"The task {task.name!r} {description}.",
            reason="TASK_UNFIT",
            violations=(FieldViolation("task", description),),
        )


def _plain(value: str | Messages) -> Any:
    return value if isinstance(value, str) else [dict(turn) for turn in value]


def _text_of(asked: Any) -> str:
    """What a reader sees of an input: an empty one may still have roles."""
    if isinstance(asked, str):
        return asked
    if isinstance(asked, dict):
        return "".join(str(value) for value in asked.values() if value is not None)
    return "".join(turn["content"] for turn in asked if turn["role"] != "system")


def _hash(value: Any) -> int:
    content = json.dumps(_normal(value), sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big", signed=True)


def _normal(value: Any) -> Any:
    """Texts without differences that no reader sees: Unicode's composed form, and single blanks."""
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFC", value).split())
    if isinstance(value, Mapping):
        return {key: _normal(item) for key, item in value.items()}
    return [_normal(item) for item in value] if isinstance(value, list | tuple) else value


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Preference):
        return _characters(value.prompt) + max(_characters(value.chosen), _characters(value.rejected))
    if isinstance(value, Pair):
        return len(value.prompt) + len(value.completion)
    if isinstance(value, Text):
        return len(value.text)
    if isinstance(value, Chat):
        return _characters(value.messages)
    if isinstance(value, GradedPrompt):
        return _characters(value.prompt)
    if isinstance(value, Mapping):
        return len(value["content"]) if "content" in value else sum(len(str(item)) for item in value.values())
    return sum(map(_characters, value))


def _tokens(shape: Canonical, tokenizer: Tokenizer) -> tuple[int, int, int]:
    """Length of the longest sequence, tokens of all, and those with loss."""
    if isinstance(shape, GradedPrompt):
        length = len(prompt_ids(shape.prompt, tokenizer))
        return length, length, 0
    sequences = [shape] if not isinstance(shape, Preference) else [_answered(shape, better) for better in (True, False)]
    examples = [render(sequence, tokenizer) for sequence in sequences]
    lengths = [len(example.token_ids) for example in examples]
    return max(lengths), sum(lengths), sum(sum(example.loss_mask) for example in examples)


def _answered(pair: Preference, better: bool) -> Pair | Chat:
    answer = pair.chosen if better else pair.rejected
    if isinstance(pair.prompt, str) and isinstance(answer, str):
        return Pair(pair.prompt, answer)
    assert not isinstance(pair.prompt, str)
    assert not isinstance(answer, str)
    asked = tuple({**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in pair.prompt)
    return Chat(asked + answer, pair.tools)


def _estimate(base: Base, tokens: int, epochs: float, tokens_per_second: float | None) -> TrainingEstimate:
    speed = tokens_per_second or default_tokens_per_second(base.parameter_count)
    basis = (
        "the speed that was given"
        if tokens_per_second
        else f"{MEASURED_TOKENS_PER_SECOND:.0f} tokens/s measured for LoRA on SmolLM2-135M on two CPU cores, scaled to "
        f"{base.parameter_count / 1e6:.0f}M parameters"
    )
    return TrainingEstimate(tokens, epochs, speed, tokens * epochs / speed, basis)


def _median(lengths: Mapping[int, int]) -> int:
    half = sum(lengths.values()) / 2
    seen = 0
    for length in sorted(lengths):
        seen += lengths[length]
        if seen >= half:
            return length
    return 0


def _histogram(lengths: Mapping[int, int]) -> tuple[LengthBin, ...]:
    """Bins of one round width, from 0 to the longest."""
    longest = max(lengths, default=0)
    width = next(step * 10**power for power in range(9) for step in (1, 2, 5) if step * 10**power * BINS > longest)
    counts = [0] * (longest // width + 1)
    for length, count in lengths.items():
        counts[length // width] += count
    return tuple(LengthBin(index * width, (index + 1) * width, count) for index, count in enumerate(counts))
