"""Imported once by the fork server: all that an engine core needs, so that each core finds it in memory.

The imports are the point; nothing here may start a thread, because a fork copies only one.
"""

from graft.serving.processes import die_with_parent

die_with_parent()

# After the death signal, which must hold during the imports.
import vllm.lora.worker_manager  # noqa: E402
import vllm.model_executor.models.llama  # noqa: E402
import vllm.v1.attention.backends.cpu_attn  # noqa: E402
import vllm.v1.engine.core  # noqa: E402
import vllm.v1.worker.cpu_worker  # noqa: E402, F401

import graft.serving.executor  # noqa: E402, F401
