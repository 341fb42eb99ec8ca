"""What the training loop asks of a method. Does not know optimizers, schedules or Ray.

How to add one: a class with these methods in a module of its own, and a branch in `graft.training.worker`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

Reduce = Callable[[torch.Tensor], None]
"""Sums a tensor over all workers, in place."""
PartT = TypeVar("PartT")
ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Group:
    """The workers that train together, and which of them this is."""

    rank: int = 0
    world_size: int = 1
    reduce: Reduce = lambda _: None


ALONE = Group()


@dataclass(frozen=True)
class Batch(Generic[ItemT]):
    """What one optimizer step learns from."""

    items: Sequence[ItemT]
    """This worker's share."""
    scale: float
    """What sums over all workers' items are divided by; the same on each."""
    tokens: int
    """Tokens of all workers' items that pass through the model."""
    metrics: dict[str, float]
    """What is known before the step: of all workers' items, the same on each."""


class Objective(Protocol[ItemT, PartT]):
    """A method. Its loss is a sum over items, so that neither microbatches nor workers change it."""

    metric_names: tuple[str, ...]
    """Of the sums that `loss` returns, as they are reported."""

    @property
    def count(self) -> int:
        """Indices in an epoch."""
        ...

    def gather(self, step: int, indices: Sequence[int], group: Group) -> Batch[ItemT]:
        """The batch of a step, counted from 1. Every worker calls it with the same indices."""
        ...

    def parts(self, items: Sequence[ItemT]) -> Iterator[PartT]:
        """The items in pieces that the model takes in one forward pass."""
        ...

    def loss(self, model: Any, part: PartT) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of a part's losses, a scalar with gradient, and sums of its metrics, shape (M,), without."""
        ...


def measure(
    model: Any, objective: Objective[ItemT, PartT], batch: Batch[ItemT], group: Group = ALONE
) -> dict[str, float]:
    """`loss` and the method's metrics over a batch, without gradients. Every worker gets the answer."""
    was_training = model.training
    model.eval()
    totals = torch.zeros(1 + len(objective.metric_names), dtype=torch.float64)
    with torch.no_grad():
        for part in objective.parts(batch.items):
            loss, sums = objective.loss(model, part)
            totals += torch.cat([loss.reshape(1), sums.to(loss.device)]).cpu().double()
    model.train(was_training)
    group.reduce(totals)
    names = ("loss", *objective.metric_names)
    return {name: float(total) / batch.scale for name, total in zip(names, totals, strict=True)}
