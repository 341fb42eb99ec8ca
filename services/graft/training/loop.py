"""The training loop, for every method: examples with a loss mask in, gradient steps on the trainable parameters out.

Owns batching, loss, optimizer and schedule. Does not know Ray: gradients are summed through `reduce`, which
`graft.training.worker` gives it. The LM head is applied only where there is loss, which on a small base model saves
most of the work of a prompt's positions.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from graft.data.prepare import Example

MICROBATCH_TOKENS = 2048
"""Padded tokens in one forward pass: bounds memory (some 1 GB at 135M parameters), and speed has levelled off."""

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
class StepReport:
    """One optimizer step. `loss` is the mean over the batch's completion tokens, in nats."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    tokens_per_second: float
    trained_tokens: int
    remaining_seconds: float


def batches(count: int, settings: LoopSettings) -> Iterator[list[int]]:
    """Indices of each step's examples: a fresh seeded shuffle an epoch, the same for any number of workers."""
    step = 0
    epoch = 0
    while step < settings.total_steps:
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count, settings.batch_size):
            if step == settings.total_steps:
                return
            yield order[start : start + settings.batch_size]
            step += 1
        epoch += 1


def microbatches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Examples of like length together, so that little is padded, each within MICROBATCH_TOKENS or alone."""
    current: list[Example] = []
    for example in sorted(examples, key=lambda item: len(item.token_ids)):
        if current and (len(current) + 1) * len(example.token_ids) > MICROBATCH_TOKENS:
            yield current
            current = []
        current.append(example)
    if current:
        yield current


def token_losses(model: Any, examples: Sequence[Example]) -> torch.Tensor:
    """Cross-entropy of every token with loss, nats, shape (N,), row by row. `model`: a llama, bare or with LoRA."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    longest = max(len(example.token_ids) for example in examples)
    tokens_B_T = torch.zeros(len(examples), longest, dtype=torch.long)
    attention_B_T = torch.zeros_like(tokens_B_T)
    loss_B_T = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, example in enumerate(examples):
        length = len(example.token_ids)
        tokens_B_T[row, :length] = torch.tensor(example.token_ids)
        attention_B_T[row, :length] = 1
        loss_B_T[row, :length] = torch.tensor(example.loss_mask)
    device = next(model.parameters()).device
    tokens_B_T, attention_B_T, loss_B_T = (t.to(device) for t in (tokens_B_T, attention_B_T, loss_B_T))
    hidden_B_T_D = causal.model(input_ids=tokens_B_T, attention_mask=attention_B_T, use_cache=False).last_hidden_state
    predicted = loss_B_T[:, 1:]
    logits_N_V = causal.lm_head(hidden_B_T_D[:, :-1][predicted])
    return cross_entropy(logits_N_V.float(), tokens_B_T[:, 1:][predicted], reduction="none")


def mean_loss(model: Any, examples: Sequence[Example]) -> float:
    """Mean over all tokens with loss, nats, without gradients."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for group in microbatches(examples):
            losses = token_losses(model, group)
            total, count = total + float(losses.sum()), count + losses.numel()
    model.train(was_training)
    return total / max(count, 1)


def train(
    model: Any,
    examples: Sequence[Example],
    settings: LoopSettings,
    on_step: Callable[[StepReport], None],
    *,
    rank: int = 0,
    world_size: int = 1,
    reduce: Reduce = lambda _: None,
) -> None:
    """Runs every step. Each worker takes its share of each batch; the sum of their gradients is one big batch's.

    The loss of a step is the sum over its completion tokens divided by their number in the whole batch, so neither
    microbatches nor workers change it.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings))
    steps_per_epoch = math.ceil(len(examples) / settings.batch_size)
    trained_tokens = 0
    started = time.monotonic()
    model.train()
    for step, indices in enumerate(batches(len(examples), settings), start=1):
        batch = [examples[index] for index in indices]
        completion_tokens = sum(sum(example.loss_mask[1:]) for example in batch)
        loss = torch.zeros(1)
        for group in microbatches(batch[rank::world_size]):
            part = token_losses(model, group).sum() / completion_tokens
            part.backward()
            loss += part.detach().cpu()
        for parameter in parameters:
            if parameter.grad is None:  # a worker without a share of a small last batch
                parameter.grad = torch.zeros_like(parameter)
        if world_size > 1:
            flat = torch.cat([loss, *(parameter.grad.flatten().cpu() for parameter in parameters)])
            reduce(flat)
            loss, offset = flat[:1], 1
            for parameter in parameters:
                size = parameter.numel()
                parameter.grad.copy_(flat[offset : offset + size].view_as(parameter))
                offset += size
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        learning_rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        trained_tokens += sum(len(example.token_ids) for example in batch)
        elapsed = time.monotonic() - started
        on_step(
            StepReport(
                step=step,
                total_steps=settings.total_steps,
                epoch=step / steps_per_epoch,
                loss=float(loss),
                grad_norm=float(norm),
                learning_rate=learning_rate,
                tokens_per_second=trained_tokens / elapsed,
                trained_tokens=trained_tokens,
                remaining_seconds=elapsed / step * (settings.total_steps - step),
            )
        )


def _rate(step: int, settings: LoopSettings) -> float:
    """Linear warm-up, then a line down to zero; a factor of the peak."""
    warmup_steps = max(1, round(settings.warmup_ratio * settings.total_steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(0.0, (settings.total_steps - step) / max(1, settings.total_steps - warmup_steps))
