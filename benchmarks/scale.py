"""What `docs/scale.md` reckons with: the store, MLflow, the orchestrator's loop and adapters, at several sizes.

    python -m benchmarks.scale [--quick]

The store is measured on SQLite and on a PostgreSQL that waits for its disk; MLflow on both as well. Nothing is compared
with anybody: each figure is one of a size, and the page says what follows from how it grows. What serving costs is in
`benchmarks.scale_serving`.
"""

import asyncio
import logging
from pathlib import Path

import structlog
from tests.support.adapters import make_adapter

from benchmarks import scale_loop, scale_registry, scale_store
from benchmarks.common import Report, arguments, base_model, console, temporary_folder
from benchmarks.measured import Measured
from graft.domain.jobs import JobState
from graft.domain.resources import BaseModel
from graft.registry.digest import adapter_digest
from graft.serving.prove import base_shapes, prove

KINDS = {
    "sqlite": "the embedded database, as the stack makes it",
    "postgresql": "a server of its own on this machine, fsync on",
    "loop": "graft.orchestrator.loop on SQLite, with runs, MLflow and engine that answer at once",
    "files": "adapters of random weights on this machine's disk",
}
STORE_SIZES = (10, 1_000, 100_000)
REGISTRY_SIZES = (10, 300, 3_000, 10_000)
WAITING_JOBS = (10, 300, 1_000)
TRAINING_JOBS = (10, 100, 300)
RANKS = (8, 64)
ROUNDS = 3


def main() -> int:
    """Returns 0."""
    quick = arguments(__doc__).quick
    rounds = 1 if quick else ROUNDS
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))  # a line a job
    base = base_model()
    report = Report(
        name="scale",
        quick=quick,
        settings={"base_model": base.id, "rank": RANKS[0], "versions_an_adapter": 1},
        contestants=KINDS,
    )
    with temporary_folder() as folder:
        adapter = measure_files(report, base, folder, rounds)
        for kind in ("sqlite", "postgresql"):
            with scale_store.databases(kind, folder) as made:
                for size in STORE_SIZES[:2] if quick else STORE_SIZES:
                    with console.status(f"The store on {kind} with {size:,} adapters and jobs"):
                        for one in asyncio.run(scale_store.measure(made(), size, rounds)):
                            add(report, kind, size, one)
                measure_registry(report, kind, made(), base, adapter, folder, quick=quick)
        measure_loop(report, folder, quick=quick)
    return report.finish()


def add(report: Report, contestant: str, size: int, one: Measured) -> None:
    """Puts the size into the figure's name; 0 is none."""
    report.figure(one.figure + (f" @ {size:,}" if size else ""), one.unit, contestant, one.values)


def measure_files(report: Report, base: BaseModel, folder: Path, rounds: int) -> Path:
    """Sizes on disk, and how long it takes to prove an adapter. Returns that of the first rank."""
    shapes, folders = base_shapes(base), {}
    for rank in RANKS:
        folders[rank] = made = make_adapter(Path(base.path), folder / f"rank-{rank}", rank=rank, scale=0.03)
        size = sum(file.stat().st_size for file in made.iterdir())
        add(report, "files", 0, Measured(f"an adapter of rank {rank} on disk", "bytes", [size]))
    made = folders[RANKS[0]]
    digest = adapter_digest(made)
    proofs = [
        scale_registry.seconds(
            lambda: prove(made, shapes, model="scale", max_lora_rank=RANKS[-1], expected_digest=digest)
        )
        for _ in range(rounds)
    ]
    add(report, "files", 0, Measured("prove an adapter that is on disk", "s", proofs))
    size = sum(file.stat().st_size for file in Path(base.path).iterdir())
    add(report, "files", 0, Measured("the base model on disk", "bytes", [size]))
    return made


def measure_registry(
    report: Report, kind: str, url: str, base: BaseModel, adapter: Path, folder: Path, *, quick: bool
) -> None:
    """MLflow on one kind of database."""
    place = folder / f"mlflow-{kind}"
    with (
        console.status(f"MLflow on {kind}"),
        scale_registry.server(place, scale_registry.blocking(url)) as uri,
    ):
        sizes, rounds = (REGISTRY_SIZES[:2], 1) if quick else (REGISTRY_SIZES, ROUNDS)
        measured = scale_registry.measure(uri, scale_registry.blocking(url), base, adapter, place, sizes, rounds)
        for size, one in measured:
            add(report, kind, size, one)
            console.print(f"{kind}: {one.figure} @ {size:,}: {min(one.values):.4g} {one.unit}", markup=False)


def measure_loop(report: Report, folder: Path, *, quick: bool) -> None:
    """The orchestrator's loop, idle."""
    for state, sizes in ((JobState.QUEUED, WAITING_JOBS), (JobState.RUNNING, TRAINING_JOBS)):
        for size in sizes[:1] if quick else sizes:
            home = folder / f"loop-{state}-{size}"
            home.mkdir()
            with console.status(f"The orchestrator with {size:,} jobs {state}"):
                one = asyncio.run(scale_loop.measure(home, state, size, 1 if quick else ROUNDS, 1 if quick else 3))
            add(report, "loop", size, one)


if __name__ == "__main__":
    raise SystemExit(main())
