"""What the orchestrator's loop costs in CPU while jobs wait or train, and nothing happens to them.

The loop, its leases and its store (SQLite) are the product's; runs, MLflow and the engine are the tests' fakes, which
answer at once: what is measured is the least that a real loop needs.
"""

import asyncio
import time
from dataclasses import replace
from pathlib import Path

from tests.support.orchestration import BASE, world

from benchmarks.measured import Measured
from benchmarks.scale_store import insert_jobs
from graft.domain.jobs import JobState
from graft.orchestrator.loop import Orchestrator
from graft.orchestrator.ports import Limits
from graft.store.database import Database
from graft.training.spec import RunStatus

SETTLE_SECONDS = 3.0
SETTLE_SECONDS_A_JOB = 0.01
"""Every job that is taken over is read with its events first."""
DEFAULTS = {
    "GRAFT_ORCHESTRATOR_POLL_SECONDS": "0.25",
    "GRAFT_ORCHESTRATOR_LEASE_SECONDS": "15",
    "GRAFT_ORCHESTRATOR_REGISTRY_POLL_SECONDS": "1",
}


class Silent:
    """Runs that are alive and report nothing."""

    def start(self, spec: object) -> None:
        """They run already."""

    def poll(self, job_id: str, attempt: int, after_sequence: int) -> RunStatus:
        """Alive, without a report."""
        del job_id, attempt, after_sequence
        return RunStatus(True, True, [])

    def cancel(self, job_id: str, attempt: int) -> None:
        """Nothing ends here."""

    def release(self, job_id: str, attempt: int) -> None:
        """As above."""


async def measure(folder: Path, state: JobState, count: int, rounds: int, window_seconds: float) -> Measured:
    """Cores that the process keeps busy with `count` jobs in `state`, a value a window."""
    async with world(folder, **DEFAULTS) as it:
        it.cpus = 0.0  # a cluster on its way up: whoever is queued waits
        database = Database(it.parts.settings.store_url)
        await insert_jobs(database, count, state, BASE)
        await database.close()
        task = asyncio.create_task(Orchestrator(replace(it.parts, runs=Silent(), limits=Limits())).run())
        await asyncio.sleep(SETTLE_SECONDS + SETTLE_SECONDS_A_JOB * count)
        cores: list[float] = []
        for _ in range(rounds):
            started, used = time.perf_counter(), time.process_time()
            await asyncio.sleep(window_seconds)
            cores.append((time.process_time() - used) / (time.perf_counter() - started))
        states = {job.state for job in (await it.store.list_jobs("default", 1000, "")).items}
        if states != {state}:
            raise RuntimeError(f"The jobs should all be {state}, and are {', '.join(sorted(states))}.")
        task.cancel()
        await asyncio.wait({task})
    return Measured(f"cores of the orchestrator, jobs {state.value}", "cores", cores)
