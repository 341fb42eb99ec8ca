"""Which examples make up each step, which worker takes which, and how they are laid out for the model.

Examples are packed: one row of tokens without padding, kept apart by `graft.training.packing`. All of it follows from
the seed and the data alone, so any number of workers makes the same steps. Does not know the model.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from graft.data.prepare import Example
from graft.domain.memory import MICROBATCH_TOKENS


@dataclass(frozen=True)
class Packed:
    """Examples in one row. N tokens, K of them predicted with loss."""

    token_ids_N: torch.Tensor
    positions_N: torch.Tensor
    """Counted from 0 in each example."""
    lengths: tuple[int, ...]
    """Tokens of each example, ascending; their sum is N."""
    predicting_K: torch.Tensor
    """Index of the token before each token with loss: where it is predicted."""
    targets_K: torch.Tensor

    def to(self, device: torch.device) -> "Packed":
        """The same on another device."""
        return Packed(
            self.token_ids_N.to(device),
            self.positions_N.to(device),
            self.lengths,
            self.predicting_K.to(device),
            self.targets_K.to(device),
        )


def completion_tokens(example: Example) -> int:
    """Tokens with loss. The first token of an example is predicted from nothing, so it never has any."""
    return sum(example.loss_mask[1:])


def batches(count: int, batch_size: int, total_steps: int, seed: int) -> Iterator[list[int]]:
    """Indices of each step's examples: a fresh seeded shuffle an epoch; an epoch's last batch may be smaller."""
    step = 0
    epoch = 0
    while step < total_steps:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count, batch_size):
            if step == total_steps:
                return
            yield order[start : start + batch_size]
            step += 1
        epoch += 1


def share(batch: Sequence[Example], rank: int, world_size: int) -> list[Example]:
    """This worker's part of a batch."""
    return [batch[index] for index in shared([len(example.token_ids) for example in batch], rank, world_size)]


def shared(tokens: Sequence[int], rank: int, world_size: int) -> list[int]:
    """Which of a batch's items, given the tokens of each, are this worker's.

    Longest first to whoever has the fewest tokens, so that nobody waits long for another.
    """
    loads = [(0, worker) for worker in range(world_size)]
    mine = []
    for index in sorted(range(len(tokens)), key=tokens.__getitem__, reverse=True):
        load, worker = heapq.heappop(loads)
        heapq.heappush(loads, (load + tokens[index], worker))
        if worker == rank:
            mine.append(index)
    return mine


def microbatches(examples: Sequence[Example], most_tokens: int = MICROBATCH_TOKENS) -> Iterator[Packed]:
    """All examples, packed by ascending length, each row within `most_tokens` or of one example."""
    for indices in rows([len(example.token_ids) for example in examples], most_tokens):
        yield pack([examples[index] for index in indices])


def rows(tokens: Sequence[int], most_tokens: int = MICROBATCH_TOKENS) -> Iterator[list[int]]:
    """Which items, given the tokens of each, make up each row: ascending, within `most_tokens` or one alone."""
    current: list[int] = []
    total = 0
    for index in sorted(range(len(tokens)), key=tokens.__getitem__):
        if current and total + tokens[index] > most_tokens:
            yield current
            current, total = [], 0
        current.append(index)
        total += tokens[index]
    if current:
        yield current


def pack(examples: Sequence[Example]) -> Packed:
    """One row of examples that come in ascending length."""
    token_ids: list[int] = []
    positions: list[int] = []
    predicting: list[int] = []
    targets: list[int] = []
    for example in examples:
        start = len(token_ids)
        token_ids += example.token_ids
        positions += range(len(example.token_ids))
        for position, learned in enumerate(example.loss_mask):
            if learned and position > 0:
                predicting.append(start + position - 1)
                targets.append(example.token_ids[position])
    return Packed(
        torch.tensor(token_ids),
        torch.tensor(positions),
        tuple(len(example.token_ids) for example in examples),
        torch.tensor(predicting, dtype=torch.long),
        torch.tensor(targets, dtype=torch.long),
    )
