"""Prometheus metrics of the orchestrator: what it counts as it works, what it measures beside that, and their door.

Counting costs nothing and is always done. What asks the store and the engine, and the door itself, are there only where
`orchestrator.metrics_port` is set. Knows no job: the loop, the mirror and the jobs' contexts say what happened.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import structlog
from prometheus_client import Counter, Gauge, Histogram, start_http_server

from graft.domain.errors import FailedPrecondition, GraftError
from graft.domain.evaluations import EvaluationState
from graft.domain.jobs import JobState
from graft.orchestrator.ports import Engine
from graft.settings import OrchestratorSettings
from graft.store.protocol import Store

MEASURE_SECONDS = 10.0
"""Prometheus asks every 15 s at most here: what it is told is at most one turn old."""

PASS_SECONDS = Histogram(
    "graft_orchestrator_pass_seconds",
    "Time of one pass: leases renewed, jobs claimed and looked at.",
    # Milliseconds on SQLite and PostgreSQL; beyond 5 s, a third of a lease, leases are in danger.
    buckets=(0.005, 0.02, 0.1, 0.5, 2.0, 5.0, 15.0),
)
LAST_PASS = Gauge(
    "graft_orchestrator_last_pass_timestamp_seconds",
    "When the last pass that succeeded ended or, of one that stands by, when it last asked for the lead.",
)
JOBS_CLAIMED = Counter("graft_orchestrator_jobs_claimed_total", "Jobs whose lease this process has taken.")
JOBS_HELD = Gauge("graft_orchestrator_jobs_held", "Jobs whose lease this process has.")
JOB_MOVES = Counter(
    "graft_orchestrator_job_moves_total", "Moves of jobs by this process, to a state.", ["state", "reason"]
)
"""`reason` is that of the error for FAILED, else empty. A move to STARTING begins an attempt."""
for defect in ("INTERNAL", "NO_RESULT"):
    # From the start: Prometheus sees no increase in a series whose first value is 1.
    JOB_MOVES.labels("FAILED", defect)
ATTEMPTS_LOST = Counter("graft_orchestrator_attempts_lost_total", "Attempts that died and were followed by another.")
LAST_MIRROR = Gauge(
    "graft_orchestrator_registry_mirror_timestamp_seconds", "When the store was last known equal to the registry."
)
JOBS = Gauge(
    "graft_orchestrator_jobs", "Jobs of the store, by state: the same whichever orchestrator says it.", ["state"]
)
EVALUATIONS = Gauge("graft_orchestrator_evaluations", "Evaluations of the store, by state.", ["state"])
ENGINE_REACHABLE = Gauge("graft_orchestrator_engine_reachable", "1 when the inference service answers, else 0.")
ENGINE_REPLICAS = Gauge(
    "graft_orchestrator_engine_replicas_ready", "Replicas of the first base model that can answer requests."
)

log = structlog.get_logger()


@asynccontextmanager
async def shown(store: Store, engine: Engine, settings: OrchestratorSettings) -> AsyncIterator[None]:
    """Shows this process's metrics while the block lasts, whether it leads or not: it measures the store for all.

    Raises FailedPrecondition when nothing can listen on their port.
    """
    with _door(settings):
        measures = asyncio.create_task(_measure(store, engine, settings))
        try:
            yield
        finally:
            measures.cancel()
            await asyncio.wait({measures})


@contextmanager
def _door(settings: OrchestratorSettings) -> Iterator[None]:
    """Shows this process's metrics over HTTP while the block lasts; does nothing without a port.

    Raises FailedPrecondition when nothing can listen there.
    """
    if not settings.metrics_port:
        yield
        return
    try:
        server, thread = start_http_server(settings.metrics_port, settings.metrics_host)
    except OSError as error:
        raise FailedPrecondition(
            f"The orchestrator's metrics cannot be shown on {settings.metrics_host}:{settings.metrics_port} "
            f"({error.strerror}): free the port, or set GRAFT_ORCHESTRATOR_METRICS_PORT to another one, or to 0.",
            reason="PORT_TAKEN",
        ) from None
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


async def _measure(store: Store, engine: Engine, settings: OrchestratorSettings) -> None:
    """Until cancelled; returns at once where nobody could read it."""
    told = False
    while settings.metrics_port:
        await _measure_engine(engine)
        try:
            await _measure_store(store)
            told = False
        except Exception as error:  # noqa: BLE001 - whatever the database raises, the next turn asks again
            if not told:
                told = True
                log.warning("metrics_wait", error=str(error), kind=type(error).__name__)
        await asyncio.sleep(MEASURE_SECONDS)


async def _measure_store(store: Store) -> None:
    jobs, evaluations = await store.count_jobs(), await store.count_evaluations()
    for state in JobState:
        JOBS.labels(state.value).set(jobs.get(state, 0))
    for turn in EvaluationState:
        EVALUATIONS.labels(turn.value).set(evaluations.get(turn, 0))


async def _measure_engine(engine: Engine) -> None:
    try:
        replicas = (await engine.residency()).replicas
    except GraftError:
        ENGINE_REACHABLE.set(0)
        ENGINE_REPLICAS.set(0)
        return
    ENGINE_REACHABLE.set(1)
    ENGINE_REPLICAS.set(sum(replica.ready for replica in replicas))
