"""Keeps requests with a `seed` from ending a CPU engine.

When a prompt is computed in several steps, vLLM throws away what it sampled in all but the last, and sets the request's
random generator back by one draw. torch's CPU generator has no offset to set back: it raises, which ends the engine for
everyone. Here that generator is left where it is. A seed gives the same answer for the same batches, not for others.
"""

from typing import Any


def tolerate_seeds() -> None:
    """Patches vLLM's model runner in this process, once. Elsewhere than on the CPU platform it does nothing."""
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if not current_platform.is_cpu() or hasattr(GPUModelRunner, "graft_bookkeeping"):
        return
    GPUModelRunner.graft_bookkeeping = GPUModelRunner._bookkeeping_sync

    def bookkeeping(self: Any, *arguments: Any, **named: Any) -> Any:
        generators = self.input_batch.generators
        self.input_batch.generators = {}  # all that is done with them there is to set them back
        try:
            return self.graft_bookkeeping(*arguments, **named)
        finally:
            self.input_batch.generators = generators

    GPUModelRunner._bookkeeping_sync = bookkeeping
