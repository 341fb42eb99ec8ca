"""Answers of real vLLM engines, base and adapters each alone and then together in one batch, as JSON on the last line.

A program of its own (`python -m tests.support.mixed_batches BASE:ADAPTER:ADAPTER ...`), because vLLM reads
VLLM_PLUGINS, which decides between its own kernels and Graft's, once a process. vLLM takes much longer to import than
an engine to start, so that one program starts an engine for each base, one after another.
"""

import json
import os
import sys
from itertools import chain, zip_longest
from typing import Any

PROMPTS = ("The cat", "Once upon a time there was a long, long prompt of many tokens", "x", "2 + 2 =", "Why is the sky")
ANSWER_TOKENS = (12, 5, 9, 3, 12)
"""A length each, so that requests leave the batch at different steps and its groups change."""


def answer_all(base: str, adapters: list[str]) -> dict[str, Any]:
    """The wrapper that computed, and answers (prompt ids, token ids, log-probabilities) by `alone` and by `mixed`.

    With Graft's kernels also the log-probabilities of the prompts, `prompts_alone` and `prompts_mixed`.
    """
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest
    from vllm.platforms import current_platform

    from graft.serving.cpu_lora import WRAPPER
    from graft.serving.executor import InCoreExecutor

    llm = LLM(
        model=base,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=32,
        gpu_memory_utilization=0.1,
        enforce_eager=True,
        distributed_executor_backend=InCoreExecutor,
        # A mixed batch must compute its prompts itself, not find those of the run before.
        enable_prefix_caching=False,
        enable_lora=True,
        max_loras=len(adapters),
        max_lora_rank=8,
        disable_log_stats=True,
    )
    who = [None, *(LoRARequest(f"adapter-{i}", i, path) for i, path in enumerate(adapters, start=1))]
    sampling = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, logprobs=1) for n in ANSWER_TOKENS]

    def run(asked: list[tuple[int, int]]) -> dict[str, Any]:
        outputs = llm.generate(
            [PROMPTS[prompt] for _, prompt in asked],
            [sampling[prompt] for _, prompt in asked],
            lora_request=[who[speaker] for speaker, _ in asked],
            use_tqdm=False,
        )
        answers = {}
        for (speaker, prompt), output in zip(asked, outputs, strict=True):
            (first,) = output.outputs
            logprobs = [step[token].logprob for token, step in zip(first.token_ids, first.logprobs, strict=True)]
            answers[f"{speaker}/{prompt}"] = {
                "prompt_token_ids": list(output.prompt_token_ids),
                "token_ids": list(first.token_ids),
                "logprobs": logprobs,
            }
        return answers

    def read(asked: list[tuple[int, int]]) -> dict[str, list[float]]:
        outputs = llm.generate(
            [PROMPTS[prompt] for _, prompt in asked],
            SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1),
            lora_request=[who[speaker] for speaker, _ in asked],
            use_tqdm=False,
        )
        logprobs = {}
        for (speaker, prompt), output in zip(asked, outputs, strict=True):
            steps = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
            logprobs[f"{speaker}/{prompt}"] = [step[token].logprob for token, step in steps]
        return logprobs

    # The base comes first, while no slot is filled; afterwards every slot is.
    each = [[(speaker, prompt) for prompt in range(len(PROMPTS))] for speaker in range(len(who))]
    alone = {key: answer for asked in each for key, answer in run(asked).items()}
    interleaved = [one for group in zip_longest(*each) for one in group if one is not None]
    mixed = [run(asked) for asked in (interleaved, list(chain(*each)), list(chain(*reversed(each))))]
    wrapper = current_platform.get_punica_wrapper()
    result = {"wrapper": wrapper, "alone": alone, "mixed": mixed}
    if wrapper == WRAPPER:
        result["prompts_alone"] = {key: logprobs for asked in each for key, logprobs in read(asked).items()}
        result["prompts_mixed"] = read(interleaved)
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    return result


if __name__ == "__main__":
    asked = [argument.split(os.pathsep) for argument in sys.argv[1:]]
    print(json.dumps([answer_all(base, adapters) for base, *adapters in asked]))
