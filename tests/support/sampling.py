"""A sampler without an engine: the model that trains continues the prompts itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graft.data.prepare import Example
from graft.training.batching import pack
from graft.training.packing import token_logits
from graft.training.rollouts import Completion, Policy


@dataclass
class LocalSampler:
    """Samples from `model` as it is; keeps what it was told to load and unload."""

    model: Any
    tokenizer: Any
    completions: int
    max_tokens: int
    loaded: list[Policy] = field(default_factory=list)
    unloaded: list[Policy] = field(default_factory=list)
    asked: list[Policy | None] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    closed: bool = False

    def load(self, policy: Policy) -> None:
        self.loaded.append(policy)

    def unload(self, policy: Policy) -> None:
        self.unloaded.append(policy)

    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], policy: Policy | None
    ) -> list[list[Completion]]:
        self.asked.append(policy)
        self.seeds += seeds
        return [self._group(list(prompt), seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    def close(self) -> None:
        self.closed = True

    def _group(self, prompt: list[int], seed: int) -> list[Completion]:
        generator = torch.Generator().manual_seed(seed % 2**31)
        answers: list[list[int]] = [[] for _ in range(self.completions)]
        scores: list[list[float]] = [[] for _ in range(self.completions)]
        end = self.tokenizer.eos_token_id
        for _ in range(self.max_tokens):
            going = [index for index, answer in enumerate(answers) if end not in answer]
            if not going:
                break
            rows = [Example([*prompt, *answers[i], 0], [0] * (len(prompt) + len(answers[i])) + [1]) for i in going]
            with torch.no_grad():
                log_probs = torch.log_softmax(token_logits(self.model, pack(rows)), dim=-1)
            for index, token in zip(
                going, torch.multinomial(log_probs.exp(), 1, generator=generator)[:, 0], strict=True
            ):
                answers[index].append(int(token))
                scores[index].append(float(log_probs[going.index(index), token]))
        return [
            Completion(
                tuple(answer), tuple(score), self.tokenizer.decode(answer, skip_special_tokens=True), end not in answer
            )
            for answer, score in zip(answers, scores, strict=True)
        ]
