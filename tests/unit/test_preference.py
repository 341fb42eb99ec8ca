"""The loss of preference pairs on a tiny llama."""

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from graft.data.preference import PreferenceExample
from graft.data.prepare import Example
from graft.training import loop
from graft.training.objectives.objective import ALONE, Group, measure
from graft.training.objectives.preference import Preference, reference_log_probs
from graft.training.packing import PACKED
from tests.support.tiny_llama import make_tiny_llama
from tests.support.workers import together

BETA = 0.2
SETTINGS = loop.LoopSettings(
    total_steps=6, batch_size=5, learning_rate=2e-3, warmup_ratio=0.0, weight_decay=0.0, max_grad_norm=1.0, seed=3
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM

    folder = make_tiny_llama(tmp_path_factory.mktemp("tiny"))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=PACKED)


@pytest.fixture
def model(base: Any) -> Any:
    return _lora(base)


def _lora(base: Any, dropout: float = 0.0) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "down_proj"]
    return get_peft_model(
        copy.deepcopy(base), LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets)
    )


def _answer(rng: random.Random, prompt: Sequence[int], first: int) -> Example:
    answer = [first, *(rng.randint(3, 250) for _ in range(rng.randint(0, 5))), 2]
    return Example([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))


def _pairs(count: int) -> list[PreferenceExample]:
    """The chosen answer always begins with one token, the rejected with another."""
    rng = random.Random(0)
    made = []
    for _ in range(count):
        prompt = [rng.randint(3, 250) for _ in range(rng.randint(1, 30))]
        made.append(PreferenceExample(_answer(rng, prompt, 60), _answer(rng, prompt, 61)))
    return made


def _log_prob(model: Any, example: Example) -> float:
    """The plain way: of one answer alone, over all logits."""
    logits = model(torch.tensor([list(example.token_ids)])).logits[0].log_softmax(-1)
    learned = [place for place, has_loss in enumerate(example.loss_mask) if has_loss]
    return float(sum(logits[place - 1, example.token_ids[place]] for place in learned))


def test_the_loss_is_that_of_the_paper_over_answers_scored_one_by_one(base: Any) -> None:
    pairs = _pairs(7)
    reference, policy = _lora(base), _lora(base)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    objective = Preference(pairs, reference_log_probs(reference, pairs, range(7)), BETA)
    found = measure(policy, objective, objective.gather(1, range(7), ALONE))
    with torch.no_grad():
        rewards = [
            [BETA * (_log_prob(policy, side) - _log_prob(reference, side)) for side in (pair.chosen, pair.rejected)]
            for pair in pairs
        ]
    margins = [chosen - rejected for chosen, rejected in rewards]
    expected = {
        "loss": sum(math.log1p(math.exp(-margin)) for margin in margins) / 7,
        "accuracy": sum(margin > 0 for margin in margins) / 7,
        "margin": sum(margins) / 7,
        "chosen_reward": sum(chosen for chosen, _ in rewards) / 7,
        "rejected_reward": sum(rejected for _, rejected in rewards) / 7,
    }
    assert found == {name: pytest.approx(value, rel=1e-3, abs=1e-4) for name, value in expected.items()}
    assert 0 < expected["accuracy"] < 1


def test_training_begins_at_log_two_and_comes_to_prefer_the_chosen_answers(model: Any) -> None:
    pairs = _pairs(12)
    objective = Preference(pairs, reference_log_probs(model, pairs, range(12)), BETA)
    reports: list[loop.StepReport] = []
    loop.train(model, objective, replace(SETTINGS, total_steps=40), reports.append)
    assert reports[0].loss == pytest.approx(math.log(2), abs=1e-4)
    assert reports[-1].loss < 0.5
    assert reports[-1].metrics["accuracy"] == 1.0
    assert reports[-1].metrics["margin"] > 0.5
    assert reports[-1].trained_tokens == pytest.approx(40 / 3 * sum(pair.tokens for pair in pairs), rel=0.1)


def test_the_reference_is_scored_without_dropout(base: Any) -> None:
    pairs = _pairs(3)
    model = _lora(base, dropout=0.5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.train()
    first, second = (reference_log_probs(model, pairs, range(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert model.training


def test_how_far_the_reference_has_come_is_told_to_the_last_pair(model: Any) -> None:
    told: list[tuple[int, int]] = []
    reference_log_probs(model, _pairs(200), range(150), on_scored=lambda done, of: told.append((done, of)))
    assert len(told) > 1
    assert told == sorted(told)
    assert told[-1] == (150, 150)


def test_a_pair_that_was_never_scored_ends_training_rather_than_being_learned_from(model: Any) -> None:
    from graft.domain.errors import FailedPrecondition

    pairs = _pairs(5)
    scored = reference_log_probs(model, pairs, [0, 2])
    assert scored.isnan().any(1).tolist() == [False, True, False, True, True]
    with pytest.raises(FailedPrecondition, match="loss is nan"):
        loop.train(model, Preference(pairs, scored, BETA), SETTINGS, lambda _: None)


def test_both_answers_of_a_pair_pass_in_one_row_within_the_token_budget() -> None:
    def long(length: int) -> Example:
        return Example([5] * length, [False] * (length - 1) + [True])

    pairs = [PreferenceExample(long(size), long(size - 1)) for size in (800, 100, 100, 300)]
    objective = Preference(pairs, torch.zeros(4, 2), BETA)
    parts = list(objective.parts(objective.gather(1, range(4), ALONE).items))
    assert [part.packed.lengths for part in parts] == [(99, 99, 100, 100, 299, 300), (799, 800)]
    assert [len(part.reference_P_2) for part in parts] == [3, 1]


@pytest.mark.parametrize("workers", [2, 3])
def test_several_workers_follow_the_curve_of_one(base: Any, workers: int) -> None:
    pairs = _pairs(12)
    models = [_lora(base) for _ in range(workers + 1)]

    def work(group: Group) -> tuple[list[dict[str, float]], dict[str, float]]:
        model = models[group.rank] if group.world_size > 1 else models[-1]
        objective = Preference(pairs, reference_log_probs(model, pairs, range(12), group=group), BETA)
        curve: list[dict[str, float]] = []
        loop.train(model, objective, SETTINGS, lambda r: curve.append({"loss": r.loss, **r.metrics}), group)
        return curve, measure(model, objective, objective.gather(1, range(12), group), group)

    alone, held_out = work(ALONE)
    curves = together(workers, work)
    assert all(curve == curves[0] for curve in curves)
    for mine, theirs in zip(curves[0][0][1:], alone[1:], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    assert curves[0][1] == pytest.approx(held_out, rel=1e-3, abs=1e-4)
