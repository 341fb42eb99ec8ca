"""Group-relative policy optimisation: of several answers to a prompt, the better ones gain and the worse ones lose.

Shao et al. 2024 (arXiv:2402.03300), equations 3 and 4, with outcome supervision. For answer i of a group of G with the
rewards r, and its token t,

    A_i  = (r_i - mean(r)) / (std(r) + 1e-4)
    loss = -w min(ρ A_i, clip(ρ, 1 - ε, 1 + ε) A_i) + β ρ KL,  ρ = π / π_old,  KL = π_ref / π - log(π_ref / π) - 1

Means are over all tokens of a step's answers, so that a token counts alike in long answers and in short ones (Yu et al.
2025, arXiv:2503.14476, section 3.3; Shao et al. first take the mean of each answer). Each step makes one update of what
it sampled: π_old is π and ρ is 1 but for its gradient, which makes that of ρ KL the divergence's own, without bias
(DeepSeek-AI 2025, arXiv:2512.02556). The inference service samples, and its π_old is not quite that of the trainer:
w = min(π_old / π_sampler, 2) corrects for it (truncated importance sampling, Yao et al. 2025, "Your Efficient RL
Framework Secretly Brings You Off-Policy RL Training"). Answers that were cut at the limit of tokens count as they are.

These are the choices of TRL 1.16 (`loss_type="dapo"`, `scale_rewards="group"`, `mask_truncated_completions=False`) but
for w: TRL's own default drops every answer whose whole w is above 3, and `token_truncate` at 2 is what is done here.
Does not know the engine (`graft.training.rollouts`).
"""

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from graft.data.graded import PromptExample
from graft.data.rendering import Example, compact
from graft.domain.jobs import Reinforcement
from graft.grading.items import GradeItem, Grader
from graft.training.batching import Packed, pack, rows, shared
from graft.training.objectives.objective import Batch, Group
from graft.training.packing import token_logits
from graft.training.policies import Policies
from graft.training.rollouts import Completion, Patience, Sampler
from graft.training.tuning import reference

MOST_WEIGHT = 2.0
"""Yao et al. 2025: rarer tokens than half of what the trainer thinks would swing the step."""
LEAST_DEVIATION = 1e-4
"""Added to the deviation of a group's rewards."""

Reference = Callable[[Any], AbstractContextManager[None]]
"""While it is entered, the model computes what training began from."""


@dataclass(frozen=True)
class Rollout:
    """A sampled answer with its prompt. T tokens of the answer."""

    example: Example
    """Loss on the answer."""
    sampler_T: torch.Tensor
    """Log-probabilities that the sampler gave, in nats, at temperature 1."""
    advantage: float
    share: float
    """Scale of the batch in tokens that are learned from: metrics are means over those."""


@dataclass(frozen=True)
class PackedRollouts:
    """Rollouts in one row. K tokens with loss."""

    packed: Packed
    sampler_K: torch.Tensor
    advantages_K: torch.Tensor
    share: float


class Reinforced:
    """Mean loss over the tokens of a batch's answers. Near zero by its nature: the reward tells what was learned."""

    def __init__(
        self,
        prompts: Sequence[PromptExample],
        asked: Reinforcement,
        seed: int,
        sampler: Sampler,
        policies: Policies,
        grader: Grader,
        patience: Patience,
        device: torch.device | str = "cpu",
        reference: Reference = reference,
    ) -> None:
        """`asked`: every value concrete."""
        self._prompts = prompts
        self._asked = asked
        self._seed = seed
        self._sampler = sampler
        self._policies = policies
        self._grader = grader
        self._patience = patience
        self._device = torch.device(device)
        self._reference = reference
        self.metric_names: tuple[str, ...] = ("sampler_ratio", "sampler_truncated", "clip_ratio", "kl")
        self.latest: list[Example] = []
        """Answers of the last step, of this worker."""

    @property
    def count(self) -> int:
        """Prompts in an epoch."""
        return len(self._prompts)

    def gather(self, step: int, indices: Sequence[int], group: Group) -> Batch[Rollout]:
        """Samples answers to the prompts of these indices from the policy as it is, and grades them.

        The prompts are shared among the workers. Without a KL term, answers of groups that all earned alike are left
        out: their gradient is zero. Raises what sampling or grading fails with.
        """
        policy = self._policies.publish(step - 1, group)
        lengths = [len(self._prompts[index].token_ids) for index in indices]
        mine = [indices[place] for place in shared(lengths, group.rank, group.world_size)]
        started = time.monotonic()
        sampled = self._sampler.sample(
            [self._prompts[index].token_ids for index in mine], [self._prompt_seed(step, i) for i in mine], policy
        )
        (tokens,) = _summed([sum(len(answer.token_ids) for answers in sampled for answer in answers)], group)
        seconds = time.monotonic() - started  # until the last worker had its answers
        graded = self._grade([self._prompts[index] for index in mine], sampled)
        learned = [item for item in graded if self._asked.beta or not item.alike]
        self.latest = [example for item in graded for example, _, _ in item.learnable()] or self.latest
        prompts, answers, cut, reward, deviation, alike, learned_tokens, passed_tokens = _summed(
            [
                len(graded),
                sum(len(item.answers) for item in graded),
                sum(answer.cut for item in graded for answer in item.answers),
                sum(float(item.rewards_G.sum()) for item in graded),
                sum(float(item.rewards_G.std()) for item in graded),
                sum(item.alike for item in graded),
                sum(len(answer.token_ids) for item in learned for answer in item.answers),
                sum(len(example.token_ids) for item in learned for example, _, _ in item.learnable()),
            ],
            group,
        )
        scale = max(1.0, tokens)
        items = [
            Rollout(example, torch.tensor(answer.log_probs_T), advantage, scale / learned_tokens)
            for item in learned
            for example, answer, advantage in item.learnable()
        ]
        return Batch(
            items,
            scale,
            int(passed_tokens),
            {
                "reward": reward / answers,
                "reward_std": deviation / prompts,
                "frac_zero_std": alike / prompts,
                "completion_length": tokens / answers,
                "frac_cut": cut / answers,
                "rollout_seconds": seconds,
                "rollout_tokens_per_second": tokens / seconds,
            },
        )

    def parts(self, items: Sequence[Rollout]) -> Iterator[PackedRollouts]:
        """Packed rows."""
        for row in rows([len(item.example.token_ids) for item in items]):
            yield pack_rollouts([items[place] for place in row], self._device)

    def loss(self, model: Any, part: PackedRollouts) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed over the tokens of the answers. The divergence is measured also where it has no part in the loss: it
        tells how far the policy went for its reward, for one more forward pass."""
        asked = self._asked
        with torch.no_grad(), self._reference(model):
            reference_K = _log_probs(token_logits(model, part.packed) / asked.temperature, part.packed)
        logits_K_V = token_logits(model, part.packed)
        log_probs_K = _log_probs(logits_K_V / asked.temperature, part.packed)
        with torch.no_grad():
            # Both sides at temperature 1, where alone the sampler's are known. How a small difference of logits shows
            # at another temperature is its share of it, to first order.
            at_one_K = log_probs_K if asked.temperature == 1 else _log_probs(logits_K_V, part.packed)
            weights_K = ((at_one_K - part.sampler_K) / asked.temperature).exp()
            truncated_K = weights_K > MOST_WEIGHT
        ratios_K = (log_probs_K - log_probs_K.detach()).exp()
        losses_K, clipped_K = policy_losses(ratios_K, part.advantages_K, asked.epsilon)
        losses_K = losses_K * weights_K.clamp(max=MOST_WEIGHT)
        kl_K = ratios_K * kl_estimates(log_probs_K, reference_K)
        if asked.beta:
            losses_K = losses_K + asked.beta * kl_K
        sums = [weights_K.sum(), truncated_K.sum(), clipped_K.sum(), kl_K.sum()]
        return losses_K.sum(), torch.stack([item.detach().float() for item in sums]) * part.share

    def close(self) -> None:
        """Leaves nothing in the engine."""
        self._policies.close()
        self._sampler.close()

    def _prompt_seed(self, step: int, index: int) -> int:
        """The same for whichever worker samples it."""
        return int.from_bytes(hashlib.sha256(f"{self._seed}/{step}/{index}".encode()).digest()[:6])

    def _grade(self, prompts: Sequence[PromptExample], sampled: Sequence[Sequence[Completion]]) -> "list[_Graded]":
        pairs = list(zip(prompts, sampled, strict=True))
        items = [GradeItem(prompt.row, answer.text) for prompt, answers in pairs for answer in answers]
        ask = self._patience.ask("The grader", lambda: asyncio.to_thread(self._grader.grade, items))
        rewards = iter([grade.reward for grade in asyncio.run(ask)])
        return [_Graded(prompt, answers, torch.tensor([next(rewards) for _ in answers])) for prompt, answers in pairs]


@dataclass(frozen=True)
class _Graded:
    """A prompt with its G answers, and what each earned."""

    prompt: PromptExample
    answers: Sequence[Completion]
    rewards_G: torch.Tensor

    @property
    def alike(self) -> bool:
        """Whether all earned the same, so that none is better than another."""
        return bool((self.rewards_G == self.rewards_G[0]).all())

    def learnable(self) -> Iterator[tuple[Example, Completion, float]]:
        """The answers that have tokens, as sequences, each with its advantage."""
        prompt = list(self.prompt.token_ids)
        for answer, advantage in zip(self.answers, advantages(self.rewards_G).tolist(), strict=True):
            if answer.token_ids:
                mask = [0] * len(prompt) + [1] * len(answer.token_ids)
                yield compact([*prompt, *answer.token_ids], mask), answer, advantage


def advantages(rewards_G: torch.Tensor) -> torch.Tensor:
    """How much better than its group each answer is, in deviations (Bessel's), shape (G,); zero where all are alike."""
    if bool((rewards_G == rewards_G[0]).all()):
        return torch.zeros_like(rewards_G)
    return (rewards_G - rewards_G.mean()) / (rewards_G.std() + LEAST_DEVIATION)


def policy_losses(
    ratios_K: torch.Tensor, advantages_K: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped surrogate of each token, and whether clipping stopped it; both of shape (K,)."""
    losses_K = -torch.min(ratios_K * advantages_K, ratios_K.clamp(1 - epsilon, 1 + epsilon) * advantages_K)
    low_K = (ratios_K < 1 - epsilon) & (advantages_K < 0)
    high_K = (ratios_K > 1 + epsilon) & (advantages_K > 0)
    return losses_K, low_K | high_K


def kl_estimates(log_probs_K: torch.Tensor, reference_K: torch.Tensor) -> torch.Tensor:
    """Schulman's third estimator of the divergence from the reference, unbiased and never negative, shape (K,)."""
    difference_K = reference_K - log_probs_K
    return difference_K.exp() - difference_K - 1


def pack_rollouts(items: Sequence[Rollout], device: torch.device | str = "cpu") -> PackedRollouts:
    """One row of rollouts that come in ascending length."""
    repeated = [torch.full_like(item.sampler_T, item.advantage) for item in items]
    return PackedRollouts(
        pack([item.example for item in items]).to(torch.device(device)),
        torch.cat([item.sampler_T for item in items]).to(device),
        torch.cat(repeated).to(device),
        items[0].share,
    )


def _log_probs(logits_K_V: torch.Tensor, packed: Packed) -> torch.Tensor:
    return -cross_entropy(logits_K_V, packed.targets_K, reduction="none")


def _summed(values: Sequence[float], group: Group) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    group.reduce(tensor)
    return [float(value) for value in tensor]
