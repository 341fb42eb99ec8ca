"""What `docs/scale.md` reckons with of the registry: MLflow at several sizes, and adapters on disk.

    python -m benchmarks.scale [--quick]

MLflow is measured on SQLite and on a PostgreSQL that waits for its disk. Nothing is compared with anybody: each figure
is one of a size, and the page says what follows from how it grows. Store and orchestrator are in
`benchmarks.scale_state`, what serving costs in `benchmarks.scale_serving`.
"""

from pathlib import Path

from tests.support.adapters import make_adapter

from benchmarks import scale_registry
from benchmarks.common import Report, arguments, base_model, console, temporary_folder
from benchmarks.measured import Measured, add
from benchmarks.scale_store import databases
from graft.domain.resources import BaseModel
from graft.registry.digest import adapter_digest
from graft.serving.prove import base_shapes, prove

KINDS = {
    "sqlite": "the stack's MLflow on the embedded database",
    "postgresql": "the stack's MLflow on a server on this machine, fsync on",
    "files": "adapters of random weights on this machine's disk",
}
SIZES = (10, 300, 3_000, 10_000)
RANKS = (8, 64)
ROUNDS = 3


def main() -> int:
    """Returns 0."""
    quick = arguments(__doc__).quick
    sizes, rounds = (SIZES[:2], 1) if quick else (SIZES, ROUNDS)
    base = base_model()
    report = Report(
        name="scale",
        quick=quick,
        settings={"base_model": base.id, "rank": RANKS[0], "versions_an_adapter": 1},
        contestants=KINDS,
    )
    with temporary_folder() as folder:
        adapter = measure_files(report, base, folder, rounds)
        for kind in ("postgresql", "sqlite"):
            place = folder / f"mlflow-{kind}"
            with databases(kind, folder) as made, console.status(f"MLflow on {kind}"):
                url = scale_registry.blocking(made())
                with scale_registry.server(place, url) as uri:
                    for size, one in scale_registry.measure(uri, url, base, adapter, place, sizes, rounds):
                        add(report, kind, one, size)
    return report.finish()


def measure_files(report: Report, base: BaseModel, folder: Path, rounds: int) -> Path:
    """Sizes on disk, and how long it takes to prove an adapter. Returns that of the first rank."""
    shapes, folders = base_shapes(base), {}
    for rank in RANKS:
        folders[rank] = made = make_adapter(Path(base.path), folder / f"rank-{rank}", rank=rank, scale=0.03)
        size = sum(file.stat().st_size for file in made.iterdir())
        add(report, "files", Measured(f"an adapter of rank {rank} on disk", "bytes", [size]))
    made = folders[RANKS[0]]
    digest = adapter_digest(made)
    proofs = [
        scale_registry.seconds(
            lambda: prove(made, shapes, model="scale", max_lora_rank=RANKS[-1], expected_digest=digest)
        )
        for _ in range(rounds)
    ]
    add(report, "files", Measured("prove an adapter that is on disk", "s", proofs))
    size = sum(file.stat().st_size for file in Path(base.path).iterdir())
    add(report, "files", Measured("the base model on disk", "bytes", [size]))
    return made


if __name__ == "__main__":
    raise SystemExit(main())
