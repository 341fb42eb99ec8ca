"""The peers of `gateway.py` that are no part of Graft: `ray.serve.llm`, and vLLM's AsyncLLM without any server.

Each has a process of its own, and the model, type, context and batch size of Graft's engine.
"""

import asyncio
import atexit
import importlib.util
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.ports import free_port

from benchmarks.common import Round
from benchmarks.load import drive
from graft.serving.processes import prepare_environment

Play = Callable[[Round], Round]
GIB = 1024**3
MAX_BATCHED_TOKENS = 512
"""As in `graft.serving.engine`."""


def engine_kwargs() -> dict[str, Any]:
    """vLLM's arguments: those of `graft.serving.engine.engine_args`, without LoRA and with vLLM's own executor."""
    return {
        "dtype": os.environ["BENCHMARK_DTYPE"],
        "max_model_len": int(os.environ["BENCHMARK_CONTEXT_TOKENS"]),
        "max_num_seqs": int(os.environ["BENCHMARK_MAX_NUM_SEQS"]),
        "max_num_batched_tokens": MAX_BATCHED_TOKENS,
        "kv_cache_memory_bytes": GIB,
        "gpu_memory_utilization": 0.3,
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }


def environment() -> None:
    """What vLLM needs on a CPU; every core for it, as Graft's engine has."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    prepare_environment(Path(torch.origin).parent, threads=len(os.sched_getaffinity(0)))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


def vllm_alone() -> Play:
    """AsyncLLM, asked in its own process: what is left when every server is taken away."""
    environment()
    from transformers import AutoTokenizer
    from vllm import SamplingParams, TokensPrompt
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    base = os.environ["BENCHMARK_BASE"]
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    runner = asyncio.Runner()

    async def start() -> AsyncLLM:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(model=base, **engine_kwargs()))

    llm = runner.run(start())
    atexit.register(llm.shutdown)

    async def ask(question: str, max_tokens: int) -> AsyncIterator[str]:
        chat = [{"role": "user", "content": question}]
        token_ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, output_kind=RequestOutputKind.DELTA)
        async for output in llm.generate(TokensPrompt(prompt_token_ids=token_ids), sampling, question):
            if text := output.outputs[0].text:
                yield text

    def play(asked: Round) -> Round:
        max_tokens = asked["max_tokens"]
        return asdict(runner.run(drive(lambda text: ask(text, max_tokens), asked["questions"], asked["in_flight"])))

    return play


DIRECT_STREAMING = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
}
"""What Ray's guide to high throughput sets: HAProxy in front, and replicas that answer without an ingress between."""


def ray_serve_llm(variables: dict[str, str]) -> Play:
    """`build_openai_app` on a Ray cluster of its own; a round only tells the server's address.

    Its streams are not gathered for 50 ms, as they are by default, and one ingress replica leaves the cores to the
    engine: both are faster here.
    """
    environment()
    os.environ.update(variables)
    import ray
    from ray import serve
    from ray.serve.llm import LLMConfig, build_openai_app

    port = free_port()
    ray.init(
        num_cpus=8,  # shares for placement: ingress, server and engine, whatever the machine has
        include_dashboard=False,
        _temp_dir=os.environ["BENCHMARK_RAY_FOLDER"],
        _node_ip_address="127.0.0.1",
        object_store_memory=80_000_000,
    )
    atexit.register(ray.shutdown)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    atexit.register(serve.shutdown)
    config = LLMConfig(
        model_loading_config={"model_id": "base", "model_source": os.environ["BENCHMARK_BASE"]},
        accelerator_config={"kind": "cpu"},
        engine_kwargs=engine_kwargs(),
        deployment_config={"num_replicas": 1},
        experimental_configs={"stream_batching_interval_ms": 0},
        log_engine_metrics=False,
    )
    app: dict[str, Any] = {"llm_configs": [config]}
    if not variables:  # direct streaming has no ingress to configure
        app["ingress_deployment_config"] = {"num_replicas": 1}
    serve.run(build_openai_app(app), name="llm")
    return lambda _: {"base_url": f"http://127.0.0.1:{port}/v1"}


CONTESTANTS: dict[str, Callable[[], Play]] = {
    "vllm": vllm_alone,
    "ray-serve-llm": partial(ray_serve_llm, {}),
    "ray-serve-llm-direct": partial(ray_serve_llm, DIRECT_STREAMING),
}
