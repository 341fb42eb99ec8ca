"""The training loop, for every method: an objective in, gradient steps on the trainable parameters out.

Owns optimizer, schedule and progress. Knows neither what is learned from (`graft.training.objectives`) nor Ray, files
or devices: sums over workers go through `reduce`, which `graft.training.worker` gives it (docs/adr/0001).
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from graft.domain.errors import FailedPrecondition
from graft.training.batching import batches
from graft.training.objectives.objective import ALONE, Group, ItemT, Objective, PartT, in_step, spare_part
from graft.training.sharding import clip


@dataclass(frozen=True)
class LoopSettings:
    """Hyperparameters of the loop, all concrete."""

    total_steps: int
    batch_size: int
    learning_rate: float
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    seed: int


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. `loss` is the objective's: for supervised learning the mean over the batch's tokens with
    loss, in nats."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    tokens_per_second: float
    """Prompt and completion tokens of all workers, over all steps so far, without what `on_step` took."""
    trained_tokens: int
    """Prompt and completion, so far."""
    remaining_seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    """The objective's own, of this step's batch."""


class Stop(Exception):
    """Raised by `on_step`, on every worker at the same step, to end training early."""


def train(
    model: Any,
    objective: Objective[ItemT, PartT],
    settings: LoopSettings,
    on_step: Callable[[StepReport], None],
    group: Group = ALONE,
) -> None:
    """Runs every step, calling `on_step` after each on every worker.

    The loss of a step is the sum over its items divided by the batch's scale, so neither microbatches nor workers
    change it: their summed gradients are one big batch's. (With LoRA dropout each worker draws its own, and curves
    agree only in the mean.) Raises FailedPrecondition LOSS_NOT_FINITE.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, settings))
    steps_per_epoch = math.ceil(objective.count / settings.batch_size)
    trained_tokens = 0
    busy_seconds = 0.0
    started = time.monotonic()
    model.train()
    order = batches(objective.count, settings.batch_size, settings.total_steps, settings.seed)
    for step, indices in enumerate(order, start=1):
        step_started = time.monotonic()
        batch = objective.gather(step, indices, group)
        # The loss, then the metrics.
        sums = torch.zeros(1 + len(objective.metric_names))
        for part, counts in in_step(
            objective.parts(batch.items), partial(spare_part, objective, step, indices[0]), group
        ):
            loss, metrics = objective.loss(model, part)
            (loss / batch.scale if counts else loss * 0).backward()
            if counts:
                sums += torch.cat([loss.detach().float().cpu().reshape(1), metrics.float().cpu()]) / batch.scale
        _sum_gradients(parameters, sums, group)
        norm = clip(parameters, settings.max_grad_norm, group)
        _check_finite(step, float(sums[0]), norm, settings)
        learning_rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        trained_tokens += batch.tokens
        now = time.monotonic()
        busy_seconds += now - step_started
        report = StepReport(
            step=step,
            total_steps=settings.total_steps,
            epoch=step / steps_per_epoch,
            loss=float(sums[0]),
            grad_norm=norm,
            learning_rate=learning_rate,
            tokens_per_second=trained_tokens / busy_seconds,
            trained_tokens=trained_tokens,
            remaining_seconds=(now - started) / step * (settings.total_steps - step),
            metrics=batch.metrics | dict(zip(objective.metric_names, sums[1:].tolist(), strict=True)),
        )
        try:
            on_step(report)
        except Stop:
            return


def rate(step: int, settings: LoopSettings) -> float:
    """Factor of the peak learning rate in the step that follows `step` others: linear warm-up, then a line to zero."""
    warmup_steps = math.ceil(settings.warmup_ratio * settings.total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(0.0, (settings.total_steps - step) / max(1, settings.total_steps - warmup_steps))


def _sum_gradients(parameters: Sequence[torch.nn.Parameter], sums: torch.Tensor, group: Group) -> None:
    """Makes every worker's gradients and `sums` the sum of all, with one message a step. The gradients of what is
    spread over the workers are that already (`graft.training.sharding`)."""
    for parameter in parameters:
        if parameter.grad is None:  # a worker without a share of a small batch
            parameter.grad = torch.zeros_like(parameter)
    if group.world_size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    flat = torch.cat([sums, *(gradient.flatten().float().cpu() for gradient in gradients)])
    group.reduce(flat)
    sums.copy_(flat[: len(sums)])
    offset = len(sums)
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()


def _check_finite(step: int, loss: float, norm: float, settings: LoopSettings) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    raise FailedPrecondition(
        f"Training diverged at step {step} of {settings.total_steps}: the loss is {loss}, the gradient's norm {norm}. "
        f"Use a learning rate below {settings.learning_rate:g}, or a smaller max_grad_norm.",
        reason="LOSS_NOT_FINITE",
    )
