"""A fine-tuning job: its states, the table of legal moves, its specification and what is known of it."""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from itertools import pairwise

from graft.domain.errors import FailedPrecondition
from graft.domain.grading import GraderSpec


class JobState(StrEnum):
    """Where a job is. Only the orchestrator moves it."""

    VALIDATING = "VALIDATING"
    QUEUED = "QUEUED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    REGISTERING = "REGISTERING"
    EVALUATING = "EVALUATING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    PAUSED = "PAUSED"


FINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
LIVE = frozenset(JobState) - FINAL - {JobState.PAUSED}

_FORWARD = [
    JobState.VALIDATING,
    JobState.QUEUED,
    JobState.STARTING,
    JobState.RUNNING,
    JobState.REGISTERING,
    JobState.EVALUATING,
    JobState.SUCCEEDED,
]
TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    **{
        state: frozenset({following, JobState.FAILED, JobState.CANCELLED, JobState.PAUSED})
        | (frozenset({JobState.QUEUED}) if index >= 2 else frozenset())
        for index, (state, following) in enumerate(pairwise(_FORWARD))
    },
    JobState.PAUSED: frozenset({JobState.QUEUED, JobState.CANCELLED}),
    **{state: frozenset() for state in FINAL},
}
"""The whole table of DESIGN: forward, to an end from any live state, and back to QUEUED on retry."""


def check_transition(before: JobState, after: JobState) -> None:
    """Raises FailedPrecondition unless `before → after` is in the table."""
    if after not in TRANSITIONS[before]:
        raise FailedPrecondition(
            f"A job cannot go from {before} to {after}.",
            reason="ILLEGAL_TRANSITION",
            metadata={"before": before.value, "after": after.value},
        )


class OverLengthPolicy(StrEnum):
    """What to do with an example longer than the context."""

    DROP = "drop"
    TRUNCATE = "truncate"
    FAIL = "fail"


class Sharding(StrEnum):
    """Whether the base's weights are spread over the workers of a job, or copied to each."""

    AUTO = "auto"
    """Spread where a copy does not fit into a worker's GPU, and can be."""
    ALWAYS = "always"
    NEVER = "never"


class Method(StrEnum):
    """How a job learns."""

    SUPERVISED = "supervised"
    SELF_SUPERVISED = "self_supervised"
    INSTRUCTION = "instruction"
    PREFERENCE = "preference"
    REINFORCEMENT = "reinforcement"


class LossOn(StrEnum):
    """Which tokens of a supervised example have loss."""

    COMPLETION = "completion"
    ALL = "all"


class Tuning(StrEnum):
    """What may change."""

    LORA = "lora"
    LAST_LAYERS = "last_layers"
    FULL = "full"


class ServedAs(StrEnum):
    """How a result is served."""

    ADAPTER = "adapter"
    LOW_RANK_DELTA = "low_rank_delta"
    """An adapter that approximates the weights' change."""
    MERGED_MODEL = "merged_model"
    """A full model, as a deployment of its own."""


DEFAULT_RANK = 8
"""Hu et al. 2021 (arXiv:2106.09685), table 6: ranks above 8 gain nothing on most tasks."""
DEFAULT_BLOCKS = 2
DEFAULT_COMPLETION_TOKENS = 64
"""Of an answer that reinforcement samples: enough for a short one, at little cost."""


@dataclass(frozen=True)
class Preference:
    """DPO as asked for (Rafailov et al. 2023, arXiv:2305.18290). Zero means: derive."""

    beta: float = 0.0


@dataclass(frozen=True)
class Reinforcement:
    """GRPO as asked for (Shao et al. 2024, arXiv:2402.03300). Zero means: derive, but for `beta`: no KL term."""

    grader: GraderSpec | None = None
    group_size: int = 0
    max_completion_tokens: int = 0
    temperature: float = 0.0
    beta: float = 0.0
    epsilon: float = 0.0


@dataclass(frozen=True)
class Lora:
    """LoRA as asked for (Hu et al. 2021, arXiv:2106.09685). Zero and empty mean: derive."""

    rank: int = 0
    alpha: float = 0.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    base_quantization: str = ""
    """`nf4` for QLoRA; empty for the base's weights as they are."""


@dataclass(frozen=True)
class LastLayers:
    """Transfer learning as asked for. Zero means: derive."""

    blocks: int = 0
    train_head: bool = False


@dataclass(frozen=True)
class Sweep:
    """A search over learning rates and ranks as asked for: the job trains each combination as a trial, ends those that
    fall behind by ASHA (Li et al. 2018, arXiv:1810.05934), and keeps the best. Zero and empty mean: derive."""

    learning_rates: tuple[float, ...] = ()
    ranks: tuple[int, ...] = ()
    max_trials: int = 0
    grace_steps: int = 0
    """Fewest steps of a trial before it may be ended."""
    reduction_factor: float = 0.0
    """One of so many trials goes on at each rung."""
    max_concurrent_trials: int = 0


@dataclass(frozen=True)
class Hyperparameters:
    """Hyperparameters as asked for. None means: derive from data and model."""

    epochs: float | None = None
    max_steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    learning_rate_multiplier: float | None = None
    """Multiplies the derived learning rate; never together with `learning_rate`."""
    warmup_ratio: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    context_tokens: int | None = None
    seed: int | None = None
    num_workers: int | None = None
    checkpoint_steps: int | None = None
    validation_fraction: float | None = None
    early_stopping_patience: int | None = None
    eval_steps: int | None = None
    over_length_policy: OverLengthPolicy = OverLengthPolicy.DROP
    sharding: Sharding = Sharding.AUTO


@dataclass(frozen=True)
class JobSpec:
    """What a client asked for. Immutable once stored."""

    base_model: str
    training_dataset: str
    """Data set id (not the resource name)."""
    validation_dataset: str | None = None
    suffix: str | None = None
    method: Method | None = Method.SUPERVISED
    """None: as the data set's format says. Concrete once stored."""
    loss_on: LossOn = LossOn.COMPLETION
    preference: Preference = field(default_factory=Preference)
    reinforcement: Reinforcement = field(default_factory=Reinforcement)
    tuning: Tuning = Tuning.LORA
    lora: Lora = field(default_factory=Lora)
    last_layers: LastLayers = field(default_factory=LastLayers)
    served_as: ServedAs | None = ServedAs.ADAPTER
    """None: chosen by what is tuned. Concrete once stored."""
    delta_rank: int = 0
    """Of a low-rank delta; 0: the highest that the engine loads."""
    task: str = ""
    task_definition: str = ""
    """YAML of the task's template, kept with the job: a built-in task may change with Graft's version."""
    from_adapter: str | None = None
    """`base:adapter@version` that training starts from."""
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    sweep: Sweep | None = None
    """None: one training."""
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Resolved:
    """One hyperparameter as used. `name` is as in Hyperparameters, or `lora.rank` and so on."""

    name: str
    value: float | int | str | list[str] | list[float]
    derived: bool
    reason: str


@dataclass(frozen=True)
class Memory:
    """What a worker holds while it trains, in bytes."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int

    @property
    def total_bytes(self) -> int:
        """All together."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes

    def __str__(self) -> str:
        """For people: `3.8 GB (weights 0.5, gradients 0.5, AdamW 1.1, activations 1.7)`."""
        parts = (
            ("weights", self.weights_bytes),
            ("gradients", self.gradients_bytes),
            ("AdamW", self.optimizer_bytes),
            ("activations", self.activations_bytes),
        )
        return f"{self.total_bytes / 1e9:.3g} GB ({', '.join(f'{name} {size / 1e9:.2g}' for name, size in parts)})"


@dataclass(frozen=True)
class Progress:
    """How far training is. `loss` is in nats per completion token."""

    step: int = 0
    total_steps: int = 0
    epoch: float = 0.0
    loss: float = 0.0
    tokens_per_second: float = 0.0
    trained_tokens: int = 0
    remaining_seconds: float | None = None


@dataclass(frozen=True)
class JobError:
    """Why a job failed, for its `error` status."""

    code: str
    """Name of a google.rpc.Code."""
    reason: str
    message: str


@dataclass(frozen=True)
class Job:
    """A stored job."""

    id: str
    project: str
    spec: JobSpec
    state: JobState
    create_time: datetime
    update_time: datetime
    start_time: datetime | None = None
    end_time: datetime | None = None
    attempt: int = 1
    fine_tuned_model: str | None = None
    error: JobError | None = None
    memory: Memory | None = None
    """As estimated when it was created; None where the base's shape was not known."""
    resolved: tuple[Resolved, ...] = ()
    progress: Progress | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    cancel_requested: bool = False
    pause_requested: bool = False
    mlflow_run_id: str | None = None
    lease_owner: str | None = None
    lease_expire_time: datetime | None = None
    unknown: tuple[str, ...] = ()
    """What a newer Graft wrote into `spec` that this one does not know: it is not this one's to train."""

    @property
    def adapter(self) -> str:
        """Name of the adapter: the suffix, or the job's own id."""
        return self.spec.suffix or self.id


class EventLevel(StrEnum):
    """How grave an event is."""

    INFO = "info"
    WARN = "warn"
    ERROR = "error"


@dataclass(frozen=True)
class Event:
    """Something that happened to a job. `sequence` counts from 1 within the job and is the cursor of Watch."""

    sequence: int
    create_time: datetime
    level: EventLevel
    type: str
    """`state`, `metrics`, `message` or `checkpoint`."""
    message: str
    data: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A saved state of the adapter during training."""

    step: int
    create_time: datetime
    uri: str
    attempt: int
    metrics: dict[str, float] = field(default_factory=dict)
