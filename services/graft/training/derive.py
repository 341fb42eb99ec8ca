"""Derives every hyperparameter that a job left open, from its data and base model, with the reason of each. Pure.

Does not read data: `graft.data.prepare` has measured it, and refused what cannot be trained on.
"""

import math
from collections.abc import Callable
from typing import Any

from graft.data.prepare import DataStats
from graft.domain.jobs import (
    DEFAULT_BLOCKS,
    DEFAULT_COMPLETION_TOKENS,
    DEFAULT_RANK,
    JobSpec,
    Method,
    Resolved,
    ServedAs,
    Sharding,
    Tuning,
)
from graft.domain.resources import BaseModel
from graft.training.sweep import settle_sweep

REFERENCE_PARAMETERS = 135e6
REFERENCE_LEARNING_RATE = 5e-4
"""Measured: 400 movie reviews, SmolLM2-135M, LoRA r=8 on all linear layers: held-out accuracy 0.66 to 0.83."""
GENTLE = 0.1
"""Of the rate of supervised LoRA: for every parameter at once, a tenth is the usual ratio (Schulman et al. 2025, "LoRA
Without Regret"); and for losses against a reference, whose gradients pull away from it in every step."""
DEFAULT_BETA = 0.1
"""Rafailov et al. 2023 (arXiv:2305.18290), section 6."""
DEFAULT_GROUP_SIZE = 8
"""Enough answers that a reward of one in eight tells; Shao et al. use 64, which a CPU does not sample."""
PROMPTS_A_STEP = 4
"""Times the group size: 32 answers a step."""
LEAST_STEPS = 100
"""Fewer optimizer steps than this leave LoRA's B, which starts at zero, close to where it began."""
MOST_EPOCHS = 5
"""More passes over few rows memorise them."""
LARGE_DATA_EXAMPLES = 5000
"""From here on a batch of 32 still gives more than 150 steps an epoch, and its gradient is less noisy."""


Settle = Callable[[str, Any, Any, str], Any]
"""Takes a name, what was given or None, what is derived otherwise, and why. Returns the value as used."""


def derive(spec: JobSpec, base: BaseModel, stats: DataStats) -> tuple[Resolved, ...]:
    """Every hyperparameter as it will be used: given ones as they are, the others derived.

    `max_steps` is the total number of steps. Where `epochs` and `max_steps` are both given, `max_steps` rules.
    """
    asked = spec.hyperparameters
    resolved: list[Resolved] = []

    def settle(name: str, given: Any, value: Any, reason: str) -> Any:
        if given is not None:
            resolved.append(Resolved(name, given, False, "Given by the job."))
            return given
        resolved.append(Resolved(name, value, True, reason))
        return value

    rows = stats.example_count
    sampled = spec.method is Method.REINFORCEMENT
    usual_batch = PROMPTS_A_STEP if sampled else 8 if rows < LARGE_DATA_EXAMPLES else 32
    batch_size = settle(
        "batch_size",
        asked.batch_size,
        min(rows, usual_batch),
        f"{PROMPTS_A_STEP} prompts, each with a group of answers."
        if sampled and rows >= usual_batch
        else f"{usual_batch} for {_count(rows, 'example')} (8 below {LARGE_DATA_EXAMPLES}, 32 from there on)."
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
    elif spec.method in (Method.PREFERENCE, Method.REINFORCEMENT, Method.SELF_SUPERVISED):
        epochs = settle("epochs", asked.epochs, 1.0, f"1: more passes over the same rows overfit {spec.method}.")
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
    gentle = spec.tuning is not Tuning.LORA or spec.method in (Method.PREFERENCE, Method.REINFORCEMENT)
    usual_rate = float(f"{REFERENCE_LEARNING_RATE * scale * (GENTLE if gentle else 1):.2g}")
    settle(
        "learning_rate",
        asked.learning_rate,
        usual_rate * multiplier,
        f"{REFERENCE_LEARNING_RATE:g} up to 135M parameters (measured), divided by the fourth root of how many times "
        f"larger the base is; this one has {base.parameter_count / 1e6:.0f}M."
        + (f" A tenth of it for {spec.method} with {spec.tuning} tuning." if gentle else "")
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
            f"{stats.over_length_count} of {_count(stats.row_count, 'row')} are longer than the context"
            + (" and cut into pieces: it does not apply." if spec.method is Method.SELF_SUPERVISED else "."),
        )
    )
    settle(
        "sharding",
        None if asked.sharding is Sharding.AUTO else asked.sharding.value,
        Sharding.AUTO.value,
        "auto: a base of which a GPU does not hold a copy is spread over the workers, if there are 2 or more.",
    )
    settle("validation_fraction", asked.validation_fraction, 0.0, "0: no training row is held out.")
    settle("early_stopping_patience", asked.early_stopping_patience, 0, "0: every step is done.")
    settle("eval_steps", asked.eval_steps, 0, "0: the held-out loss is measured after each epoch and the last step.")
    _settle_method(spec, settle)
    if spec.tuning is Tuning.LORA:
        _settle_lora(spec, base, epochs, settle)
    if spec.tuning is Tuning.LAST_LAYERS:
        settle("last_layers.blocks", spec.last_layers.blocks or None, DEFAULT_BLOCKS, f"The last {DEFAULT_BLOCKS}.")
    if spec.served_as is ServedAs.LOW_RANK_DELTA:
        settle("delta_rank", spec.delta_rank or None, base.max_lora_rank, "The highest that the engine loads.")
    return tuple(resolved) if spec.sweep is None else settle_sweep(spec.sweep, resolved)


def _settle_method(spec: JobSpec, settle: Settle) -> None:
    if spec.method is Method.PREFERENCE:
        settle("preference.beta", spec.preference.beta or None, DEFAULT_BETA, f"{DEFAULT_BETA} (Rafailov et al. 2023).")
    if spec.method is Method.REINFORCEMENT:
        asked = spec.reinforcement
        settle(
            "reinforcement.group_size",
            asked.group_size or None,
            DEFAULT_GROUP_SIZE,
            f"{DEFAULT_GROUP_SIZE}: one success in {DEFAULT_GROUP_SIZE} answers is told from none.",
        )
        most = DEFAULT_COMPLETION_TOKENS
        settle(
            "reinforcement.max_completion_tokens",
            asked.max_completion_tokens or None,
            most,
            f"{most}, for short answers.",
        )
        settle("reinforcement.temperature", asked.temperature or None, 1.0, "1: samples what the policy is.")
        settle("reinforcement.epsilon", asked.epsilon or None, 0.2, "0.2 (Schulman et al. 2017, arXiv:1707.06347).")


def _settle_lora(spec: JobSpec, base: BaseModel, epochs: float, settle: Settle) -> None:
    lora = spec.lora
    for name in ("use_rslora", "use_dora", "modules_to_save", "base_quantization"):
        if value := getattr(lora, name):
            settle(f"lora.{name}", list(value) if isinstance(value, tuple) else value, None, "")
    rank = settle("lora.rank", lora.rank or None, DEFAULT_RANK, "8 (Hu et al. 2021, arXiv:2106.09685, table 6).")
    settle("lora.alpha", lora.alpha or None, 2.0 * rank, f"Twice the rank of {rank}: the update is scaled by 2.")
    settle("lora.dropout", lora.dropout or None, 0.0, f"0: {epochs:g} epochs hardly overfit a low rank.")
    settle(
        "lora.target_modules",
        list(lora.target_modules) or None,
        list(base.target_modules),
        "Every linear layer (Dettmers et al. 2023, arXiv:2305.14314, section 4: needed to match full fine-tuning).",
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
