"""What `docs/scale.md` reckons with of the state: the store on both databases, and the orchestrator's loop.

    python -m benchmarks.scale_state [--quick]

The store is measured on SQLite and on a PostgreSQL that waits for its disk. Nothing is compared with anybody: each
figure is one of a size, and the page says what follows from how it grows.
"""

import asyncio
import logging
from pathlib import Path

import structlog

from benchmarks import scale_loop, scale_store
from benchmarks.common import Report, arguments, console, temporary_folder
from benchmarks.measured import add
from graft.domain.jobs import JobState

KINDS = {
    "sqlite": "the embedded database, as the stack makes it",
    "postgresql": "a server of its own on this machine, fsync on",
    "loop": "graft.orchestrator.loop on SQLite, with runs, MLflow and engine that answer at once",
}
SIZES = (10, 1_000, 100_000)
WAITING_JOBS = (10, 300, 1_000)
TRAINING_JOBS = (10, 100, 300)
ROUNDS = 3
WINDOW_SECONDS = 3.0


def main() -> int:
    """Returns 0."""
    quick = arguments(__doc__).quick
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))  # else a line a job
    report = Report(
        name="scale_state",
        quick=quick,
        settings={"versions_an_adapter": 1, "poll_seconds": 0.25},
        contestants=KINDS,
    )
    with temporary_folder() as folder:
        for kind in ("sqlite", "postgresql"):
            with scale_store.databases(kind, folder) as made:
                for size in SIZES[:2] if quick else SIZES:
                    with console.status(f"The store on {kind} with {size:,} adapters and jobs"):
                        for one in asyncio.run(scale_store.measure(made(), size, 1 if quick else ROUNDS)):
                            add(report, kind, one, size)
        measure_loop(report, folder, quick=quick)
    return report.finish()


def measure_loop(report: Report, folder: Path, *, quick: bool) -> None:
    """The orchestrator's loop, idle."""
    rounds, window_seconds = (1, 1.0) if quick else (ROUNDS, WINDOW_SECONDS)
    for state, sizes in ((JobState.QUEUED, WAITING_JOBS), (JobState.RUNNING, TRAINING_JOBS)):
        for size in sizes[:1] if quick else sizes:
            home = folder / f"loop-{state}-{size}"
            home.mkdir()
            with console.status(f"The orchestrator with {size:,} jobs {state}"):
                one = asyncio.run(scale_loop.measure(home, state, size, rounds, window_seconds))
            add(report, "loop", one, size)


if __name__ == "__main__":
    raise SystemExit(main())
