"""An evaluation: models compared on held-out data, as asked for and as found."""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from graft.domain.grading import GraderSpec
from graft.domain.jobs import JobError

METRICS = {
    "accuracy": "answers",
    "macro_f1": "answers",
    "exact_match": "answers",
    "token_f1": "answers",
    "rouge_1": "answers",
    "rouge_2": "answers",
    "rouge_l": "answers",
    "chrf": "answers",
    "pass_at_1": "grades",
    "pass_at_5": "grades",
    "pass_at_10": "grades",
    "pass_at_100": "grades",
    "win_rate": "pairs",
    "perplexity": "texts",
    "bits_per_byte": "texts",
}
"""Every metric, and what it is computed from: answers compared with references, grades of samples, the likelihoods of
two answers, or of a text. `graft.evaluation.figures` computes them."""
SAMPLES_NEEDED = {f"pass_at_{k}": k for k in (1, 5, 10, 100)}
"""Samples of each prompt that a metric of grades needs at least."""


class EvaluationState(StrEnum):
    """Where an evaluation is. Only the orchestrator moves it."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


ENDED = frozenset({EvaluationState.SUCCEEDED, EvaluationState.FAILED, EvaluationState.CANCELLED})


@dataclass(frozen=True)
class Contestant:
    """A model with a way of prompting it."""

    model: str
    """Once stored, a base or a version by its number."""
    shots: int = 0

    @property
    def label(self) -> str:
        """What people call it."""
        return f"{self.model}, {self.shots}-shot" if self.shots else self.model


@dataclass(frozen=True)
class EvaluationSpec:
    """What a client asked for. Immutable once stored."""

    dataset: str
    """Data set id."""
    contestants: tuple[Contestant, ...]
    metrics: tuple[str, ...] = ()
    """Empty: as the task or the data says."""
    task: str = ""
    task_definition: str = ""
    grader: GraderSpec | None = None
    shots_dataset: str | None = None
    max_rows: int = 0
    samples: int = 0
    max_tokens: int = 0
    display_name: str = ""


@dataclass(frozen=True)
class Figure:
    """A metric's value, or a difference of two, with its 95% interval, from `n` rows."""

    metric: str
    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """A figure less that of the contestant labelled `baseline`, paired by row."""

    baseline: str
    figure: Figure


@dataclass(frozen=True)
class Confusion:
    """Counts of a classification, row by row; each row has a column a label and one for every other answer."""

    labels: tuple[str, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class ContestantResult:
    """What a contestant made of the data."""

    label: str
    model: str
    shots: int
    figures: tuple[Figure, ...]
    differences: tuple[Difference, ...] = ()
    latency_p50_seconds: float = 0.0
    latency_p95_seconds: float = 0.0
    tokens_per_second: float = 0.0
    parameter_count: int = 0
    size_bytes: int = 0
    confusion: Confusion | None = None
    memory_bytes: int = 0
    """Of the engine that answered, with all its adapters."""
    unanswered_count: int = 0
    """Questions that do not fit into the context. They count as wrong, pairs as undecided, and in no latency."""


@dataclass(frozen=True)
class Evaluation:
    """A stored evaluation."""

    id: str
    project: str
    spec: EvaluationSpec
    state: EvaluationState
    create_time: datetime
    update_time: datetime
    start_time: datetime | None = None
    end_time: datetime | None = None
    error: JobError | None = None
    answered_requests: int = 0
    """And answers graded."""
    total_requests: int = 0
    results: tuple[ContestantResult, ...] = ()
    verdicts: tuple[str, ...] = field(default_factory=tuple)
    mlflow_run_id: str | None = None
    cancel_requested: bool = False
    unknown: tuple[str, ...] = ()
    """What a newer Graft wrote into `spec` that this one does not know: it is not this one's to measure."""
