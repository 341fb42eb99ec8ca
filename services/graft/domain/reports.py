"""What a check of a data set found. Field for field the `DatasetReport` of the public contract."""

from dataclasses import dataclass

REPORT_VERSION = 1
"""Raised when the same data set is told differently: reports that were kept are made again."""


@dataclass(frozen=True)
class LengthBin:
    """Rows of a length from `start` up to, but not including, `end`."""

    start: int
    end: int
    row_count: int


@dataclass(frozen=True)
class LabelCount:
    """How many rows have this completion."""

    label: str
    row_count: int


@dataclass(frozen=True)
class FoundRows:
    """Rows with something in common: how many, and the numbers of the first few, counted from 1."""

    count: int
    first_rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class TrainingEstimate:
    """How long training on all rows that fit takes."""

    tokens: int
    """In one epoch."""
    epochs: float
    tokens_per_second: float
    seconds: float
    basis: str
    """What the speed rests on."""


@dataclass(frozen=True)
class DatasetReport:
    """Measurements of a data set. What needs a tokenizer is None without one."""

    format: str
    row_count: int
    size_bytes: int
    base_model: str
    ignored_fields: tuple[str, ...]
    length_unit: str
    """`tokens`, or `characters` without a tokenizer. Of a preference it is the longer side."""
    shortest: int
    median: int
    longest: int
    histogram: tuple[LengthBin, ...]
    duplicates: FoundRows
    """Rows equal to an earlier one but for white space."""
    empty: FoundRows
    """Rows with an empty input. An empty completion is an error already."""
    conflicting: FoundRows
    """Rows whose input has another answer elsewhere in the file."""
    labels: tuple[LabelCount, ...]
    """Most frequent first; empty unless the completions are few distinct ones."""
    tokens: int | None = None
    learned_tokens: int | None = None
    """Tokens with loss."""
    context_tokens: int | None = None
    over_length: FoundRows | None = None
    """Rows longer than the context: dropped or truncated, as the job says."""
    unusable: FoundRows | None = None
    """Rows that the base model's chat template refuses, or that do not fit the task."""
    held_out_row_count: int | None = None
    leaked: FoundRows | None = None
    """Held-out rows, by their number there, whose input is in the training file too."""
    estimate: TrainingEstimate | None = None
    notes: tuple[str, ...] = ()
    """What could not be told, and why."""
    task: str = ""
    """Name of the task whose template made text of the rows; empty without one."""
