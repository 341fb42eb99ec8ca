"""Training workers as processes joined by gloo, as Ray Train joins them, but on this machine and without Ray.

`trained` runs cases in a process of its own, which imports once and forks each case's ranks:

    python -m tests.support.ranks cases.pickle found.pickle
"""

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Container, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

from graft.training.spec import RunSpec


@dataclass(frozen=True)
class Found:
    """What rank 0 told, and the memory behind each rank's weights at the end of training, by rank."""

    reports: list[tuple[str, dict[str, Any]]]
    block_bytes: list[int]
    other_bytes: list[int]
    """Of embedding, final norm and head."""

    def told(self, name: str) -> list[float]:
        """A metric of each step that has it."""
        return [data[name] for kind, data in self.reports if kind == "metrics" and name in data]


def trained(cases: Mapping[str, RunSpec], folder: Path, in_bfloat16: Container[str] = ()) -> dict[str, Found]:
    """Trains each case with as many ranks as it has workers. `folder` is for what passes between processes.

    `in_bfloat16` names cases whose base is loaded as on a GPU; a tiny one is float32 otherwise.
    """
    given, results = folder / "cases.pickle", folder / "found.pickle"
    given.write_bytes(pickle.dumps({name: (spec, name in in_bfloat16) for name, spec in cases.items()}))
    command = [sys.executable, "-m", "tests.support.ranks", str(given), str(results)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=540)
    assert ended.returncode == 0, ended.stderr[-6000:]
    found: dict[str, Found] = pickle.loads(results.read_bytes())
    return found


def _work(
    spec: RunSpec, in_bfloat16: bool, rank: int, folder: Path
) -> tuple[list[tuple[str, dict[str, Any]]], int, int]:
    import torch.distributed

    from graft.training import loop, tuning, worker
    from graft.training.objectives.objective import Group
    from graft.training.sharding import local
    from graft.training.spec import Clock

    store = torch.distributed.FileStore(str(folder / "store"), spec.num_workers)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=spec.num_workers, timeout=timedelta(minutes=5)
    )
    told: list[tuple[str, dict[str, Any]]] = []
    held = {True: 0, False: 0}

    def observed(model: Any, *arguments: Any) -> None:
        loop.train(model, *arguments)
        for name, parameter in model.named_parameters():
            held[".layers." in name] += local(parameter.detach()).untyped_storage().nbytes()

    group = Group(rank, spec.num_workers, torch.distributed.all_reduce)
    dtype = torch.bfloat16 if in_bfloat16 else torch.float32
    with mock.patch.object(worker, "train", observed), mock.patch.object(tuning, "compute_dtype", return_value=dtype):
        worker.run_worker(spec, lambda kind, data: told.append((kind, data)), group, lambda: 1, Clock())
    torch.distributed.destroy_process_group()
    return told, held[True], held[False]


def _forked(spec: RunSpec, in_bfloat16: bool, rank: int, folder: Path) -> int:
    """Starts the rank and returns its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        (folder / f"rank-{rank}.pickle").write_bytes(pickle.dumps(_work(spec, in_bfloat16, rank, folder)))
        status = 0
    except Exception:  # noqa: BLE001 - told here, or nobody would see why the rank failed
        traceback.print_exc()
    finally:
        os._exit(status)


def _run(name: str, spec: RunSpec, in_bfloat16: bool, root: Path) -> Found:
    folder = root / f"ranks-{name}"
    folder.mkdir()
    children = [_forked(spec, in_bfloat16, rank, folder) for rank in range(spec.num_workers)]
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    if failed:
        raise SystemExit(f"{len(failed)} ranks of {name} failed.")
    ranks = [pickle.loads((folder / f"rank-{rank}.pickle").read_bytes()) for rank in range(spec.num_workers)]
    return Found(ranks[0][0], [blocks for _, blocks, _ in ranks], [others for _, _, others in ranks])


if __name__ == "__main__":
    import torch
    import torch.distributed.fsdp

    import graft.training.worker  # noqa: F401 - before the ranks are forked, which would each import it

    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # By its name as others import it, or its results could not be read there.
    from tests.support import ranks

    asked: dict[str, tuple[RunSpec, bool]] = pickle.loads(Path(sys.argv[1]).read_bytes())
    found = {name: ranks._run(name, *case, Path(sys.argv[2]).parent) for name, case in asked.items()}
    Path(sys.argv[2]).write_bytes(pickle.dumps(found))
