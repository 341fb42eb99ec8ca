"""What the gateway and the orchestrator ask of the store. `graft.store.sql` is the one implementation.

All methods are coroutines; times are timezone-aware UTC. Who may write what: the gateway creates data sets, jobs and
wishes (`request_cancel`, `request_alias`, `request_dataset_check`, `create_deployment`, `request_undeploy`); everything
else is the orchestrator's.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Generic, Protocol, TypeVar

from graft.domain.deployments import Deployment, DeploymentState
from graft.domain.evaluations import ContestantResult, Evaluation, EvaluationSpec, EvaluationState
from graft.domain.jobs import (
    Checkpoint,
    Event,
    EventLevel,
    Job,
    JobError,
    JobSpec,
    JobState,
    Memory,
    Progress,
    Resolved,
)
from graft.domain.reports import DatasetReport
from graft.domain.resources import Adapter, AdapterVersion, BaseModel, Dataset, RegistrySnapshot

T = TypeVar("T")
Listed = Dataset | Job | Evaluation | Adapter | AdapterVersion | Deployment
"""What lists are made of."""


@dataclass(frozen=True)
class Page(Generic[T]):
    """A page of results. `next_page_token` is empty on the last."""

    items: tuple[T, ...]
    next_page_token: str = ""


@dataclass(frozen=True)
class AliasWish:
    """A client's wish to point an alias, until the orchestrator has carried it out in the registry."""

    id: str
    project: str
    base_model: str
    adapter: str
    alias: str
    version: int
    done: bool = False
    error: JobError | None = None


@dataclass(frozen=True)
class DatasetCheck:
    """A client's wish to have a data set measured, until the orchestrator has done it."""

    id: str
    project: str
    dataset_id: str
    base_model: str
    held_out_id: str | None
    context_tokens: int | None
    epochs: float
    task_definition: str = ""
    """YAML of the task for rows of fields; empty without one."""
    done: bool = False
    report: DatasetReport | None = None
    error: JobError | None = None


class Store(Protocol):
    """Jobs, events, data sets, leases, keys, and the read model of the registry."""

    async def close(self) -> None: ...
    async def ping(self) -> None:
        """Raises Unavailable when the database does not answer."""

    def token_after(self, item: Listed) -> str:
        """The token of the page that begins behind this item of its list."""
        ...

    # Data sets (gateway)
    async def create_dataset(self, dataset: Dataset, request_id: str | None) -> Dataset:
        """Stores a row. With a `request_id` seen before in the project, returns the first one's data set."""
        ...

    async def find_dataset_by_request(self, project: str, request_id: str) -> Dataset | None: ...
    async def get_dataset(self, project: str, dataset_id: str) -> Dataset:
        """Raises NotFound naming it and what exists."""
        ...

    async def list_datasets(self, project: str, page_size: int, page_token: str) -> Page[Dataset]:
        """Newest first. Raises InvalidArgument for a bad token."""
        ...

    async def delete_dataset(self, project: str, dataset_id: str) -> Dataset:
        """Raises NotFound, or FailedPrecondition while a live job or evaluation uses it."""
        ...

    # Jobs (gateway)
    async def create_job(
        self, project: str, job_id: str, spec: JobSpec, request_id: str | None, memory: Memory | None = None
    ) -> Job:
        """Stores a job in VALIDATING with its first event; a repeated `request_id` returns the first one's job."""
        ...

    async def find_job_by_request(self, project: str, request_id: str) -> Job | None: ...
    async def get_job(self, project: str, job_id: str) -> Job: ...
    async def list_jobs(self, project: str, page_size: int, page_token: str) -> Page[Job]: ...
    async def request_cancel(self, project: str, job_id: str) -> Job:
        """Idempotent. Raises FailedPrecondition when the job has already SUCCEEDED or FAILED."""
        ...

    async def list_events(self, project: str, job_id: str, after_sequence: int, limit: int) -> tuple[Event, ...]: ...
    async def last_sequence(self, project: str, job_id: str) -> int:
        """Of the job's newest event; 0 without any."""
        ...

    async def list_checkpoints(self, project: str, job_id: str) -> tuple[Checkpoint, ...]: ...

    # The lead, of which there is one: the orchestrator that has it works, the others stand by
    async def take_lead(self, owner: str, lease: timedelta) -> bool:
        """Takes the lead, or holds it for so much longer. False while it is another's."""
        ...

    async def give_lead_back(self, owner: str) -> None:
        """For the next who asks. Does nothing when it is another's by now."""
        ...

    def led_by(self, owner: str) -> "Store":
        """The same store for the one that leads: once another does, what only the leader writes (base models, the
        registry's read model, ends of wishes and checks, how far deployments are) raises Aborted LEAD_LOST."""
        ...

    # Jobs (orchestrator). `owner` must hold the lease and `attempt` be current, else Aborted.
    async def claim_jobs(
        self, owner: str, lease: timedelta, limit: int, besides: Collection[str] = ()
    ) -> tuple[Job, ...]:
        """Takes up to `limit` live jobs whose lease is free or has run out, oldest first; of those among `besides` only
        the ones that are to be cancelled."""
        ...

    async def renew_leases(self, owner: str, lease: timedelta) -> frozenset[str]:
        """Extends every lease of `owner`; returns the ids still held."""
        ...

    async def release_leases(self, owner: str, job_id: str | None = None) -> None:
        """Frees every lease of `owner`, or that of one job."""
        ...

    async def count_jobs(self) -> dict[JobState, int]:
        """Of every project, by state; states without any may be missing."""
        ...

    async def leased_jobs(self, owner: str) -> tuple[Job, ...]: ...
    async def transition(
        self,
        job: Job,
        owner: str,
        state: JobState,
        *,
        message: str,
        error: JobError | None = None,
        fine_tuned_model: str | None = None,
        next_attempt: bool = False,
    ) -> Job:
        """Moves the job and writes a `state` event in one transaction. Sets start and end times. A move to QUEUED
        with `next_attempt` raises `attempt` by one. Raises FailedPrecondition for an illegal move."""
        ...

    async def record(
        self,
        job: Job,
        owner: str,
        *,
        progress: Progress | None = None,
        resolved: Sequence[Resolved] | None = None,
        metrics: dict[str, float] | None = None,
        mlflow_run_id: str | None = None,
        checkpoint: Checkpoint | None = None,
        event: tuple[EventLevel, str, str, dict[str, object]] | None = None,
    ) -> Job:
        """Writes what is given (metrics are merged) and an event `(level, type, message, data)` in one transaction."""
        ...

    # Evaluations: created, read and cancelled by the gateway
    async def create_evaluation(
        self, project: str, evaluation_id: str, spec: EvaluationSpec, request_id: str | None
    ) -> Evaluation:
        """Stores one in QUEUED; a repeated `request_id` returns the first one's evaluation."""
        ...

    async def find_evaluation_by_request(self, project: str, request_id: str) -> Evaluation | None: ...
    async def get_evaluation(self, project: str, evaluation_id: str) -> Evaluation:
        """Raises NotFound naming it and what exists."""
        ...

    async def list_evaluations(self, project: str, page_size: int, page_token: str) -> Page[Evaluation]: ...
    async def cancel_evaluation(self, project: str, evaluation_id: str) -> Evaluation:
        """Idempotent. Raises FailedPrecondition when it has SUCCEEDED or FAILED."""
        ...

    # Evaluations (orchestrator). `owner` must hold the lease, else Aborted.
    async def count_evaluations(self) -> dict[EvaluationState, int]:
        """As `count_jobs`."""
        ...

    async def end_cancelled_evaluations(self) -> tuple[str, ...]:
        """Ends those that are to be cancelled and whose lease is free or has run out. Returns their ids."""
        ...

    async def claim_evaluation(self, owner: str, lease: timedelta, besides: Collection[str] = ()) -> Evaluation | None:
        """Takes the oldest that has not ended, whose lease is free or has run out and that is not among `besides`, and
        moves it to RUNNING."""
        ...

    async def renew_evaluation(
        self, evaluation: Evaluation, owner: str, lease: timedelta, answered_requests: int, total_requests: int
    ) -> Evaluation: ...
    async def release_evaluation(self, evaluation: Evaluation, owner: str) -> None: ...
    async def end_evaluation(
        self,
        evaluation: Evaluation,
        owner: str,
        state: EvaluationState,
        *,
        error: JobError | None = None,
        results: Sequence[ContestantResult] = (),
        verdicts: Sequence[str] = (),
        mlflow_run_id: str | None = None,
    ) -> Evaluation: ...

    # Registry's read model and wishes
    async def replace_base_models(self, models: Sequence[BaseModel]) -> None: ...
    async def get_base_model(self, base: str, project: str | None = None) -> BaseModel:
        """Raises NotFound naming it and what exists, as `project` sees it: without other projects' own."""
        ...

    async def list_base_models(self, project: str | None = None) -> tuple[BaseModel, ...]: ...
    async def replace_registry(self, snapshot: RegistrySnapshot) -> None:
        """Makes the read model equal to the snapshot, in one transaction."""
        ...

    async def get_adapter(self, project: str, base: str, adapter: str) -> Adapter:
        """Raises NotFound naming it and what exists (also when the base model does not exist)."""
        ...

    async def list_adapters(self, project: str, base: str | None, page_size: int, page_token: str) -> Page[Adapter]: ...
    async def resolve_version(
        self, project: str, base: str, adapter: str, *, version: int | None, alias: str | None
    ) -> AdapterVersion:
        """Raises NotFound naming the adapter, version or alias and what exists."""
        ...

    async def list_versions(
        self, project: str, base: str, adapter: str, page_size: int, page_token: str
    ) -> Page[AdapterVersion]: ...
    async def request_alias(self, wish: AliasWish) -> AliasWish: ...
    async def get_alias_wish(self, wish_id: str) -> AliasWish: ...
    async def pending_alias_wishes(self) -> tuple[AliasWish, ...]: ...
    async def finish_alias_wish(self, wish_id: str, error: JobError | None) -> None: ...

    # Checks of data sets: asked for by the gateway, made by the orchestrator
    async def request_dataset_check(self, check: DatasetCheck) -> DatasetCheck:
        """Stores a check to be made; one of this id that is there is returned as it is, unless it failed."""
        ...

    async def get_dataset_check(self, check_id: str) -> DatasetCheck: ...
    async def pending_dataset_checks(self) -> tuple[DatasetCheck, ...]: ...
    async def finish_dataset_check(
        self, check_id: str, report: DatasetReport | None, error: JobError | None
    ) -> None: ...

    # Deployments. Wishes (gateway)
    async def create_deployment(self, wish: Deployment) -> Deployment:
        """Stores the wish, or returns the deployment that there is; a FAILED one starts anew. Raises AlreadyExists when
        the id names another model, FailedPrecondition while a deployment of that id is on its way out."""
        ...

    async def get_deployment(self, project: str, base: str) -> Deployment:
        """Raises NotFound naming it and what exists in the project."""
        ...

    async def find_deployment(self, base: str) -> Deployment | None:
        """The deployment that serves `base`, whoever asked for it."""
        ...

    async def list_deployments(self, project: str, page_size: int, page_token: str) -> Page[Deployment]: ...
    async def request_undeploy(self, project: str, base: str) -> Deployment: ...

    # Deployments (orchestrator)
    async def every_deployment(self) -> tuple[Deployment, ...]: ...
    async def move_deployment(self, base: str, state: DeploymentState, error: JobError | None = None) -> bool:
        """Tells how far it is. False where a wish to undeploy came meanwhile, or it has failed: both stay."""
        ...

    async def remove_deployment(self, base: str) -> None:
        """Forgets one that was STOPPING and has ended."""
        ...

    # API keys, stored as SHA-256 of the secret
    async def add_key(self, key_hash: str, project: str, label: str) -> None: ...
    async def find_key(self, key_hash: str) -> str | None:
        """The key's project, or None."""
        ...

    async def has_keys(self) -> bool: ...
    async def now(self) -> datetime:
        """The database's clock, UTC: leases compare against it, so that hosts' clocks do not matter."""
        ...
