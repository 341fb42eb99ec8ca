"""What a run is told, with every value concrete, and what it reports. Picklable; knows neither Ray nor torch."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from graft.domain.jobs import (
    Job,
    LastLayers,
    Lora,
    LossOn,
    Method,
    OverLengthPolicy,
    Preference,
    Reinforcement,
    ServedAs,
    Sharding,
    Tuning,
)
from graft.domain.placement import Demand
from graft.domain.resources import BaseModel, Dataset, DatasetFormat
from graft.settings import TrainingSettings
from graft.storage import Storage
from graft.training.sweep import SearchSpec, search_spec

POLICIES = "policy"
ADAPTER = "adapter"
TRAINED_ADAPTER = "trained_adapter"
MODEL = "model"
RESULTS = (ADAPTER, TRAINED_ADAPTER, MODEL)
"""Folders that a run may leave (`graft.training.results`), which the orchestrator registers."""
ENDS = frozenset({"finished", "failed", "cancelled"})
Tell = Callable[[str, dict[str, Any]], None]
"""Takes the kind of a report and its data."""


@dataclass(frozen=True)
class StartFrom:
    """The version that training goes on from, as the registry names it."""

    model: str
    registered_model: str
    version: int
    digest: str
    tracking_uri: str
    cache: str
    """Where pulled versions are kept, by content."""
    served_as: ServedAs = ServedAs.ADAPTER


@dataclass(frozen=True)
class RunSpec:
    """One attempt of one job."""

    job_id: str
    attempt: int
    base_model: str
    base_model_path: str
    base_model_digest: str
    dataset_path: str
    dataset_format: DatasetFormat
    validation_path: str | None
    validation_format: DatasetFormat | None
    output_dir: str
    total_steps: int
    batch_size: int
    learning_rate: float
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    context_tokens: int
    seed: int
    num_workers: int
    checkpoint_steps: int
    over_length_policy: OverLengthPolicy
    lora: Lora
    """Every value concrete."""
    method: Method = Method.SUPERVISED
    loss_on: LossOn = LossOn.COMPLETION
    preference: Preference = field(default_factory=Preference)
    """Every value concrete, as in `reinforcement` and `last_layers`, where that is the method or what is tuned."""
    reinforcement: Reinforcement = field(default_factory=Reinforcement)
    tuning: Tuning = Tuning.LORA
    last_layers: LastLayers = field(default_factory=LastLayers)
    served_as: ServedAs = ServedAs.ADAPTER
    delta_rank: int = 0
    validation_fraction: float = 0.0
    early_stopping_patience: int = 0
    eval_steps: int = 0
    """Steps between measurements of the held-out loss; 0: after each epoch."""
    sharding: Sharding = Sharding.AUTO
    task_definition: str = ""
    start_from: StartFrom | None = None
    """What `from_adapter` names; None: the base."""
    engine_address: str = ""
    """The internal gRPC, where reinforcement samples."""
    engine_base: str = ""
    """The base model that the inference service starts with: by it the application of `base_model` is found."""
    project: str = ""
    search: SearchSpec | None = None
    """The trials of a sweep; None: the run is one training."""
    storage: Storage | None = None
    """Where hosts share files; None: `output_dir` and all other paths are the same on every node."""
    output_key: str = ""
    """Name of the run's folder in `storage`."""
    demand: Demand = field(default_factory=lambda: Demand({"CPU": 1.0}))
    """What a worker, or a trial of the sweep, asks of its node. A GPU of 0 hides those that the node has."""
    nodes_wait_seconds: float = 900.0
    """How long Ray is to look for nodes at a stretch: by its pending request the autoscaler adds them."""

    @property
    def name(self) -> str:
        """Name of the run's actor: a job's attempts never share one."""
        return run_name(self.job_id, self.attempt)

    @property
    def prompt_tokens(self) -> int:
        """Most tokens of a row: what is left of the context when what is sampled has its own."""
        sampled = self.reinforcement.max_completion_tokens if self.method is Method.REINFORCEMENT else 0
        return self.context_tokens - sampled

    @property
    def error_log(self) -> str:
        """The file of a failure's trace, as people are told of it: below Graft's home, or in the shared storage."""
        name = f"runs/{self.job_id}/{self.attempt}/error.log"
        return name if self.storage is None else self.storage.uri(name)


def run_name(job_id: str, attempt: int) -> str:
    """`run-{job_id}-{attempt}`."""
    return f"run-{job_id}-{attempt}"


def run_key(job_id: str, attempt: int) -> str:
    """Name of an attempt's folder, below the home and in a shared storage."""
    return f"runs/{job_id}/{attempt}"


def policy_prefix(base_model: str, job_id: str) -> str:
    """How the names begin under which the engine holds a job's policies; the number of updates follows."""
    return f"{base_model}:{job_id}-step-"


def policy_folder(output_dir: Path) -> Path:
    """Where an attempt's policies are while the engine holds them."""
    return output_dir / POLICIES


@dataclass(frozen=True)
class Report:
    """One thing that a run tells. `sequence` counts from 1 within the attempt."""

    sequence: int
    kind: str
    """`started`, `metrics`, `checkpoint`, `message`, `finished`, `failed` or `cancelled`."""
    time_seconds: float
    """Unix time."""
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunStatus:
    """What a poll of a run tells."""

    exists: bool
    alive: bool
    """False once it has ended, or when nothing of that name is there."""
    reports: list[Report]
    placed: bool = True
    """False while Ray has no nodes for its workers, or their processes start."""


def run_spec(
    job: Job,
    base: BaseModel,
    dataset: Dataset,
    validation: Dataset | None,
    output_dir: Path,
    *,
    start_from: StartFrom | None = None,
    engine_address: str = "",
    engine_base: str = "",
    storage: Storage | None = None,
    training: TrainingSettings | None = None,
) -> RunSpec:
    """The specification of the job's current attempt, from its resolved hyperparameters."""
    value: dict[str, Any] = {item.name: item.value for item in job.resolved}
    asked = job.spec
    lora, last_layers = settled(job)
    training = training or TrainingSettings()
    return RunSpec(
        job_id=job.id,
        attempt=job.attempt,
        base_model=base.id,
        base_model_path=base.path,
        base_model_digest=base.digest,
        dataset_path=dataset.uri,
        dataset_format=dataset.format,
        validation_path=None if validation is None else validation.uri,
        validation_format=None if validation is None else validation.format,
        output_dir=str(output_dir.resolve()),  # workers have another working directory
        total_steps=int(value["max_steps"]),
        batch_size=int(value["batch_size"]),
        learning_rate=float(value["learning_rate"]),
        warmup_ratio=float(value["warmup_ratio"]),
        weight_decay=float(value["weight_decay"]),
        max_grad_norm=float(value["max_grad_norm"]),
        context_tokens=int(value["context_tokens"]),
        seed=int(value["seed"]),
        num_workers=int(value["num_workers"]),
        checkpoint_steps=int(value["checkpoint_steps"]),
        over_length_policy=OverLengthPolicy(value["over_length_policy"]),
        lora=lora,
        method=asked.method or Method.SUPERVISED,
        loss_on=asked.loss_on,
        preference=replace(asked.preference, beta=float(value.get("preference.beta", 0))),
        reinforcement=replace(
            asked.reinforcement,
            group_size=int(value.get("reinforcement.group_size", 0)),
            max_completion_tokens=int(value.get("reinforcement.max_completion_tokens", 0)),
            temperature=float(value.get("reinforcement.temperature", 0)),
            epsilon=float(value.get("reinforcement.epsilon", 0)),
        ),
        tuning=asked.tuning,
        last_layers=last_layers,
        served_as=asked.served_as or ServedAs.ADAPTER,
        delta_rank=int(value.get("delta_rank", 0)),
        validation_fraction=float(value.get("validation_fraction", 0)),
        early_stopping_patience=int(value.get("early_stopping_patience", 0)),
        eval_steps=int(value.get("eval_steps", 0)),
        sharding=Sharding(value.get("sharding", Sharding.AUTO)),
        task_definition=asked.task_definition,
        start_from=start_from,
        engine_address=engine_address,
        engine_base=engine_base,
        project=job.project,
        search=None if asked.sweep is None else search_spec(job.resolved),
        storage=storage if storage is not None and storage.shared else None,
        output_key=run_key(job.id, job.attempt),
        demand=training.demand(base.id),
        nodes_wait_seconds=training.nodes_wait_seconds,
    )


def settled(job: Job) -> tuple[Lora, LastLayers]:
    """What changes, with every value as resolved; what the job's tuning does not use is as never asked for."""
    value: dict[str, Any] = {item.name: item.value for item in job.resolved}
    asked = job.spec
    if asked.tuning is Tuning.LAST_LAYERS:
        return Lora(), replace(asked.last_layers, blocks=int(value["last_layers.blocks"]))
    if asked.tuning is Tuning.FULL:
        return Lora(), LastLayers()
    lora = replace(
        asked.lora,
        rank=int(value["lora.rank"]),
        alpha=float(value["lora.alpha"]),
        dropout=float(value["lora.dropout"]),
        target_modules=tuple(value["lora.target_modules"]),
    )
    return lora, LastLayers()


class Clock:
    """Seconds of each phase of a start, told with the first report."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """What came since the last lap was `name`."""
        now = time.monotonic()
        self.laps[name] = round(now - self._last, 3)
        self._last = now
