"""What the training loop asks of a method. Does not know optimizers, schedules or Ray.

How to add one: a class with these methods in a module of its own, and a branch in `graft.training.worker`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
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
    sharded: bool = False
    """Whether the base's weights are spread over them, so that each pass through the model takes them all."""

    @property
    def closing(self) -> "Group":
        """Who passes through the model when training has ended: all, where it is spread over them, else rank 0."""
        return self if self.sharded else ALONE


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


def in_step(parts: Iterable[PartT], spare: Callable[[], PartT], group: Group) -> Iterator[tuple[PartT, bool]]:
    """The parts, each with True. In a sharded group every worker is given as many as the one that has the most: after
    its own come spare ones with False, whose results are to be dropped."""
    if not group.sharded:
        yield from ((part, True) for part in parts)
        return
    mine = list(parts)
    counts = torch.zeros(group.world_size)
    counts[group.rank] = len(mine)
    group.reduce(counts)
    yield from ((part, True) for part in mine)
    for _ in range(int(counts.max()) - len(mine)):
        yield spare(), False


def spare_part(objective: Objective[ItemT, PartT], step: int, index: int) -> PartT:
    """A short part for `in_step`: of one index, whichever worker has it."""
    return next(objective.parts(objective.gather(step, [index], ALONE).items))


def measure(
    model: Any, objective: Objective[ItemT, PartT], batch: Batch[ItemT], group: Group = ALONE
) -> dict[str, float]:
    """`loss` and the method's metrics over a batch, without gradients. Every worker gets the answer."""
    was_training = model.training
    model.eval()
    totals = torch.zeros(1 + len(objective.metric_names), dtype=torch.float64)
    with torch.no_grad():
        for part, counts in in_step(objective.parts(batch.items), lambda: spare_part(objective, 1, 0), group):
            loss, sums = objective.loss(model, part)
            if counts:
                totals += torch.cat([loss.reshape(1), sums.to(loss.device)]).cpu().double()
    model.train(was_training)
    group.reduce(totals)
    names = ("loss", *objective.metric_names)
    return {name: float(total) / batch.scale for name, total in zip(names, totals, strict=True)}
