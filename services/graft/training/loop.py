"""The training loop, for every method: examples with a loss mask in, gradient steps on the trainable parameters out.

Owns optimizer, schedule and progress. Does not know Ray, files or devices: sums over workers go through `reduce`,
which `graft.training.worker` gives it (docs/adr/0001).
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graft.data.prepare import Example
from graft.domain.errors import FailedPrecondition
from graft.training.batching import batches, completion_tokens, microbatches, share
from graft.training.packing import token_losses

Reduce = Callable[[torch.Tensor], None]
"""Sums a tensor over all workers, in place."""


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
class Group:
    """The workers that train together, and which of them this is."""

    rank: int = 0
    world_size: int = 1
    reduce: Reduce = lambda _: None


ALONE = Group()


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. `loss` is the mean over the batch's completion tokens, in nats."""

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


def mean_loss(model: Any, examples: Sequence[Example], group: Group = ALONE) -> float:
    """Mean over all tokens with loss, nats, without gradients. Every worker takes a share; all get the answer."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for packed in microbatches(share(examples, group.rank, group.world_size)):
            losses = token_losses(model, packed.to(device))
            total += torch.tensor([float(losses.sum(dtype=torch.float64)), losses.numel()], dtype=torch.float64)
    model.train(was_training)
    group.reduce(total)
    return float(total[0] / total[1].clamp(min=1))


def train(
    model: Any,
    examples: Sequence[Example],
    settings: LoopSettings,
    on_step: Callable[[StepReport], None],
    group: Group = ALONE,
) -> None:
    """Runs every step, calling `on_step` after each on every worker.

    The loss of a step is the sum over its completion tokens divided by their number in the whole batch, so neither
    microbatches nor workers change it: their summed gradients are one big batch's. (With LoRA dropout each worker
    draws its own, and curves agree only in the mean.) Raises FailedPrecondition LOSS_NOT_FINITE.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, settings))
    device = parameters[0].device
    steps_per_epoch = math.ceil(len(examples) / settings.batch_size)
    trained_tokens = 0
    busy_seconds = 0.0
    started = time.monotonic()
    model.train()
    order = batches(len(examples), settings.batch_size, settings.total_steps, settings.seed)
    for step, indices in enumerate(order, start=1):
        step_started = time.monotonic()
        batch = [examples[index] for index in indices]
        # A batch may have nothing to learn (turns of weight 0): a step of gradient zero, not a division by it.
        learned = max(1, sum(completion_tokens(example) for example in batch))
        loss = torch.zeros(1)
        for packed in microbatches(share(batch, group.rank, group.world_size)):
            part = token_losses(model, packed.to(device)).sum() / learned
            part.backward()
            loss += part.detach().cpu()
        _sum_gradients(parameters, loss, group)
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        _check_finite(step, float(loss), float(norm), settings)
        learning_rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        trained_tokens += sum(len(example.token_ids) for example in batch)
        now = time.monotonic()
        busy_seconds += now - step_started
        on_step(
            StepReport(
                step=step,
                total_steps=settings.total_steps,
                epoch=step / steps_per_epoch,
                loss=float(loss),
                grad_norm=float(norm),
                learning_rate=learning_rate,
                tokens_per_second=trained_tokens / busy_seconds,
                trained_tokens=trained_tokens,
                remaining_seconds=(now - started) / step * (settings.total_steps - step),
            )
        )


def rate(step: int, settings: LoopSettings) -> float:
    """Factor of the peak learning rate in the step that follows `step` others: linear warm-up, then a line to zero."""
    warmup_steps = math.ceil(settings.warmup_ratio * settings.total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(0.0, (settings.total_steps - step) / max(1, settings.total_steps - warmup_steps))


def _sum_gradients(parameters: Sequence[torch.nn.Parameter], loss: torch.Tensor, group: Group) -> None:
    """Makes every worker's gradients and loss the sum of all, with one message a step."""
    for parameter in parameters:
        if parameter.grad is None:  # a worker without a share of a small batch
            parameter.grad = torch.zeros_like(parameter)
    if group.world_size == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([loss, *(gradient.flatten().float().cpu() for gradient in gradients)])
    group.reduce(flat)
    loss.copy_(flat[:1])
    offset = 1
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
