"""What each worker of the matrix's group does: one run after another, each told to a file beside the run's folder."""

import json
import traceback
from pathlib import Path
from typing import Any

TOLD = "told.jsonl"


def work_through(config: dict[str, Any]) -> None:
    """Ray Train's loop. A run that fails is told as failed; the next one starts all the same."""
    import ray.train
    import torch.distributed

    from graft.training.objectives.objective import Group
    from graft.training.spec import Clock
    from graft.training.worker import run_worker

    context = ray.train.get_context()
    group = Group(context.get_world_rank(), context.get_world_size(), torch.distributed.all_reduce)
    for spec in config["specs"]:
        file = Path(spec.output_dir).parent / TOLD

        def tell(kind: str, data: dict[str, Any], file: Path = file) -> None:
            with open(file, "a") as told:
                told.write(json.dumps([kind, data]) + "\n")

        try:
            run_worker(spec, tell, group, lambda: 1, Clock())
        except Exception:  # noqa: BLE001 - the test of this run shows it
            tell("failed", {"rank": group.rank, "trace": traceback.format_exc()})
        torch.distributed.barrier()
