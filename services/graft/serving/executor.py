"""Runs the model inside the engine core instead of in a worker process of its own.

vLLM's CPU platform insists on a worker process, because it binds OpenMP's threads through the worker's environment.
Graft sets that environment before anything is imported (`processes.prepare_environment`), so the worker process would
only cost: 0.6 GB, 20 s of imports and a copy of every batch.
"""

from vllm.v1.executor.uniproc_executor import UniProcExecutor

from graft.serving.cpu_seeds import tolerate_seeds
from graft.serving.processes import die_with_parent


class InCoreExecutor(UniProcExecutor):  # type: ignore[misc]  # vLLM publishes no types here
    """vLLM's single-process executor, in a core that dies with its parent."""

    def _init_executor(self) -> None:
        # The first code of ours that runs in the core; its parent is the fork server, which dies with the replica.
        die_with_parent()
        tolerate_seeds()
        super()._init_executor()

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        """Nothing runs beside the model on a CPU."""
        return False
