"""vLLM plugin: makes LoRA on a CPU right in mixed batches, and faster.

vLLM loads it, by its entry point, in each of its processes. There it makes the CPU platform hand out
`graft.serving.cpu_lora_kernels.GroupedPunicaWrapper`. Elsewhere than on the CPU platform it does nothing.
"""

WRAPPER = "graft.serving.cpu_lora_kernels.GroupedPunicaWrapper"
STOCK = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"


def register() -> None:
    """Replaces `CpuPlatform.get_punica_wrapper`. Calling it again does nothing.

    Raises RuntimeError when this vLLM's CPU platform no longer names the wrapper that is replaced: its kernels must
    then be looked at again, and an engine with wrong answers must not start.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.platforms.cpu import CpuPlatform

    found = CpuPlatform.get_punica_wrapper()
    if found == WRAPPER:
        return
    if found != STOCK:
        raise RuntimeError(f"vLLM's CPU platform uses {found} for LoRA; Graft's kernels replace {STOCK} only.")

    def get_punica_wrapper(_: type) -> str:
        return WRAPPER

    CpuPlatform.get_punica_wrapper = classmethod(get_punica_wrapper)
