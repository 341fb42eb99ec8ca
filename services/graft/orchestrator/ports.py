"""What the orchestrator asks of the parts around it, as protocols, so that tests need neither Ray, MLflow nor vLLM.

`Runs` is `graft.training.run.RayRuns`, `RegistryPort` is `graft.registry.mlflow_registry.Registry`, `Engine` is
`graft.internal.engine_client.EngineClient` and `Preparer` is `graft.orchestrator.preparer.TokenizingPreparer`.
Runs, registry, preparer and nodes block: they are called in threads (`graft.orchestrator.threads`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from graft.data.prepare import DataStats
from graft.domain.jobs import Job, Memory, Resolved
from graft.domain.placement import Node
from graft.domain.resources import AdapterVersion, BaseModel, Dataset, RegistrySnapshot
from graft.internal.v1 import engine_pb2
from graft.registry.mlflow_registry import Publication
from graft.settings import Settings
from graft.storage import Storage, open_storage
from graft.store.protocol import Store
from graft.training.spec import RunSpec, RunStatus, StartFrom, run_key


class Runs(Protocol):
    """Training runs: named detached actors, one an attempt."""

    def start(self, spec: RunSpec) -> None:
        """Starts the run, or finds the one of that name."""

    def poll(self, job_id: str, attempt: int, after_sequence: int) -> RunStatus: ...
    def cancel(self, job_id: str, attempt: int) -> None: ...
    def release(self, job_id: str, attempt: int) -> None: ...


class RegistryPort(Protocol):
    """Tracking and registry."""

    def start_run(
        self, project: str, job_id: str, attempt: int, params: dict[str, str], tags: dict[str, str]
    ) -> str: ...
    def log_metrics(self, run_id: str, metrics: dict[str, float], step: int) -> None: ...
    def log_file(self, run_id: str, path: Path) -> None: ...
    def finish_run(self, run_id: str, status: str) -> None: ...
    def publish(self, publication: Publication) -> AdapterVersion: ...
    def set_alias(self, project: str, base: str, adapter: str, alias: str, version: int) -> None: ...
    def snapshot(self) -> RegistrySnapshot: ...
    def pull(self, registered_model: str, version: int, digest: str) -> Path: ...


class Generates(Protocol):
    """What answers OpenAI bodies."""

    async def generate(
        self, request: engine_pb2.GenerateRequest, timeout_seconds: float
    ) -> engine_pb2.GenerateResponse: ...


class Engine(Generates, Protocol):
    """The inference engine of one base model."""

    def of(self, base: str) -> "Engine":
        """The one of another."""
        ...

    async def load(self, adapter: engine_pb2.AdapterRef, timeout_seconds: float = 120) -> engine_pb2.LoadResponse: ...
    async def unload(self, digest: str) -> engine_pb2.UnloadResponse: ...
    async def residency(self) -> engine_pb2.ResidencyResponse: ...


class ApplicationsPort(Protocol):
    """The inference service's applications (`graft.internal.engine_client.EngineClient`)."""

    def of(self, base: str) -> "ApplicationEngine": ...
    async def deploy(self, model: BaseModel) -> None: ...
    async def undeploy(self, base: str) -> None: ...
    async def applications(self) -> list[engine_pb2.Application]: ...


class ApplicationEngine(Generates, Protocol):
    """The engine of one of them."""

    async def residency(self) -> engine_pb2.ResidencyResponse: ...


class ModelSource(Protocol):
    """The part of the registry that keeps full models."""

    def pull_model(self, registered_model: str, version: int, digest: str) -> Path:
        """Downloads a version's full model, a Hugging Face folder, into the cache. Blocks.

        Raises FailedPrecondition for a version that holds none.
        """
        ...


@dataclass(frozen=True)
class PreparedData:
    """What is known of a job's data before it trains."""

    training: DataStats
    validation: DataStats | None
    resolved: tuple[Resolved, ...]
    memory: Memory | None = None
    """What a worker needs; None: not known."""


class Preparer(Protocol):
    """Reads a job's data as training will, and derives what the job left open."""

    def prepare(self, job: Job, base: BaseModel, dataset: Dataset, validation: Dataset | None) -> PreparedData:
        """Raises InvalidArgument or NotFound for data that cannot be trained on."""
        ...

    def plan(
        self,
        job: Job,
        base: BaseModel,
        dataset: Dataset,
        validation: Dataset | None,
        output_dir: Path,
        start_from: StartFrom | None,
    ) -> RunSpec:
        """The run's specification, every value concrete."""
        ...


@dataclass(frozen=True)
class Limits:
    """Times and counts that are no settings: nobody has had a reason to change them."""

    max_attempts: int = 3
    """A run that dies three times dies of something that a fourth will not cure."""
    event_interval_seconds: float = 0.25
    """Four metrics events a second draw a live curve; a fast run makes hundreds of steps a second."""
    unavailable_seconds: float = 600.0
    """How long the engine or the registry may be away before a trained job fails: a cold start takes 2 minutes."""
    retry_seconds: float = 2.0
    never_fits_seconds: float = 10.0
    """A cluster's nodes join within seconds of each other; a job is refused only when none came meanwhile."""
    tracking_batch_seconds: float = 1.0
    """Metrics go to MLflow once a second: each call takes milliseconds there, and nobody reads it faster."""
    stop_seconds: float = 3.0
    """Tasks get this long to leave on SIGTERM; with the leases' release the process is gone within 5 s."""


@dataclass(frozen=True)
class Parts:
    """Everything that the orchestrator is given."""

    store: Store
    runs: Runs
    registry: RegistryPort
    engine: Engine
    preparer: Preparer
    nodes: Callable[[], Sequence[Node]]
    """The training cluster's nodes with all that they have, in use too."""
    settings: Settings
    limits: Limits = field(default_factory=Limits)

    @property
    def storage(self) -> Storage:
        """Where files lie that other processes read."""
        return open_storage(self.settings)

    def output_dir(self, job: Job) -> Path:
        """Where an attempt writes, or where this host has copies of what it wrote in the shared storage."""
        return self.settings.home.path / run_key(job.id, job.attempt)
