"""An orchestrator over a real SQLite store, with fake runs, registry, engine and preparer, quick and steerable.

    async with world(tmp_path) as it:
        await it.create_job("job-1")
        async with it.orchestrator():
            await it.until("job-1", JobState.SUCCEEDED)

A gate that is closed (`it.close_gate(JobState.RUNNING)`) keeps every job in that state until it is opened.
"""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from graft.data.prepare import DataStats
from graft.domain.errors import GraftError, NotFound, Unavailable
from graft.domain.jobs import Event, Job, JobSpec, JobState, Memory, Resolved
from graft.domain.names import CHAMPION
from graft.domain.placement import Node
from graft.domain.resources import Adapter, AdapterVersion, BaseModel, Dataset, DatasetFormat, RegistrySnapshot
from graft.internal.v1 import engine_pb2
from graft.orchestrator.context import stored_events
from graft.orchestrator.loop import Orchestrator
from graft.orchestrator.metrics import shown
from graft.orchestrator.ports import Limits, Parts, PreparedData
from graft.registry.mlflow_registry import Publication
from graft.settings import load
from graft.store.sql import SqlStore
from graft.training.failures import lost_worker
from graft.training.spec import Report, RunStatus, StartFrom
from tests.support.stores import sqlite_store

BASE = "tiny"
PROJECT = "default"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
LOGPROB = -0.5
"""What trainer and engine agree on for every token."""
PATIENCE_SECONDS = 20.0


class Gates:
    """One a state; closed ones keep jobs there."""

    def __init__(self) -> None:
        self._closed: set[JobState] = set()

    def close(self, state: JobState) -> None:
        self._closed.add(state)

    def open(self, state: JobState) -> None:
        self._closed.discard(state)

    def closed(self, state: JobState) -> bool:
        return state in self._closed

    def wait(self, state: JobState) -> None:
        """In a thread of the orchestrator."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.closed(state) and time.monotonic() < deadline:
            time.sleep(0.005)


def good_reports() -> list[Report]:
    """Three steps and a checkpoint."""

    def step(number: int) -> dict[str, object]:
        return {
            "step": number,
            "total_steps": 3,
            "epoch": number / 3,
            "loss": 3.0 - number,
            "trained_tokens": number * 10,
        }

    return [
        Report(1, "started", 0.0, {}),
        Report(2, "metrics", 1.0, step(1)),
        Report(3, "metrics", 2.0, step(2)),
        Report(4, "checkpoint", 2.5, {"step": 2, "path": "checkpoint-2", "metrics": {"loss": 1.0}}),
        Report(5, "metrics", 3.0, step(3)),
        Report(6, "finished", 3.1, {"trained_tokens": 30, "train_seconds": 3.1}),
    ]


@dataclass(frozen=True)
class FakeSpec:
    """As `graft.training.spec.RunSpec`, as far as the fakes need it."""

    job_id: str
    attempt: int
    output_dir: Path
    start_from: StartFrom | None = None


class FakeRuns:
    """Runs that report what a test wrote down."""

    def __init__(self, gates: Gates) -> None:
        self.gates = gates
        self.reports = good_reports()
        self.lost_attempts: set[int] = set()
        """Attempts that die after their second report."""
        self.worker_lost_attempts: set[int] = set()
        """Attempts that report a lost worker after their second report."""
        self.away = 0
        """So many releases find the cluster away."""
        self.starts: list[tuple[str, int]] = []
        self.cancelled: list[tuple[str, int]] = []
        self.released: list[tuple[str, int]] = []
        self.live: set[tuple[str, int]] = set()
        self.most_live = 0
        self.placed = True
        self.dtype = "float32"
        self.also_writes: tuple[str, ...] = ()
        """Folders beside the adapter's."""
        self.specs: list[Any] = []

    def start(self, spec: Any) -> None:
        key = (spec.job_id, spec.attempt)
        if key in self.starts:
            return
        for name in self.also_writes:
            (spec.output_dir / name).mkdir(parents=True)
            (spec.output_dir / name / "config.json").write_text("{}")
        self.specs.append(spec)
        adapter = spec.output_dir / "adapter"
        adapter.mkdir(parents=True)
        (adapter / "adapter_model.safetensors").write_bytes(b"weights")
        (adapter / "adapter_config.json").write_text("{}")
        probe = {"prompt_token_ids": [1, 2, 3], "completion_token_ids": [4, 5], "mean_logprob": LOGPROB}
        (adapter / "graft.json").write_text(json.dumps({"dtype": self.dtype, "probes": [probe]}))
        self.starts.append(key)
        self.live.add(key)
        self.most_live = max(self.most_live, len(self.live))

    def poll(self, job_id: str, attempt: int, after_sequence: int) -> RunStatus:
        key = (job_id, attempt)
        visible = self.reports
        if self.gates.closed(JobState.STARTING):
            visible = []
        elif attempt in self.lost_attempts:
            visible = self.reports[:2]
            self.live.discard(key)
        elif attempt in self.worker_lost_attempts:
            error = lost_worker("error.log")
            told = {"code": error.code, "reason": error.reason, "message": error.message}
            visible = [*self.reports[:2], Report(3, "failed", 2.0, told)]
            self.live.discard(key)
        elif self.gates.closed(JobState.RUNNING):
            visible = self.reports[:3]
        seen = [report for report in visible if report.sequence > after_sequence]
        return RunStatus(key in self.starts, key in self.live, seen, self.placed)

    def cancel(self, job_id: str, attempt: int) -> None:
        self.cancelled.append((job_id, attempt))
        self.live.discard((job_id, attempt))

    def release(self, job_id: str, attempt: int) -> None:
        if self.away:
            self.away -= 1
            raise ConnectionError("The link is cut.")
        self.released.append((job_id, attempt))
        self.live.discard((job_id, attempt))


class FakeRegistry:
    """Runs, versions and aliases in memory; `down` makes every call fail as a lost server does."""

    def __init__(self, gates: Gates) -> None:
        self.gates = gates
        self.down = False
        self.snapshots = 0
        self.runs: dict[str, dict[str, Any]] = {}
        self.versions: list[AdapterVersion] = []
        self.published: list[Publication] = []
        self.folders: dict[tuple[str, int, str], Path] = {}
        self.aliases: dict[tuple[str, str, str], dict[str, int]] = {}
        self._lock = threading.Lock()

    def _answer(self) -> None:
        if self.down:
            raise Unavailable("The tracking server does not answer.", reason="REGISTRY_UNAVAILABLE")

    def start_run(self, project: str, job_id: str, attempt: int, params: dict[str, str], tags: dict[str, str]) -> str:
        self._answer()
        run_id = f"run-{project}-{job_id}-{attempt}"
        self.runs.setdefault(run_id, {"params": params, "tags": tags, "metrics": [], "files": [], "status": "RUNNING"})
        return run_id

    def log_metrics(self, run_id: str, metrics: dict[str, float], step: int) -> None:
        self._answer()
        self.runs[run_id]["metrics"].append((step, metrics))

    def log_file(self, run_id: str, path: Path) -> None:
        self._answer()
        self.runs[run_id]["files"].append(path.name)

    def finish_run(self, run_id: str, status: str) -> None:
        self._answer()
        self.runs[run_id]["status"] = status

    def publish(self, publication: Publication) -> AdapterVersion:
        self._answer()
        self.gates.wait(JobState.REGISTERING)
        with self._lock:
            for version in self.versions:
                if version.job_id == publication.job_id:
                    return version
            self.published.append(publication)
            made = self.add(publication.base_model, publication.adapter, publication.job_id, publication.run_id)
            self.versions[-1] = replace(made, served_as=publication.served_as, rank=publication.rank)
            return self.versions[-1]

    def pull(self, registered_model: str, version: int, digest: str) -> Path:
        self._answer()
        return self.folders[registered_model, version, digest]

    def add(self, base: str, adapter: str, job_id: str, run_id: str = "") -> AdapterVersion:
        """Makes the adapter's next version."""
        key = (PROJECT, base, adapter)
        number = 1 + max((item.version for item in self.versions if item.adapter == adapter), default=0)
        version = AdapterVersion(
            *key, number, f"sha256:{job_id}", "sha256:base", "sha256:data", job_id, 8, 1234, run_id, NOW
        )
        self.versions.append(version)
        self.aliases.setdefault(key, {})
        return version

    def set_alias(self, project: str, base: str, adapter: str, alias: str, version: int) -> None:
        self._answer()
        if not any((item.adapter, item.version) == (adapter, version) for item in self.versions):
            raise NotFound(f"{base}:{adapter}@{version} does not exist.", reason="ADAPTER_VERSION_NOT_FOUND")
        self.aliases[(project, base, adapter)][alias] = version

    def snapshot(self) -> RegistrySnapshot:
        self._answer()
        self.snapshots += 1
        with self._lock:
            adapters = tuple(
                Adapter(*key, dict(aliases), max(v.version for v in self.versions if v.adapter == key[2]), NOW)
                for key, aliases in self.aliases.items()
            )
            return RegistrySnapshot(adapters, tuple(self.versions))


class FakeScorer:
    """An engine that scores every token alike; `logprob` other than LOGPROB is an engine that serves something else."""

    def __init__(self, gates: Gates) -> None:
        self.gates = gates
        self.logprob = LOGPROB
        self.refusal: GraftError | None = None
        self.loaded: list[engine_pb2.AdapterRef] = []
        self.unloaded: list[str] = []
        self.held = engine_pb2.Replica(base_model=BASE, base_model_digest="sha256:base", ready=True)
        """What the only replica says of itself; `load` does not add to it."""
        self.bodies: list[dict[str, Any]] = []
        self.dtype = "float32"
        self.bases = {BASE}

    def of(self, base: str) -> "FakeScorer":
        assert base in self.bases
        return self

    async def load(self, adapter: engine_pb2.AdapterRef, timeout_seconds: float = 120) -> engine_pb2.LoadResponse:
        del timeout_seconds
        if self.refusal is not None:
            raise self.refusal
        if self.gates.closed(JobState.EVALUATING):
            raise Unavailable("The inference service is starting.", reason="ENGINE_STARTING", retry_after_seconds=2)
        self.loaded.append(adapter)
        return engine_pb2.LoadResponse(load_seconds=0.25, replicas=[engine_pb2.Replica(dtype=self.dtype)])

    async def unload(self, digest: str) -> engine_pb2.UnloadResponse:
        self.unloaded.append(digest)
        staying = [resident for resident in self.held.adapters if resident.digest != digest]
        del self.held.adapters[:]
        self.held.adapters.extend(staying)
        return engine_pb2.UnloadResponse()

    async def residency(self) -> engine_pb2.ResidencyResponse:
        told = engine_pb2.Replica(dtype=self.dtype)
        told.MergeFrom(self.held)
        return engine_pb2.ResidencyResponse(replicas=[told])

    async def generate(
        self, request: engine_pb2.GenerateRequest, timeout_seconds: float
    ) -> engine_pb2.GenerateResponse:
        del timeout_seconds
        body = json.loads(request.body)
        self.bodies.append(body)
        scores: list[Any] = [None]
        scores += [{str(token): {"logprob": self.logprob, "rank": 1}} for token in body["prompt"][1:]]
        answer = {"choices": [{"index": 0, "text": "x", "prompt_logprobs": scores}]}
        return engine_pb2.GenerateResponse(http_status=200, body=json.dumps(answer).encode())


class FakePreparer:
    """Ten rows, one over the context, and a rank of 8."""

    def __init__(self, gates: Gates) -> None:
        self.gates = gates
        self.error: GraftError | None = None
        self.workers = 1
        self.memory: Memory | None = None
        self.also_resolves: tuple[Resolved, ...] = ()
        self.prepared: list[Job] = []

    def prepare(self, job: Job, base: BaseModel, dataset: Dataset, validation: Dataset | None) -> PreparedData:
        del base, dataset, validation
        self.prepared.append(job)
        self.gates.wait(JobState.VALIDATING)
        if self.error is not None:
            raise self.error
        stats = DataStats(
            row_count=10,
            example_count=9,
            tokens=100,
            completion_tokens=20,
            longest_tokens=30,
            median_tokens=11,
            over_length_count=1,
        )
        resolved = (
            Resolved("num_workers", self.workers, True, "one a CPU"),
            Resolved("lora.rank", job.spec.lora.rank or 8, True, "few rows"),
            Resolved("epochs", 1.0, False, "as asked"),
            *self.also_resolves,
        )
        return PreparedData(stats, None, resolved, self.memory)

    def plan(
        self,
        job: Job,
        base: BaseModel,
        dataset: Dataset,
        validation: Dataset | None,
        output_dir: Path,
        start_from: StartFrom | None,
    ) -> Any:
        del base, dataset, validation
        return FakeSpec(job.id, job.attempt, output_dir, start_from)


@dataclass
class World:
    """Everything that a test steers."""

    store: SqlStore
    parts: Parts
    gates: Gates
    runs: FakeRuns
    registry: FakeRegistry
    engine: FakeScorer
    preparer: FakePreparer
    cpus: float = 4.0
    """Of the only node; none while the gate of QUEUED is closed."""
    cluster: list[Node] | None = None
    """Its nodes, where they are more."""
    ray_away: bool = False

    def close_gate(self, state: JobState) -> None:
        self.gates.close(state)

    def open_gate(self, state: JobState) -> None:
        self.gates.open(state)

    def nodes(self) -> list[Node]:
        if self.gates.closed(JobState.QUEUED):
            return []
        if self.ray_away:
            raise ConnectionError("no session")
        return [Node({"CPU": self.cpus})] if self.cluster is None else self.cluster

    async def create_job(self, job_id: str, suffix: str | None = "reviews", **asked: Any) -> Job:
        return await self.store.create_job(PROJECT, job_id, JobSpec(BASE, "ds-1", suffix=suffix, **asked), None)

    async def job(self, job_id: str) -> Job:
        return await self.store.get_job(PROJECT, job_id)

    async def until(self, job_id: str, state: JobState, patience_seconds: float = PATIENCE_SECONDS) -> Job:
        """Waits for a state; another end than the expected one fails at once."""
        deadline = time.monotonic() + patience_seconds
        while (job := await self.job(job_id)).state is not state:
            ended = job.state in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)
            assert not ended, f"ended as {job.state}: {job.error}"
            assert time.monotonic() < deadline, f"still {job.state}"
            await asyncio.sleep(0.01)
        return job

    async def events(self, job_id: str, kind: str | None = None) -> list[Event]:
        events = await stored_events(self.store, await self.job(job_id))
        return [event for event in events if kind in (None, event.type)]

    async def states(self, job_id: str) -> list[object]:
        return [event.data["state"] for event in await self.events(job_id, "state")]

    @asynccontextmanager
    async def orchestrator(self, *, crash: bool = False) -> AsyncIterator[Orchestrator]:
        """A running one, stopped at the end; with `crash` it does not free its leases."""
        parts = replace(self.parts, store=_Crashing(self.store)) if crash else self.parts
        orchestrator = Orchestrator(parts)
        async with shown(parts.store, parts.engine, parts.settings.orchestrator):
            task = asyncio.create_task(orchestrator.run())
            try:
                yield orchestrator
            finally:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


class _Crashing:
    """A store whose owner dies without freeing its leases."""

    def __init__(self, store: SqlStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def release_leases(self, owner: str) -> None:
        """Killed processes free nothing."""


@asynccontextmanager
async def world(folder: Path, **settings: str) -> AsyncIterator[World]:
    """A store with one base model and one data set, and the fakes."""
    loaded = load(
        {
            "GRAFT_HOME": str(folder),
            "GRAFT_ORCHESTRATOR_POLL_SECONDS": "0.01",
            "GRAFT_ORCHESTRATOR_LEASE_SECONDS": "0.6",
            "GRAFT_ORCHESTRATOR_REGISTRY_POLL_SECONDS": "0.05",
            **settings,
        }
    )
    store = await sqlite_store(folder)
    await store.replace_base_models(
        [BaseModel(BASE, "nowhere", "sha256:base", 1000, 2000, 2048, "Apache-2.0", "test", ("q_proj",), 64)]
    )
    dataset = Dataset("ds-1", PROJECT, "rows", DatasetFormat.PROMPT_COMPLETION, 10, 100, "sha256:data", "nowhere", NOW)
    await store.create_dataset(dataset, None)
    gates = Gates()
    runs, registry, engine, preparer = FakeRuns(gates), FakeRegistry(gates), FakeScorer(gates), FakePreparer(gates)
    limits = Limits(
        unavailable_seconds=10.0,
        retry_seconds=0.02,
        never_fits_seconds=0.05,
        tracking_batch_seconds=0.02,
        event_interval_seconds=0.25,
    )
    made: World
    parts = Parts(store, runs, registry, engine, preparer, lambda: made.nodes(), loaded, limits)
    made = World(store, parts, gates, runs, registry, engine, preparer)
    try:
        yield made
    finally:
        for state in JobState:
            gates.open(state)
        await store.close()


KEY = (PROJECT, BASE, "reviews")
"""The adapter of the jobs that `create_job` makes."""

__all__ = ["BASE", "CHAMPION", "KEY", "PROJECT", "World", "good_reports", "world"]
