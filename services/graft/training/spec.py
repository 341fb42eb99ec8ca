"""What a run is told, with every value concrete, and what it reports. Picklable; knows neither Ray nor torch."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graft.domain.jobs import Job, OverLengthPolicy
from graft.domain.resources import BaseModel, Dataset, DatasetFormat

ENDS = frozenset({"finished", "failed", "cancelled"})


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
    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    lora_target_modules: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the run's actor: a job's attempts never share one."""
        return run_name(self.job_id, self.attempt)

    @property
    def error_log(self) -> str:
        """The file of a failure's trace, as people are told of it: below Graft's home."""
        return f"runs/{self.job_id}/{self.attempt}/error.log"


def run_name(job_id: str, attempt: int) -> str:
    """`run-{job_id}-{attempt}`."""
    return f"run-{job_id}-{attempt}"


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


def run_spec(job: Job, base: BaseModel, dataset: Dataset, validation: Dataset | None, output_dir: Path) -> RunSpec:
    """The specification of the job's current attempt, from its resolved hyperparameters."""
    value: dict[str, Any] = {item.name: item.value for item in job.resolved}
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
        lora_rank=int(value["lora.rank"]),
        lora_alpha=float(value["lora.alpha"]),
        lora_dropout=float(value["lora.dropout"]),
        lora_target_modules=tuple(value["lora.target_modules"]),
    )


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
