"""Reinforcement against TRL's GRPOTrainer, the reference: same model, recorded answers and rewards.

TRL's own code turns the recorded answers into advantages, importance weights, reference and loss; only its sampling is
replaced.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.data.graded import PromptExample
from graft.domain.jobs import Reinforcement
from graft.grading.items import Grade, GradeItem
from graft.training.objectives.objective import ALONE, Group
from graft.training.objectives.reinforcement import MOST_WEIGHT, Reinforced
from graft.training.packing import PACKED
from graft.training.rollouts import Completion, Patience, Policy
from tests.support.tiny_llama import make_tiny_llama

pytestmark = [pytest.mark.integration, pytest.mark.timeout(200)]

GROUP = 4
MOST_TOKENS = 12
REWARDS = [[1.0, 0.0, 0.0, 0.5], [0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
"""The last group earns alike: it has no advantage, and its tokens count all the same."""


@dataclass
class Recorded:
    """Sampler, policies and grader at once: what was sampled once, and what it earned."""

    answers: dict[tuple[int, ...], list[Completion]]
    """By prompt."""

    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], policy: Policy | None
    ) -> list[list[Completion]]:
        del seeds, policy
        return [self.answers[tuple(prompt)] for prompt in prompts]

    def load(self, policy: Policy) -> None: ...
    def unload(self, policy: Policy) -> None: ...
    def close(self) -> None: ...

    def publish(self, updates: int, group: Group) -> None: ...

    def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        return [Grade(REWARDS[item.row["number"]][int(item.completion)], False, "") for item in items]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"), initializer_range=0.1)


@pytest.fixture
def theirs(folder: Path) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(3)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))


def _trainer(model: Any, folder: Path, output_dir: Path, beta: float, temperature: float) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    def reward(**_: Any) -> list[float]:
        return [value for rewards in REWARDS for value in rewards]

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(output_dir),
            per_device_train_batch_size=GROUP * len(REWARDS),
            num_generations=GROUP,
            max_completion_length=MOST_TOKENS,
            beta=beta,
            temperature=temperature,
            vllm_importance_sampling_mode="token_truncate",
            vllm_importance_sampling_clip_max=MOST_WEIGHT,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * len(REWARDS)),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    assert (trainer.loss_type, trainer.scale_rewards, trainer.mask_truncated_completions) == ("dapo", "group", False)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def _record(model: Any, rng: random.Random, *, differing: bool) -> tuple[list[PromptExample], list[list[Completion]]]:
    """Answers of many lengths, a few with their end token; with the trainer's own log-probabilities, or others."""
    lengths = (5, 17, 9)
    prompts = [PromptExample([rng.randint(3, 250) for _ in range(n)], {"number": i}) for i, n in enumerate(lengths)]
    answers = []
    for prompt in prompts:
        group = []
        for number in range(GROUP):
            length = rng.randint(1, MOST_TOKENS)
            token_ids = [rng.randint(3, 250) for _ in range(length - 1)] + [rng.choice([2, 77])]
            with torch.no_grad():
                whole = torch.tensor([[*prompt.token_ids, *token_ids]])
                log_probs = torch.log_softmax(model(input_ids=whole).logits[0, :-1], dim=-1)
            own = log_probs[range(whole.shape[1] - 1), whole[0, 1:]][-length:]
            given = [float(value) + (rng.gauss(0, 0.7) if differing else 0.0) for value in own]
            group.append(Completion(tuple(token_ids), tuple(given), str(number), token_ids[-1] != 2))
        answers.append(group)
    return prompts, answers


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if ".default." in name and parameter.grad is not None
    }


@pytest.mark.parametrize(
    ("beta", "differing", "temperature"),
    [(0.0, True, 1.0), (0.0, False, 1.0), (0.04, True, 1.0), (0.04, False, 0.7)],
    ids=["policy", "policy_without_correction", "policy_and_kl", "kl_at_another_temperature"],
)
def test_loss_advantages_and_gradient_are_those_of_trl(
    theirs: Any, folder: Path, tmp_path: Path, beta: float, differing: bool, temperature: float
) -> None:
    trainer = _trainer(theirs, folder, tmp_path, beta, temperature)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B.default" in name:  # the policy has moved away from its reference
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    ours = copy.deepcopy(theirs)
    ours.get_base_model().set_attn_implementation(PACKED)
    prompts, answers = _record(theirs, random.Random(2), differing=differing)

    recorded: Any = Recorded({tuple(prompt.token_ids): group for prompt, group in zip(prompts, answers, strict=True)})
    asked = Reinforcement(None, GROUP, MOST_TOKENS, temperature, beta, 0.2)
    patience = Patience(lambda *_: None)
    objective = Reinforced(prompts, asked, 0, recorded, recorded, recorded, patience)
    ours.train()
    batch = objective.gather(1, range(len(prompts)), ALONE)
    loss = torch.zeros(())
    sums = torch.zeros(len(objective.metric_names))
    for part in objective.parts(batch.items):
        part_loss, part_sums = objective.loss(ours, part)
        (part_loss / batch.scale).backward()
        loss += part_loss.detach() / batch.scale
        sums += part_sums / batch.scale

    flat = [answer for group in answers for answer in group]
    trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, differing
    trainer._generate = lambda _: (
        [list(prompt.token_ids) for prompt in prompts for _ in range(GROUP)],
        [list(answer.token_ids) for answer in flat],
        None,
        ["" for _ in flat],
        [list(answer.log_probs_T) for answer in flat],
        {},
        None,
        None,
    )
    theirs.train()
    inputs = trainer._generate_and_score_completions([{"prompt": "a"} for _ in flat])
    their_loss = trainer.compute_loss(theirs, inputs)
    their_loss.backward()

    advantage = {tuple(item.example.token_ids): item.advantage for item in batch.items}
    for prompt, group, theirs_P in zip(prompts, answers, inputs["advantages"].view(-1, GROUP), strict=True):
        for answer, expected in zip(group, theirs_P.tolist(), strict=True):
            found = advantage.get((*prompt.token_ids, *answer.token_ids), 0.0)
            assert found == pytest.approx(expected, abs=1e-5)
    assert batch.scale == float(inputs["num_items_in_batch"])
    assert float(loss) == pytest.approx(float(their_loss.detach()), rel=1e-4, abs=1e-6)
    expected_gradients = _gradients(theirs)
    found_gradients = _gradients(ours)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, expected in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], expected, rtol=1e-3, atol=1e-6)
    metrics = dict(zip(objective.metric_names, sums.tolist(), strict=True))
    if beta:
        assert metrics["kl"] == pytest.approx(trainer._metrics["train"]["kl"][-1], rel=1e-4)
    if differing:
        assert metrics["sampler_truncated"] > 0, "no weight was above the limit: the test compares less than it says"
    assert metrics["clip_ratio"] == 0
