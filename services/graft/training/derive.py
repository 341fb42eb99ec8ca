"""Derives every hyperparameter that a job left open, from its data and base model, with the reason of each. Pure."""

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


def derive(spec: JobSpec, base: BaseModel, stats: DataStats) -> tuple[Resolved, ...]:
    """Every hyperparameter as it will be used: given ones as they are, the others derived."""
    asked, lora = spec.hyperparameters, spec.lora
    resolved: list[Resolved] = []

    def settle(name: str, given: Any, value: Any, reason: str) -> Any:
        if given is not None:
            resolved.append(Resolved(name, given, False, "Given."))
            return given
        resolved.append(Resolved(name, value, True, reason))
        return value

    rows = stats.example_count
    batch_size = settle(
        "batch_size",
        asked.batch_size,
        min(rows, 8 if rows < 5000 else 32),
        f"8 below 5000 examples, 32 from there on, and no more than the {rows} examples.",
    )
    steps_per_epoch = math.ceil(rows / batch_size)
    epochs = settle(
        "epochs",
        asked.epochs,
        float(min(5, max(1, math.ceil(LEAST_STEPS / steps_per_epoch)))),
        f"An epoch has {steps_per_epoch} steps; as many epochs as give {LEAST_STEPS} steps, at least 1, at most 5.",
    )
    by_epochs = max(1, math.ceil(epochs * steps_per_epoch))
    total = settle("max_steps", asked.max_steps, by_epochs, f"{epochs} epochs of {steps_per_epoch} steps.")
    scale = min(1.0, max(0.1, (REFERENCE_PARAMETERS / max(base.parameter_count, 1)) ** 0.25))
    settle(
        "learning_rate",
        asked.learning_rate,
        float(f"{REFERENCE_LEARNING_RATE * scale:.2g}"),
        f"{REFERENCE_LEARNING_RATE} at 135M parameters, less by the fourth root above; "
        f"this base has {base.parameter_count / 1e6:.0f}M.",
    )
    settle("warmup_ratio", asked.warmup_ratio, 0.05, "5% of the steps: AdamW's second moment needs some to settle.")
    settle("weight_decay", asked.weight_decay, 0.0, "0: a low rank regularises already.")
    settle("max_grad_norm", asked.max_grad_norm, 1.0, "1.0, the usual bound.")
    settle(
        "context_tokens", asked.context_tokens, base.context_tokens, "The longest sequence that the service answers."
    )
    settle("seed", asked.seed, 0, "0, so that the same job gives the same curve.")
    settle("num_workers", asked.num_workers, 1, "1: a second worker pays from some 10,000 examples on.")
    settle("checkpoint_steps", asked.checkpoint_steps, max(10, math.ceil(total / 4)), f"Four over the {total} steps.")
    resolved.append(
        Resolved(
            "over_length_policy",
            asked.over_length_policy.value,
            False,
            f"{stats.over_length_count} of {stats.row_count} rows are longer than the context.",
        )
    )
    rank = settle("lora.rank", lora.rank or None, DEFAULT_RANK, "8 (Hu et al. 2021, table 6).")
    settle("lora.alpha", lora.alpha or None, 2.0 * rank, "Twice the rank, so that the update's scale is 2.")
    settle("lora.dropout", lora.dropout or None, 0.0, "0: few epochs do not overfit a low rank.")
    settle(
        "lora.target_modules",
        list(lora.target_modules) or None,
        list(base.target_modules),
        "Every linear layer (Dettmers et al. 2023, arXiv:2305.14314, section 4: needed to match full fine-tuning).",
    )
    return tuple(resolved)
