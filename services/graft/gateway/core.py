"""What the gateway does, whichever protocol asks: one method an operation, domain types in and out.

Owns the order of checks, the data sets' files and the waiting for wishes. Knows neither gRPC nor HTTP: both edges call
it. Jobs' states are the orchestrator's; only wishes are written here.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from graft.data.tasks import catalog
from graft.data.tasks.definition import TaskDefinition
from graft.domain.errors import (
    KINDS,
    FailedPrecondition,
    FieldViolation,
    Internal,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from graft.domain.evaluations import Evaluation, EvaluationSpec, EvaluationState
from graft.domain.jobs import FINAL, Checkpoint, Event, Job, JobSpec, Memory, ServedAs
from graft.domain.memory import asked_memory
from graft.domain.names import check_alias, check_id, parse_model
from graft.domain.reports import DatasetReport
from graft.domain.resources import Adapter, AdapterVersion, BaseModel, Dataset, DatasetFormat
from graft.gateway import dataset_checks, generation, resolving, task_inputs
from graft.gateway.checks import check_page_size, check_request_id, name_faults
from graft.gateway.checks_evaluations import check_evaluation
from graft.gateway.checks_jobs import check_job
from graft.gateway.dataset_checks import CheckSpec
from graft.gateway.deployments import Deployments
from graft.gateway.generation import Answer
from graft.gateway.resolving import Resolution
from graft.gateway.uploads import Upload, dataset_file, remove_dataset_file
from graft.internal.engine_client import EngineClient
from graft.internal.v1 import engine_pb2
from graft.settings import Settings
from graft.storage import open_storage
from graft.store.protocol import AliasWish, Page, Store

WATCH_POLL_SECONDS = 0.2
ALIAS_TIMEOUT_SECONDS = 10.0
ALIAS_POLL_SECONDS = 0.1
EVENTS_AT_ONCE = 500
"""Bounds the memory of one Watch that starts from the beginning of a long job."""


class Core:
    """Every operation of the public API."""

    def __init__(self, store: Store, engine: EngineClient, settings: Settings) -> None:
        self.store = store
        self.engine = engine
        self.settings = settings
        self.deployments = Deployments(store, engine, settings)
        self._draining = asyncio.Event()
        self._deleting: set[asyncio.Future[Dataset]] = set()
        """asyncio itself holds tasks weakly."""

    def drain(self) -> None:
        """Ends every Watch at its next poll, so that a stop need not wait for jobs."""
        self._draining.set()

    # Data sets

    def begin_upload(
        self, project: str, display_name: str, request_id: str | None = None, format: DatasetFormat | None = None
    ) -> Upload:
        """An upload to be entered with `async with`, fed with `write` and ended with `finish`.

        `format` declares what is recognised otherwise. Raises InvalidArgument for a name that cannot be shown.
        """
        check_id(project, "project")
        if faults := name_faults(display_name):
            told = f"{faults[0].field}: {faults[0].description}."
            raise InvalidArgument(told, reason="INVALID_DISPLAY_NAME", violations=tuple(faults))
        return Upload(self.store, self.settings, project, display_name, check_request_id(request_id), format)

    async def get_dataset(self, project: str, dataset_id: str) -> Dataset:
        """Raises NotFound naming it and what exists."""
        return await self.store.get_dataset(project, dataset_id)

    async def list_datasets(self, project: str, page_size: int = 0, page_token: str = "") -> Page[Dataset]:
        """Newest first; 50 when `page_size` is 0, 1000 at most."""
        return await self.store.list_datasets(project, check_page_size(page_size), page_token)

    async def delete_dataset(self, project: str, dataset_id: str) -> Dataset:
        """Deletes row and file. Raises NotFound, or FailedPrecondition while a live job or evaluation uses it."""

        async def delete() -> Dataset:
            dataset = await self.store.delete_dataset(project, dataset_id)
            # The row first: a stop in between leaves a file that nothing names, never a row without its file.
            await asyncio.to_thread(remove_dataset_file, self.settings, dataset)
            return dataset

        # Shielded: a client that leaves now, as gRPC's may, must not part the file from its row.
        deleting = asyncio.ensure_future(delete())
        self._deleting.add(deleting)
        deleting.add_done_callback(self._deleting.discard)
        return await asyncio.shield(deleting)

    async def validate_dataset(self, project: str, asked: CheckSpec) -> DatasetReport:
        """Measures a data set for a base model. Raises as `dataset_checks.made`."""
        return await dataset_checks.made(self.store, project, asked)

    async def dataset_path(self, project: str, dataset_id: str) -> Path:
        """The file of a stored data set. Raises NotFound, also when the file has gone from the disk."""
        dataset = await self.store.get_dataset(project, dataset_id)
        path = await asyncio.to_thread(dataset_file, self.settings, dataset)
        if path is None:
            raise NotFound(
                f"The file of data set {dataset_id!r} is no longer in the storage. Upload it again.",
                reason="DATASET_FILE_MISSING",
                metadata={"name": dataset_id},
            )
        return path

    # Jobs

    async def create_job(self, project: str, spec: JobSpec, request_id: str | None = None) -> Job:
        """Checks a specification against what exists and what the engine can load, and stores it in VALIDATING.

        A `request_id` seen before returns the first one's job, whatever has changed since: the answer was lost.

        Raises InvalidArgument with every fault as a field violation, NotFound naming what exists, or what
        `resolving.check_served` raises when the result could not be proven in the engine of its base.
        """
        check_id(project, "project")
        request_id = check_request_id(request_id)
        if request_id and (first := await self.store.find_job_by_request(project, request_id)):
            return first
        spec = await check_job(self.store, self.settings, project, spec)
        if spec.served_as is not ServedAs.MERGED_MODEL:  # else its base's engine is not needed to prove the result
            await resolving.check_served(self.store, spec.base_model, self.settings.serving.base_model)
        memory = await self._memory(project, spec)
        return await self.store.create_job(project, f"ft-{secrets.token_hex(6)}", spec, request_id, memory)

    async def _memory(self, project: str, spec: JobSpec) -> Memory | None:
        """What a worker will need; None where the base's shape is not known."""
        base = await self.store.get_base_model(spec.base_model, project)
        if base.shape is None:
            return None
        start_rank = 0
        if spec.from_adapter is not None:
            name = parse_model(spec.from_adapter, "from_adapter")
            start = await self.get_version(project, name.base, str(name.adapter), str(name.version))
            start_rank = start.rank
        return asked_memory(spec, base.shape, base.target_modules, start_rank)

    async def get_job(self, project: str, job_id: str) -> Job:
        """Raises NotFound naming it and what exists."""
        return await self.store.get_job(project, job_id)

    async def list_jobs(self, project: str, page_size: int = 0, page_token: str = "") -> Page[Job]:
        """Newest first; 50 when `page_size` is 0, 1000 at most."""
        return await self.store.list_jobs(project, check_page_size(page_size), page_token)

    async def cancel_job(self, project: str, job_id: str) -> Job:
        """Writes the wish. Raises FailedPrecondition when the job has already SUCCEEDED or FAILED."""
        return await self.store.request_cancel(project, job_id)

    async def list_events(
        self, project: str, job_id: str, after_sequence: int = 0, limit: int = 0
    ) -> tuple[Event, ...]:
        """Events with a higher sequence, in order; `limit` as a page size. Raises NotFound for an unknown job."""
        return await self.store.list_events(project, job_id, after_sequence, check_page_size(limit))

    async def last_sequence(self, project: str, job_id: str) -> int:
        """Of the job's newest event. Raises NotFound for an unknown job."""
        return await self.store.last_sequence(project, job_id)

    async def list_checkpoints(self, project: str, job_id: str) -> tuple[Checkpoint, ...]:
        """All checkpoints in order. Raises NotFound for an unknown job."""
        return await self.store.list_checkpoints(project, job_id)

    async def watch_job(
        self, project: str, job_id: str, after_sequence: int = 0
    ) -> AsyncGenerator[tuple[Event, Job], None]:
        """Events after the cursor with the job as it is, until the job has ended and all its events are sent.

        Raises NotFound at once, and Unavailable when the gateway stops: resume from the last sequence.
        """
        await self.store.get_job(project, job_id)
        ended = False
        while True:
            events = await self.store.list_events(project, job_id, after_sequence, EVENTS_AT_ONCE)
            job = await self.store.get_job(project, job_id)  # after the events: never older than them
            for event in events:
                after_sequence = event.sequence
                yield event, job
            if events:
                continue
            if ended:
                return
            ended = job.state in FINAL  # the last event may have come between the two reads: look once more
            if ended:
                continue
            if self._draining.is_set():
                raise Unavailable(
                    f"The gateway is stopping. Watch again after sequence {after_sequence}.",
                    reason="GATEWAY_STOPPING",
                    metadata={"after_sequence": str(after_sequence)},
                    retry_after_seconds=2.0,
                )
            await asyncio.sleep(WATCH_POLL_SECONDS)

    # Evaluations

    async def create_evaluation(self, project: str, spec: EvaluationSpec, request_id: str | None = None) -> Evaluation:
        """Checks a specification against what exists, and stores it in QUEUED; `request_id` as for a job.

        Raises InvalidArgument with every fault as a field violation, or NotFound naming what exists.
        """
        check_id(project, "project")
        request_id = check_request_id(request_id)
        if request_id and (first := await self.store.find_evaluation_by_request(project, request_id)):
            return first
        spec = await check_evaluation(self.store, project, spec, self.settings)
        return await self.store.create_evaluation(project, f"ev-{secrets.token_hex(6)}", spec, request_id)

    async def get_evaluation(self, project: str, evaluation_id: str) -> Evaluation:
        """Raises NotFound naming it and what exists."""
        return await self.store.get_evaluation(project, evaluation_id)

    async def list_evaluations(self, project: str, page_size: int = 0, page_token: str = "") -> Page[Evaluation]:
        """Newest first; 50 when `page_size` is 0, 1000 at most."""
        return await self.store.list_evaluations(project, check_page_size(page_size), page_token)

    async def cancel_evaluation(self, project: str, evaluation_id: str) -> Evaluation:
        """Writes the wish. Raises FailedPrecondition when it has already SUCCEEDED or FAILED."""
        return await self.store.cancel_evaluation(project, evaluation_id)

    async def evaluation_report(self, project: str, evaluation_id: str) -> bytes:
        """One HTML page. Raises NotFound, and FailedPrecondition before the evaluation has succeeded."""
        found = await self.store.get_evaluation(project, evaluation_id)
        if found.state is not EvaluationState.SUCCEEDED:
            raise FailedPrecondition(
                f"Evaluation {evaluation_id!r} is {found.state}; only one that has succeeded has a report.",
                reason="NO_REPORT",
                metadata={"state": found.state.value},
            )
        storage = open_storage(self.settings)
        try:
            return await asyncio.to_thread(
                storage.read, storage.uri("evaluations", project, evaluation_id, "report.html")
            )
        except NotFound:
            raise NotFound(
                f"The report of evaluation {evaluation_id!r} is no longer in the storage; MLflow run "
                f"{found.mlflow_run_id} has a copy.",
                reason="REPORT_MISSING",
            ) from None

    # Tasks, base models and adapters

    def list_tasks(self) -> tuple[TaskDefinition, ...]:
        """Those that Graft brings, by name. Every project sees them."""
        return tuple(catalog.builtin(name) for name in catalog.names())

    def get_task(self, name: str) -> TaskDefinition:
        """Raises NotFound naming what exists."""
        return catalog.builtin(name)

    async def list_base_models(self, project: str) -> tuple[BaseModel, ...]:
        """All, by id."""
        return await self.store.list_base_models(project)

    async def get_base_model(self, project: str, base: str) -> BaseModel:
        """Raises NotFound naming it and what exists."""
        return await self.store.get_base_model(base, project)

    async def get_adapter(self, project: str, base: str, adapter: str) -> Adapter:
        """Raises NotFound naming it and what exists."""
        return await self.store.get_adapter(project, base, adapter)

    async def list_adapters(
        self, project: str, base: str | None = None, page_size: int = 0, page_token: str = ""
    ) -> Page[Adapter]:
        """Adapters of one base model, or of all when None."""
        return await self.store.list_adapters(project, base, check_page_size(page_size), page_token)

    async def get_version(self, project: str, base: str, adapter: str, selector: str) -> AdapterVersion:
        """One version by `selector`: its number, or an alias. Raises NotFound naming what exists."""
        name = parse_model(f"{base}:{adapter}@{selector}", "name")
        return await self.store.resolve_version(project, base, adapter, version=name.version, alias=name.alias)

    async def list_versions(
        self, project: str, base: str, adapter: str, page_size: int = 0, page_token: str = ""
    ) -> Page[AdapterVersion]:
        """Newest first. Raises NotFound for an unknown adapter."""
        return await self.store.list_versions(project, base, adapter, check_page_size(page_size), page_token)

    async def set_alias(self, project: str, base: str, adapter: str, alias: str, version: int) -> Adapter:
        """Asks for the alias and waits until the registry has it and the read model shows it; or shows where somebody
        else has moved it since.

        Raises InvalidArgument, NotFound, whatever the registry refused with, or Unavailable after 10 s: the wish
        stays and is carried out when the registry answers.
        """
        check_alias(alias)
        if version < 1:
            fault = FieldViolation("version", "must be 1 or more")
            raise InvalidArgument("version: must be 1 or more.", reason="INVALID_VERSION", violations=(fault,))
        await self.store.resolve_version(project, base, adapter, version=version, alias=None)
        before = (await self.store.get_adapter(project, base, adapter)).aliases.get(alias)
        wish = await self.store.request_alias(
            AliasWish(f"aw-{secrets.token_hex(6)}", project, base, adapter, alias, version)
        )
        try:
            async with asyncio.timeout(ALIAS_TIMEOUT_SECONDS):
                while not (wish := await self.store.get_alias_wish(wish.id)).done:  # noqa: ASYNC110 - another process writes it
                    await asyncio.sleep(ALIAS_POLL_SECONDS)
                if wish.error is not None:
                    kind = KINDS.get(wish.error.code, Internal)
                    raise kind(wish.error.message, reason=wish.error.reason)
                while True:
                    shown = await self.store.get_adapter(project, base, adapter)
                    if shown.aliases.get(alias) == version or shown.aliases.get(alias) != before:
                        return shown
                    await asyncio.sleep(ALIAS_POLL_SECONDS)
        except TimeoutError:
            raise Unavailable(
                f"The registry has not confirmed alias {alias!r} within {ALIAS_TIMEOUT_SECONDS:.0f} s. The wish is "
                "kept and is carried out as soon as the registry answers.",
                reason="REGISTRY_SLOW",
                retry_after_seconds=5.0,
            ) from None

    # The engine

    async def load_version(self, project: str, base: str, adapter: str, selector: str) -> list[engine_pb2.Replica]:
        """Loads a version and returns the replicas after it. Raises what the engine refused it with."""
        version = await self.get_version(project, base, adapter, selector)
        resolving.check_shared(version)
        await resolving.check_served(self.store, base, self.settings.serving.base_model)
        response = await self.engine.of(base).load(resolving.adapter_ref(version))
        return await self._named(project, list(response.replicas))

    async def unload_version(self, project: str, base: str, adapter: str, selector: str) -> list[engine_pb2.Replica]:
        """Takes a version out of the engine and returns the replicas after it."""
        version = await self.get_version(project, base, adapter, selector)
        await resolving.check_served(self.store, base, self.settings.serving.base_model)
        response = await self.engine.of(base).unload(version.digest)
        return await self._named(project, list(response.replicas))

    async def residency(self, project: str) -> list[engine_pb2.Replica]:
        """What every replica of every application holds, asked now. A resident of another project keeps its digest but
        not its name."""
        others = await self.deployments.residency(project)
        response = await self.engine.residency()
        return await self._named(project, [*response.replicas, *others])

    async def _named(self, project: str, replicas: list[engine_pb2.Replica]) -> list[engine_pb2.Replica]:
        owned: dict[tuple[str, str], bool] = {}
        for resident in (resident for replica in replicas for resident in replica.adapters):
            held = resident.model, resident.digest
            if held not in owned:  # replicas hold the same ones, mostly
                owned[held] = await resolving.owns(self.store, project, *held)
            if not owned[held]:
                resident.model = ""
        return replicas

    # Generation

    async def resolve(self, project: str, model: str) -> Resolution:
        """What a `model` means now. Raises InvalidArgument, NotFound, or FailedPrecondition (base not served)."""
        return await resolving.resolve(self.store, project, model, self.settings.serving.base_model)

    async def generate(self, project: str, endpoint: engine_pb2.Endpoint.ValueType, body: dict[str, object]) -> Answer:
        """Answers an OpenAI body, which may hold a task's `inputs` instead of a prompt.

        OpenAI's own error objects come back in the Answer; all else is raised.
        """
        resolution = await self.resolve(project, generation.model_of(body))
        rendered = task_inputs.rendered(resolution, endpoint, body)
        return await generation.generate(self.engine.of(resolution.base), resolution, *rendered)

    async def stream(
        self, project: str, endpoint: engine_pb2.Endpoint.ValueType, body: dict[str, object]
    ) -> AsyncGenerator[bytes, None]:
        """Answers an OpenAI body as payloads of `data:` lines. Every refusal is raised before the first payload."""
        resolution = await self.resolve(project, generation.model_of(body))
        endpoint, body = task_inputs.rendered(resolution, endpoint, body)
        engine = self.engine.of(resolution.base)
        async with aclosing(generation.stream(engine, resolution, endpoint, body)) as payloads:
            async for payload in payloads:
                yield payload
