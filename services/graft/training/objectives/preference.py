"""Direct preference optimisation: of two answers to a prompt, the chosen one is to gain on the rejected one.

Rafailov et al. 2023 (arXiv:2305.18290), equation 7, with x the prompt, y the answers and π_ref the model that training
began from:

    loss = -log sigmoid(margin),  margin = r(x, y_chosen) - r(x, y_rejected),  r(x, y) = β log (π(y|x) / π_ref(y|x))

What the reference says of a pair is two numbers, taken once, before the first step, from the model itself: so it needs
no second model, whatever is tuned and whatever training began from. Does not know files or schedules.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from graft.data.preference import PreferenceExample
from graft.training.batching import Packed, completion_tokens, pack, rows, shared
from graft.training.objectives.objective import ALONE, Batch, Group, in_step
from graft.training.packing import token_losses


@dataclass(frozen=True)
class Judged:
    """A pair, and what the reference says of it."""

    pair: PreferenceExample
    reference_2: torch.Tensor
    """Log-probabilities of the chosen and of the rejected answer, in nats."""


@dataclass(frozen=True)
class PackedPairs:
    """P pairs in one row, so that both answers of each are in one forward pass. K tokens with loss."""

    packed: Packed
    answers_K: torch.Tensor
    """Which answer each token with loss belongs to: 2p is pair p's chosen one, 2p + 1 its rejected one."""
    reference_P_2: torch.Tensor


class Preference:
    """Mean loss over a batch's pairs, in nats; it begins at log 2."""

    metric_names: tuple[str, ...] = ("accuracy", "margin", "chosen_reward", "rejected_reward")
    """The share of pairs whose chosen answer has the higher reward, and means of margin and rewards over pairs."""

    def __init__(
        self,
        pairs: Sequence[PreferenceExample],
        reference_N_2: torch.Tensor,
        beta: float,
        device: torch.device | str = "cpu",
    ) -> None:
        """`reference_N_2`: of `reference_log_probs`, for each of the N pairs that a step will learn from."""
        self._pairs = pairs
        self._reference_N_2 = reference_N_2
        self._beta = beta
        self._device = torch.device(device)

    @property
    def count(self) -> int:
        """Pairs in an epoch."""
        return len(self._pairs)

    def gather(self, step: int, indices: Sequence[int], group: Group) -> Batch[Judged]:
        """The pairs of these indices, shared among the workers by their tokens."""
        del step
        tokens = [self._pairs[index].tokens for index in indices]
        mine = [indices[place] for place in shared(tokens, group.rank, group.world_size)]
        items = [Judged(self._pairs[index], self._reference_N_2[index]) for index in mine]
        return Batch(items, len(indices), sum(tokens), {})

    def parts(self, items: Sequence[Judged]) -> Iterator[PackedPairs]:
        """Packed rows of whole pairs."""
        for row in rows([item.pair.tokens for item in items]):
            yield _pack([items[index] for index in row], self._device)

    def loss(self, model: Any, part: PackedPairs) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed over the pairs."""
        rewards_P_2 = self._beta * (_log_probs(model, part) - part.reference_P_2)
        chosen_P, rejected_P = rewards_P_2.unbind(1)
        margins_P = chosen_P - rejected_P
        sums = torch.stack([(margins_P > 0).sum(), margins_P.sum(), chosen_P.sum(), rejected_P.sum()])
        return -logsigmoid(margins_P).sum(), sums.detach()


def reference_log_probs(
    model: Any,
    pairs: Sequence[PreferenceExample],
    indices: Iterable[int],
    device: torch.device | str = "cpu",
    group: Group = ALONE,
    on_scored: Callable[[int, int], None] = lambda _done, _of: None,
) -> torch.Tensor:
    """Log-probabilities of both answers of the pairs of these indices under `model` as it is, in nats, shape (N, 2).

    Without dropout. Every worker scores a share of them and gets all. Pairs of other indices are NaN. `on_scored` is
    told after each row how many pairs of this worker's share are done, and of how many.
    """
    wanted = sorted(set(indices))
    mine = [wanted[place] for place in shared([pairs[i].tokens for i in wanted], group.rank, group.world_size)]
    answers_N_2 = torch.zeros(len(pairs), 2)
    was_training = model.training
    model.eval()
    done = 0
    parts = ([mine[place] for place in row] for row in rows([pairs[index].tokens for index in mine]))
    with torch.no_grad():
        for here, counts in in_step(parts, lambda: wanted[:1], group):
            part = _pack([Judged(pairs[index], torch.zeros(2)) for index in here], torch.device(device))
            scored_P_2 = _log_probs(model, part).cpu()
            if counts:
                answers_N_2[here] = scored_P_2
                done += len(here)
                on_scored(done, len(mine))
    model.train(was_training)
    group.reduce(answers_N_2)
    unknown_N = torch.ones(len(pairs), dtype=torch.bool)
    unknown_N[wanted] = False
    answers_N_2[unknown_N] = torch.nan
    return answers_N_2


def _pack(items: Sequence[Judged], device: torch.device) -> PackedPairs:
    examples = [example for item in items for example in (item.pair.chosen, item.pair.rejected)]
    # Attention takes sequences of one length together, so they lie in the row by length.
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].token_ids))
    learned = torch.tensor([completion_tokens(examples[index]) for index in order])
    return PackedPairs(
        pack([examples[index] for index in order]).to(device),
        torch.tensor(order).repeat_interleave(learned).to(device),
        torch.stack([item.reference_2 for item in items]).to(device),
    )


def _log_probs(model: Any, part: PackedPairs) -> torch.Tensor:
    """Of each answer, summed over its tokens, shape (P, 2)."""
    pairs = len(part.reference_P_2)
    sums = torch.zeros(2 * pairs, device=part.answers_K.device)
    return sums.index_add(0, part.answers_K, -token_losses(model, part.packed)).view(pairs, 2)
