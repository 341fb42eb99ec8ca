"""Derives every hyperparameter that a job left open, from its data and base model, with the reason of each. Pure.

Does not read data: `graft.data.prepare` has measured it, and refused what cannot be trained on.
"""

import math
from typing import Any

from graft.data.prepare import DataStats
from graft.domain.jobs import JobSpec, Resolved
from graft.domain.resources import BaseModel

DEFAULT_RANK = 8
"""Hu et al. 2021 (arXiv:2106.09685), table 6: ranks above 8 gain nothing on most tasks."""
REFERENCE_PARAMETERS = 135e6
REFERENCE_LEARNING_RATE = 5e-4
"""Measured: 400 movie reviews, SmolLM2-135M, LoRA r=8 on all linear layers: held-out accuracy 0.66 to 0.83."""
LEAST_STEPS = 100
"""Fewer optimizer steps than this leave LoRA's B, which starts at zero, close to where it began."""
MOST_EPOCHS = 5
"""More passes over few rows memorise them."""
LARGE_DATA_EXAMPLES = 5000
"""From here on a batch of 32 still gives more than 150 steps an epoch, and its gradient is less noisy."""


def derive(spec: JobSpec, base: BaseModel, stats: DataStats) -> tuple[Resolved, ...]:
    """Every hyperparameter as it will be used: given ones as they are, the others derived.

    `max_steps` is the total number of steps. Where `epochs` and `max_steps` are both given, `max_steps` rules.
    """
    asked, lora = spec.hyperparameters, spec.lora
    resolved: list[Resolved] = []

    def settle(name: str, given: Any, value: Any, reason: str) -> Any:
        if given is not None:
            resolved.append(Resolved(name, given, False, "Given by the job."))
            return given
        resolved.append(Resolved(name, value, True, reason))
        return value

    rows = stats.example_count
    usual_batch = 8 if rows < LARGE_DATA_EXAMPLES else 32
    batch_size = settle(
        "batch_size",
        asked.batch_size,
        min(rows, usual_batch),
        f"{usual_batch} for {_count(rows, 'example')} (8 below {LARGE_DATA_EXAMPLES}, 32 from there on)."
        if rows >= usual_batch
        else f"All {_count(rows, 'example')} there are.",
    )
    steps_per_epoch = math.ceil(rows / batch_size)
    if asked.max_steps is not None and asked.epochs is None:
        epochs = settle(
            "epochs",
            None,
            asked.max_steps / steps_per_epoch,
            f"{_count(asked.max_steps, 'step')} over {_count(steps_per_epoch, 'step')} an epoch.",
        )
    else:
        epochs = settle(
            "epochs",
            asked.epochs,
            float(min(MOST_EPOCHS, max(1, math.ceil(LEAST_STEPS / steps_per_epoch)))),
            f"An epoch has {_count(steps_per_epoch, 'step')}; as many epochs as give {LEAST_STEPS} steps, "
            f"at least 1 and at most {MOST_EPOCHS}.",
        )
    total_steps = settle(
        "max_steps",
        asked.max_steps,
        max(1, math.ceil(epochs * steps_per_epoch)),
        f"{epochs:g} × {_count(steps_per_epoch, 'step')} an epoch.",
    )
    multiplier = settle(
        "learning_rate_multiplier", asked.learning_rate_multiplier, 1.0, "1: leaves the learning rate as it is."
    )
    scale = min(1.0, max(0.1, (REFERENCE_PARAMETERS / max(base.parameter_count, 1)) ** 0.25))
    usual_rate = float(f"{REFERENCE_LEARNING_RATE * scale:.2g}")
    settle(
        "learning_rate",
        asked.learning_rate,
        usual_rate * multiplier,
        f"{REFERENCE_LEARNING_RATE:g} up to 135M parameters (measured), divided by the fourth root of how many times "
        f"larger the base is; this one has {base.parameter_count / 1e6:.0f}M."
        + (f" {usual_rate:g}, multiplied by {multiplier:g} as the job asks." if multiplier != 1 else ""),
    )
    settle("warmup_ratio", asked.warmup_ratio, 0.05, "5% of the steps: AdamW's second moment needs some to settle.")
    settle("weight_decay", asked.weight_decay, 0.0, "0: a low rank regularises already.")
    settle("max_grad_norm", asked.max_grad_norm, 1.0, "1.0, the bound of most published recipes.")
    settle(
        "context_tokens",
        asked.context_tokens,
        base.context_tokens,
        f"The base model's context; the longest row has {_count(stats.longest_tokens, 'token')}.",
    )
    settle("seed", asked.seed, 0, "0, so that the same job gives the same curve.")
    settle("num_workers", asked.num_workers, 1, "1: it uses every free core of its node already.")
    settle(
        "checkpoint_steps",
        asked.checkpoint_steps,
        max(10, math.ceil(total_steps / 4)),
        f"A quarter of the {_count(total_steps, 'step')}, and not below 10.",
    )
    resolved.append(
        Resolved(
            "over_length_policy",
            asked.over_length_policy.value,
            False,
            f"{stats.over_length_count} of {_count(stats.row_count, 'row')} are longer than the context.",
        )
    )
    rank = settle("lora.rank", lora.rank or None, DEFAULT_RANK, "8 (Hu et al. 2021, arXiv:2106.09685, table 6).")
    settle("lora.alpha", lora.alpha or None, 2.0 * rank, f"Twice the rank of {rank}: the update is scaled by 2.")
    settle("lora.dropout", lora.dropout or None, 0.0, f"0: {epochs:g} epochs hardly overfit a low rank.")
    settle(
        "lora.target_modules",
        list(lora.target_modules) or None,
        list(base.target_modules),
        "Every linear layer (Dettmers et al. 2023, arXiv:2305.14314, section 4: needed to match full fine-tuning).",
    )
    return tuple(resolved)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
