"""Four adapters and their base in one batch: the served engine, mixed and one adapter at a time, against PEFT.

    python -m benchmarks.mixed_adapters [--quick]

The same requests, by token ids, are answered greedily in float32 by Graft's served engine (all at once; then grouped by
adapter, one group after the other) and by PEFT's `generate` (grouped with `set_adapter`; then all in one batch with
`adapter_names`). Every answer is compared, token by token. The adapters are random, of rank 8 on all linear layers.
"""

import asyncio
import functools
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tests.support.adapters import make_adapter
from tests.support.serving_stack import adapter_ref

from benchmarks.common import (
    Contestant,
    Report,
    Round,
    answer_rounds,
    arguments,
    base_model,
    console,
    interleave,
    temporary_folder,
)
from benchmarks.load import fresh_seed
from benchmarks.stacks import graft_stack
from graft.data.samples import reviews, zero_shot
from graft.internal.engine_client import EngineClient
from graft.internal.token import engine_token
from graft.internal.v1 import engine_pb2
from graft.settings import Settings

WAYS = {
    "graft-mixed": "Graft's served engine, all requests at once",
    "graft-grouped": "Graft's served engine, one adapter at a time",
    "peft-grouped": "PEFT's generate, one batch an adapter, set_adapter between them; sdpa, float32, left padding",
    "peft-mixed": "PEFT's generate, one batch, adapter_names",
}
ADAPTERS = ("a", "b", "c", "d")
BASE_SPEAKER = ""
SPEAKERS = (BASE_SPEAKER, *ADAPTERS)
REQUESTS_A_SPEAKER = 8
ANSWER_TOKENS = 32
ROUNDS = 5
SCALE = 0.04
"""Of the random weights: strong enough that every adapter changes answers, weak enough that they stay language."""
LEAST_EQUAL = 0.95
"""Share of answers that must be the same in two ways of computing them. Float32 sums differ in their last bits with the
batch's shape; where two tokens are as likely, greedy decoding then takes either, and all that follows differs."""

Answers = dict[tuple[str, int], list[int]]
"""Token ids by speaker and number of the request."""


@dataclass(frozen=True)
class Asked:
    """One round's requests."""

    prompts: dict[tuple[str, int], list[int]]
    answer_tokens: int


def main() -> int:
    """Returns 1 when too many answers differ."""
    asked = arguments(__doc__)
    if asked.contestant:
        return answer_rounds(functools.partial(open_peft, Path(os.environ["BENCHMARK_BASE"])))
    rounds, tokens, each = (1, 8, 2) if asked.quick else (ROUNDS, ANSWER_TOKENS, REQUESTS_A_SPEAKER)
    base = base_model()
    report = Report(
        name="mixed_adapters",
        quick=asked.quick,
        settings={
            "base_model": base.id,
            "adapters": len(ADAPTERS),
            "rank": 8,
            "requests_a_round": each * len(SPEAKERS),
            "answer_tokens": tokens,
            "dtype": "float32",
            "max_num_seqs": each * len(SPEAKERS),
        },
        contestants=WAYS,
    )
    speeds: dict[str, list[float]] = defaultdict(list)
    answers: dict[str, Answers] = defaultdict(dict)
    with temporary_folder() as folder:
        folders = {
            name: make_adapter(Path(base.path), folder / name, seed=seed, scale=SCALE)
            for seed, name in enumerate(ADAPTERS)
        }
        settings = {
            "GRAFT_SERVING_DTYPE": "float32",
            "GRAFT_SERVING_MAX_NUM_SEQS": str(each * len(SPEAKERS)),
            "GRAFT_SERVING_MAX_LORAS": str(len(ADAPTERS)),
        }
        variables = {"BENCHMARK_BASE": base.path, "BENCHMARK_ADAPTERS": str(folder)}
        plan = requests(Path(base.path), rounds, each, tokens)
        with (
            graft_stack(settings) as stack,
            Contestant("benchmarks.mixed_adapters", "peft", folder / "peft.log", variables) as peft,
        ):
            graft = functools.partial(ask_graft, stack.settings, folders)
            for way in WAYS:  # once for nothing: adapters are loaded, threads started
                play(way, graft, peft, Asked({(name, 0): [1, 2, 3] for name in SPEAKERS}, 2))
            report.notes.append(
                f"Graft's stack waits while PEFT plays and then keeps {stack.idle_cores():.2f} cores busy."
            )
            for number, way in interleave(list(WAYS), rounds):
                seconds, told = play(way, graft, peft, plan[number])
                speeds[way].append(len(told) * tokens / seconds)
                answers[way] |= {(f"{number}/{speaker}", index): ids for (speaker, index), ids in told.items()}
                console.print(f"round {number + 1} of {rounds}: {way} {speeds[way][-1]:.0f} tokens/s")
    ours = ("graft-mixed", "graft-grouped")
    report.compare("answers", "tokens/s", speeds, ours)
    report.ratio("answers", *ours, *(speeds[way] for way in ours))
    compare(report, answers)
    return report.finish()


def requests(base: Path, rounds: int, each: int, tokens: int) -> list[Asked]:
    """Film reviews to be judged, as the base's chat template renders them; no review comes twice."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    count = each * len(SPEAKERS)
    chats = [zero_shot(row) for row in reviews(rounds * count, 0).train]
    prompts = [
        tokenizer.encode(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        for chat in chats
    ]
    keys = [(speaker, index) for index in range(each) for speaker in SPEAKERS]
    return [
        Asked(dict(zip(keys, prompts[start : start + count], strict=True)), tokens)
        for start in range(0, rounds * count, count)
    ]


def play(
    way: str, graft: Callable[[Sequence[Any], Asked], tuple[float, Answers]], peft: Contestant, asked: Asked
) -> tuple[float, Answers]:
    """Seconds and answers of one way."""
    keys = list(asked.prompts)
    grouped = [[key for key in keys if key[0] == speaker] for speaker in SPEAKERS]
    groups = grouped if way.endswith("grouped") else [keys]
    if way.startswith("graft"):
        return graft(groups, asked)
    batches = [[[speaker, asked.prompts[speaker, index]] for speaker, index in group] for group in groups]
    played = peft.play({"batches": batches, "answer_tokens": asked.answer_tokens})
    return played["seconds"], dict(zip(chain(*groups), played["answers"], strict=True))


def ask_graft(
    settings: Settings, folders: dict[str, Path], groups: Sequence[Any], asked: Asked
) -> tuple[float, Answers]:
    """Every group at once, groups one after the other, over the replica's own gRPC."""
    references = {name: adapter_ref(name, folder) for name, folder in folders.items()}
    salt = fresh_seed()  # an answer must not find another way's prompt in the prefix cache

    async def answer(client: EngineClient, speaker: str, index: int) -> list[int]:
        request = {
            "prompt": asked.prompts[speaker, index],
            "max_tokens": asked.answer_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "cache_salt": salt,
        }
        response = await client.generate(
            engine_pb2.GenerateRequest(
                endpoint=engine_pb2.ENDPOINT_COMPLETIONS,
                body=json.dumps(request).encode(),
                adapter=references.get(speaker),
                public_model=speaker or "base",
                request_id=f"{speaker}-{index}",
            ),
            timeout_seconds=300,
        )
        if response.http_status != 200:
            raise RuntimeError(response.body.decode())
        return list(json.loads(response.body)["choices"][0]["token_ids"])

    async def answer_all() -> tuple[float, Answers]:
        client = EngineClient(settings.engine_address, token=engine_token(settings))
        told: Answers = {}
        try:
            await client.residency()  # the connection is open before the clock starts
            started = time.perf_counter()
            for group in groups:
                told |= zip(group, await asyncio.gather(*(answer(client, *key) for key in group)), strict=True)
            return time.perf_counter() - started, told
        finally:
            await client.close()

    return asyncio.run(answer_all())


def open_peft(base: Path) -> Callable[[Round], Round]:
    """PEFT with every adapter loaded, in a process of its own."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    folder = Path(os.environ["BENCHMARK_ADAPTERS"])
    model = PeftModel.from_pretrained(bare, folder / ADAPTERS[0], adapter_name=ADAPTERS[0])
    for name in ADAPTERS[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    model.eval()
    # Answers have one length: nothing ends them early, as `ignore_eos` has it in vLLM.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(batch: list[tuple[str, list[int]]], answer_tokens: int, **options: Any) -> list[list[int]]:
        longest = max(len(prompt) for _, prompt in batch)
        padding = [longest - len(prompt) for _, prompt in batch]
        padded = [[0] * pad + prompt for pad, (_, prompt) in zip(padding, batch, strict=True)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
        told = model.generate(
            input_ids=torch.tensor(padded),
            attention_mask=torch.tensor(mask),
            max_new_tokens=answer_tokens,
            do_sample=False,
            **options,
        )
        answers: list[list[int]] = told[:, longest:].tolist()
        return answers

    def answer(batch: list[tuple[str, list[int]]], answer_tokens: int) -> list[list[int]]:
        speakers = {speaker for speaker, _ in batch}
        if len(speakers) > 1:
            names = [speaker or "__base__" for speaker, _ in batch]
            return generate(batch, answer_tokens, adapter_names=names)
        (speaker,) = speakers
        if speaker == BASE_SPEAKER:
            with model.disable_adapter():
                return generate(batch, answer_tokens)
        model.set_adapter(speaker, inference_mode=True)
        return generate(batch, answer_tokens)

    def play_round(asked: Round) -> Round:
        with torch.inference_mode():
            started = time.perf_counter()
            answers = [answer(batch, asked["answer_tokens"]) for batch in asked["batches"]]
            return {"seconds": time.perf_counter() - started, "answers": list(chain(*answers))}

    return play_round


def compare(report: Report, answers: dict[str, Answers]) -> None:
    """Every way against the engine with one adapter at a time."""
    reference = answers["graft-grouped"]
    for way in ("graft-mixed", "peft-grouped", "peft-mixed"):
        diverging = {
            f"{round_and_speaker}/{index}": first_difference(ids, reference[round_and_speaker, index])
            for (round_and_speaker, index), ids in answers[way].items()
            if ids != reference[round_and_speaker, index]
        }
        share = 1 - len(diverging) / len(reference)
        report.check(
            f"{way} answers as graft-grouped in at least {LEAST_EQUAL:.0%}",
            share >= LEAST_EQUAL,
            {"equal": round(share, 4), "of": len(reference), "first difference at token": diverging},
        )


def first_difference(ids: list[int], others: list[int]) -> int:
    """Index of the first token that is not the same."""
    pairs = zip(ids, others, strict=True)
    return next(index for index, (token, other) in enumerate(pairs) if token != other)


if __name__ == "__main__":
    raise SystemExit(main())
