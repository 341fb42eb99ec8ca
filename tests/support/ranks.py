"""Training workers as processes joined by gloo, as Ray Train joins them, but on this machine and without Ray.

`trained` runs cases in a process of its own, which imports once and forks each case's ranks:

    python -m tests.support.ranks cases.pickle results.pickle
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.domain.jobs import Sharding
from graft.training.spec import RunSpec


@dataclass(frozen=True)
class Found:
    """What rank 0 told, and what each rank held once the model was ready to train."""

    reports: list[tuple[str, dict[str, Any]]]
    block_bytes: list[int]
    """Of the blocks' weights, by rank."""
    other_bytes: list[int]
    """Of embedding, final norm and head, by rank."""

    def told(self, name: str) -> list[float]:
        """A metric of each step that has it."""
        return [data[name] for kind, data in self.reports if kind == "metrics" and name in data]


def trained(cases: Mapping[str, RunSpec], folder: Path) -> dict[str, Found]:
    """Runs each case with as many ranks as it has workers. Raises CalledProcessError with what a rank printed."""
    given, results = folder / "cases.pickle", folder / "results.pickle"
    given.write_bytes(pickle.dumps(dict(cases)))
    command = [sys.executable, "-m", "tests.support.ranks", str(given), str(results)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=540)
    assert ended.returncode == 0, ended.stderr[-6000:]
    found: dict[str, Found] = pickle.loads(results.read_bytes())
    return found


def _work(spec: RunSpec, rank: int, folder: Path) -> None:
    import torch
    import torch.distributed

    from graft.training import worker
    from graft.training.objectives.objective import Group
    from graft.training.spec import Clock

    store = torch.distributed.FileStore(str(folder / "store"), spec.num_workers)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=spec.num_workers)
    told: list[tuple[str, dict[str, Any]]] = []
    held: list[int] = []

    def tell(kind: str, data: dict[str, Any]) -> None:
        told.append((kind, data))

    def tune(spec: RunSpec, base: Any) -> Any:
        models.append(tuned(spec, base))
        return models[-1]

    def threads() -> int:
        return 1

    models: list[Any] = []
    tuned, worker.tune = worker.tune, tune  # type: ignore[attr-defined] # to see the model that trains
    group = Group(rank, spec.num_workers, torch.distributed.all_reduce)
    worker.run_worker(spec, tell, group, threads, Clock())
    held = _held(models[0])
    (folder / f"rank-{rank}.pickle").write_bytes(pickle.dumps((told, held)))
    torch.distributed.destroy_process_group()


def _held(model: Any) -> tuple[int, int]:
    """Bytes of the memory behind this rank's weights: of the blocks, and of the rest."""
    from graft.training.sharding import local

    sizes = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        sizes[".layers." in name] += local(parameter.detach()).untyped_storage().nbytes()
    return sizes[True], sizes[False]


def _run(name: str, spec: RunSpec, root: Path) -> Found:
    folder = root / f"ranks-{name}"
    folder.mkdir()
    children = []
    for rank in range(spec.num_workers):
        child = os.fork()
        if child == 0:
            try:
                _work(spec, rank, folder)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    if any([os.waitpid(child, 0)[1] for child in children]):
        raise SystemExit(f"A rank of {name} failed.")
    ranks = [pickle.loads((folder / f"rank-{rank}.pickle").read_bytes()) for rank in range(spec.num_workers)]
    return Found(ranks[0][0], [held[0] for _, held in ranks], [held[1] for _, held in ranks])


def sharded(spec: RunSpec) -> bool:
    """Whether a case asks for it."""
    return spec.sharding is Sharding.ALWAYS


if __name__ == "__main__":
    import torch.distributed.fsdp

    import graft.training.worker  # noqa: F401 - imported before the ranks are forked

    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    cases: dict[str, RunSpec] = pickle.loads(Path(sys.argv[1]).read_bytes())
    found = {name: _run(name, spec, Path(sys.argv[2]).parent) for name, spec in cases.items()}
    Path(sys.argv[2]).write_bytes(pickle.dumps(found))
