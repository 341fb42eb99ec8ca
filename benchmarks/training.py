"""Training speed: Graft's worker against TRL's SFTTrainer, on the same data, order, adapter and threads.

    python -m benchmarks.training [--quick]

SmolLM2-135M, LoRA of rank 8 on all linear layers, film reviews, no gradient checkpointing. Each contestant has a
process of its own, which waits while another plays. Tokens are those of prompts and completions, never padding.
"""

import functools
import os
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

from benchmarks.common import (
    Contestant,
    Report,
    answer_rounds,
    arguments,
    base_model,
    console,
    interleave,
    temporary_folder,
)
from graft.data.samples import reviews, write_rows

KINDS = {
    "graft": "graft.training.worker: packed rows, fused LoRA, head on completions only",
    "trl-padded": "trl.SFTTrainer, padded batches of 8",
    "trl-padding-free": "trl.SFTTrainer(padding_free=True, max_length=None), 8 examples in one row",
    "trl-packed": "trl.SFTTrainer(packing=True, packing_strategy='bfd', max_length=512), one row a step",
}
SAME_STEPS = ("trl-padded", "trl-padding-free")
"""Those whose steps have the same examples as Graft's, so that their losses can be compared."""
ROUNDS, STEPS = 5, 8
REVIEWS = 400
LOSS_TOLERANCE = {"float32": 0.01, "bfloat16": 0.05}
"""Largest relative difference of a step's loss. bfloat16 keeps 8 bits, and LoRA's updates enlarge what differs."""


def main() -> int:
    """Returns 1 when a loss curve differs from the reference's."""
    asked = arguments(__doc__)
    if asked.contestant:
        from benchmarks.training_contestants import open_contestant

        where = (Path(os.environ[name]) for name in ("BENCHMARK_BASE", "BENCHMARK_DATA"))
        return answer_rounds(functools.partial(open_contestant, asked.contestant, *where))

    rounds, steps = (1, 3) if asked.quick else (ROUNDS, STEPS)
    base = base_model()
    report = Report(
        name="training",
        quick=asked.quick,
        settings={
            "base_model": base.id,
            "data": f"graft.data.samples.reviews, {REVIEWS} rows",
            "lora": {"rank": 8, "target_modules": "all linear"},
            "batch_size": 8,
            "steps_a_round": steps,
            "threads": len(os.sched_getaffinity(0)),
        },
        contestants=KINDS,
    )
    # bfloat16 only where an instruction multiplies it; where it pays is ADR 7's question.
    dtypes = ["float32", *(["bfloat16"] if "avx512_bf16" in report.head["machine"]["simd"] else [])]
    with temporary_folder() as folder:
        data = write_rows(reviews(REVIEWS, 0).train, folder / "reviews.jsonl")
        for dtype in dtypes:
            compare(report, dtype, rounds, steps, {"BENCHMARK_BASE": base.path, "BENCHMARK_DATA": str(data)}, folder)
    return report.finish()


def compare(report: Report, dtype: str, rounds: int, steps: int, environment: dict[str, str], logs: Path) -> None:
    """All contestants in one type."""
    speeds: dict[str, list[float]] = defaultdict(list)
    losses: dict[str, list[float]] = {}
    tokens: dict[str, float] = {}
    with ExitStack() as stack:
        contestants = {
            kind: stack.enter_context(
                Contestant("benchmarks.training", f"{kind}/{dtype}", logs / f"{kind}-{dtype}.log", environment)
            )
            for kind in KINDS
        }
        for number, kind in interleave(list(KINDS), rounds):
            played = contestants[kind].play({"steps": steps})
            speeds[kind].append(played["tokens"] / played["seconds"])
            losses[kind], tokens[kind] = played["losses"], played["tokens"]
            console.print(f"{dtype}, round {number + 1} of {rounds}: {kind} {speeds[kind][-1]:.0f} tokens/s")
    report.compare(f"training, {dtype}", "tokens/s", speeds, ours=["graft"])
    report.check(
        f"{dtype}: Graft and TRL count the same tokens in the same steps",
        all(tokens[kind] == tokens["graft"] for kind in SAME_STEPS),
        tokens,
    )
    for kind in SAME_STEPS:
        pairs = zip(losses["graft"], losses[kind], strict=True)
        difference = max(abs(ours - theirs) / theirs for ours, theirs in pairs)
        report.check(
            f"{dtype}: every step's loss is that of {kind} within {LOSS_TOLERANCE[dtype]:.0%}",
            difference <= LOSS_TOLERANCE[dtype],
            {
                "largest relative difference": round(difference, 6),
                "last losses": [losses["graft"][-1], losses[kind][-1]],
            },
        )


if __name__ == "__main__":
    raise SystemExit(main())
