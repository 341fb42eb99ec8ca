"""Calls Ray Train for a run, in a process of its own that can be ended, and joins its workers to our own code.

Owns what the workers' processes are told: environment, threads. Does not know the loop.
"""

import os
import time
import traceback
from functools import partial
from typing import Any

import ray
from ray._private.state import available_resources_per_node, total_resources_per_node

from graft import offline
from graft.domain.placement import Demand
from graft.training.failures import failure, lost_worker
from graft.training.places import ray_storage
from graft.training.spec import ENDS, Clock, RunSpec

DRIVER_ENVIRONMENT = {
    # The controller asks its workers so often how they are; 2 s by default, which a failure would wait for.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # An actor more to start. A run whose node is reclaimed fails and is tried again as one whose node died.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Ray Train's own gauges; ours are in the reports.
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
WORKER_ENVIRONMENT = {
    **offline.ENVIRONMENT,
    # By it the stack tells a worker's memory from its own (`graft.stack.usage`).
    "TRAINING_WORKER": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


class Fit:
    """An actor's class: one call, one worker group."""

    def fit(self, spec: RunSpec, run: Any, begin_seconds: float) -> None:
        """Blocks until the worker group has ended. Raises what a worker raised. `begin_seconds`: when the run began."""
        os.environ.update(DRIVER_ENVIRONMENT)
        # Ray Train gives its request up after a minute and makes it again; the autoscaler is to see one that stays.
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(spec.nodes_wait_seconds)
        from ray.train import RunConfig, ScalingConfig

        from graft.training.controller import Led, Trainer
        from graft.training.process_group import NodeAddressConfig

        trainer = Trainer(
            _train_loop,
            train_loop_config={"spec": spec, "run": run, "begin_seconds": begin_seconds},
            scaling_config=ScalingConfig(
                num_workers=spec.num_workers,
                use_gpu=bool(spec.demand.resources.get("GPU")),
                resources_per_worker=bundle(spec.demand),
                label_selector=dict(spec.demand.labels) or None,
            ),
            run_config=RunConfig(
                name="ray-train",
                **ray_storage(spec),
                worker_runtime_env={"env_vars": worker_environment(spec.demand)},
                callbacks=[Led(run, spec.name)],
            ),
            torch_config=NodeAddressConfig(backend="gloo"),
        )
        trainer.fit()


def bundle(demand: Demand) -> dict[str, float]:
    """What Ray reserves for a worker."""
    return {name: amount for name, amount in demand.resources.items() if amount}


def worker_environment(demand: Demand) -> dict[str, str]:
    """Variables of a worker's process. Ray shows a process that reserves no GPU all that its node has; here that is for
    those that do not say how many they want."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if demand.resources.get("GPU") == 0 else {}
    return WORKER_ENVIRONMENT | hidden


def _train_loop(config: dict[str, Any]) -> None:
    clock = Clock()
    clock.laps["worker_group"] = round(time.time() - config["begin_seconds"], 3)
    import ray.train
    import torch.distributed

    from graft.training.objectives.objective import Group
    from graft.training.worker import run_worker

    clock.lap("imports")
    context = ray.train.get_context()
    spec, run = config["spec"], config["run"]
    workers = context.get_world_size()
    if context.get_world_rank() == 0:
        run.place.options(concurrency_group="reports").remote()

    def tell(kind: str, data: dict[str, Any], trace: str = "") -> None:
        # Not awaited step by step; the end is, so that nothing is lost when the worker leaves.
        # A group of one thread keeps them in order.
        sent = run.tell.options(concurrency_group="reports").remote(kind, data, trace)
        if kind in ENDS:
            ray.get(sent)

    def reduce(tensor: torch.Tensor) -> None:
        if workers > 1:
            try:
                torch.distributed.all_reduce(tensor)
            except RuntimeError as error:  # gloo's words for a companion that has gone: one that failed has said why
                raise lost_worker(spec.error_log) from error

    try:
        threads = partial(free_threads, spec.demand)
        run_worker(spec, tell, Group(context.get_world_rank(), workers, reduce), threads, clock)
    except Exception as error:
        # Told from here, by whichever worker failed first: the others will only see that it has left them.
        tell("failed", failure(error, spec.error_log), traceback.format_exc())
        raise


def free_threads(demand: Demand) -> int:
    """Threads for a worker on this node: its share of the node's CPUs, by what all have reserved there.

    A lone worker uses every core, whatever it reserves; of two that reserve alike each gets half. Fractions of a CPU,
    which processes that mostly wait reserve, do not count.
    """
    node = ray.get_runtime_context().get_node_id()
    mine = demand.resources["CPU"]
    cpus = total_resources_per_node().get(node, {}).get("CPU", mine)
    reserved = cpus - available_resources_per_node().get(node, {}).get("CPU", 0.0)
    return max(1, int(cpus * mine / max(mine, int(reserved + 1e-6)) + 1e-6))
