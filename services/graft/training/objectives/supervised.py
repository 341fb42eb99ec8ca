"""Next-token loss on the tokens that a mask chooses: self-supervised, supervised and instruction tuning.

The three differ in what the mask covers and where it is from (`graft.data.prepare`), not in their loss.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from graft.data.prepare import Example
from graft.training.batching import Packed, completion_tokens, microbatches, share
from graft.training.objectives.objective import ALONE, Batch, Group, measure
from graft.training.packing import token_losses


class Supervised:
    """Mean cross-entropy over a batch's tokens with loss, in nats."""

    metric_names: tuple[str, ...] = ()

    def __init__(self, examples: Sequence[Example], device: torch.device | str = "cpu") -> None:
        self._examples = examples
        self._device = torch.device(device)

    @property
    def count(self) -> int:
        """Examples in an epoch."""
        return len(self._examples)

    def gather(self, step: int, indices: Sequence[int], group: Group) -> Batch[Example]:
        """The examples of these indices, shared among the workers by their tokens."""
        del step
        return self.batch([self._examples[index] for index in indices], group)

    def batch(self, examples: Sequence[Example], group: Group = ALONE) -> Batch[Example]:
        """These examples as one batch."""
        return Batch(
            share(examples, group.rank, group.world_size),
            # A batch may have nothing to learn (turns of weight 0): a step of gradient zero, not a division by it.
            max(1, sum(completion_tokens(example) for example in examples)),
            sum(len(example.token_ids) for example in examples),
            {},
        )

    def parts(self, items: Sequence[Example]) -> Iterator[Packed]:
        """Packed rows."""
        for packed in microbatches(items):
            yield packed.to(self._device)

    def loss(self, model: Any, part: Packed) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed over the tokens with loss."""
        return token_losses(model, part).sum(), torch.zeros(0)


def mean_loss(model: Any, examples: Sequence[Example], group: Group = ALONE) -> float:
    """Mean over all tokens with loss, nats, without gradients. Every worker takes a share; all get the answer."""
    objective = Supervised(examples, next(model.parameters()).device)
    return measure(model, objective, objective.batch(examples, group), group)["loss"]
