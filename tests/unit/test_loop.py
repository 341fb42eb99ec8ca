import copy
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from graft.data.prepare import Example
from graft.domain.errors import FailedPrecondition
from graft.training import loop
from graft.training.batching import microbatches, pack
from graft.training.lora import fuse
from graft.training.objectives.objective import Group
from graft.training.objectives.supervised import Supervised, mean_loss
from graft.training.packing import PACKED, check_packing, token_losses
from tests.support.tiny_llama import make_tiny_llama
from tests.support.workers import together

SETTINGS = loop.LoopSettings(
    total_steps=6, batch_size=5, learning_rate=1e-2, warmup_ratio=0.2, weight_decay=0.0, max_grad_norm=1.0, seed=3
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM

    # Two query heads on one key head, as grouped-query attention has it.
    folder = make_tiny_llama(tmp_path_factory.mktemp("tiny"))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=PACKED)


@pytest.fixture
def padded(base: Any) -> Any:
    model = copy.deepcopy(base)
    model.set_attn_implementation("sdpa")
    return model


def _lora(base: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # it starts at zero, and A then has no gradient
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def _examples(count: int) -> list[Example]:
    rng = random.Random(0)
    made = []
    for _ in range(count):
        prompt, completion = rng.randint(2, 30), rng.randint(1, 6)
        tokens = [rng.randint(3, 250) for _ in range(prompt + completion)]
        made.append(Example(tokens, [False] * prompt + [True] * completion))
    return made


def _by_length(examples: list[Example]) -> list[Example]:
    return sorted(examples, key=lambda example: len(example.token_ids))


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def _padded_loss(model: Any, examples: list[Example]) -> torch.Tensor:
    """The plain way: one padded batch, all logits, labels of -100 without loss."""
    longest = max(len(example.token_ids) for example in examples)
    tokens = torch.zeros(len(examples), longest, dtype=torch.long)
    attention = torch.zeros_like(tokens)
    labels = torch.full_like(tokens, -100)
    for row, example in enumerate(examples):
        length = len(example.token_ids)
        tokens[row, :length] = torch.tensor(example.token_ids)
        attention[row, :length] = 1
        learned = torch.tensor(example.loss_mask)
        labels[row, :length] = torch.where(learned, torch.tensor(example.token_ids), -100)
    logits = model(input_ids=tokens, attention_mask=attention).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_losses_of_a_packed_row_are_those_of_the_full_logits_of_each_example_alone(base: Any, padded: Any) -> None:
    examples = _by_length(_examples(7))
    expected = []
    for example in examples:
        logits = padded(torch.tensor([example.token_ids])).logits[0].log_softmax(-1)
        expected += [
            -logits[t - 1, token]
            for t, (token, learned) in enumerate(zip(example.token_ids, example.loss_mask, strict=True))
            if learned
        ]
    torch.testing.assert_close(token_losses(base, pack(examples)), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_a_document_in_a_row_does_not_change_the_losses_of_the_next(base: Any) -> None:
    first, other, second = (Example(list(range(start, start + 20)), [True] * 20) for start in (10, 50, 90))
    losses = [token_losses(base, pack([before, second])) for before in (first, other)]
    torch.testing.assert_close(losses[0][19:], losses[1][19:], rtol=0, atol=0)
    assert (losses[0][:19] - losses[1][:19]).abs().max() > 0.01


@pytest.mark.parametrize("most_tokens", [10_000, 40])
def test_gradients_of_packed_microbatches_are_those_of_one_padded_batch(
    base: Any, padded: Any, most_tokens: int
) -> None:
    examples = _examples(12)
    reference, packed = _lora(padded), _lora(base)
    reference_loss = _padded_loss(reference, examples)
    reference_loss.backward()
    learned = sum(sum(example.loss_mask) for example in examples)
    loss = 0.0
    groups = list(microbatches(examples, most_tokens))
    assert len(groups) == 1 or most_tokens == 40
    for group in groups:
        part = token_losses(packed, group).sum() / learned
        part.backward()
        loss += part.item()
    assert loss == pytest.approx(reference_loss.item(), rel=1e-5)
    expected = _gradients(reference)
    for name, gradient in _gradients(packed).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)
        assert gradient.abs().max() > 1e-5


def test_an_architecture_that_ignores_the_lengths_of_a_row_is_refused(base: Any) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    examples = _by_length(_examples(2))
    together, alone = pack(examples), tuple(pack([example]) for example in examples)
    check_packing(base, together, alone)
    right = ALL_ATTENTION_FUNCTIONS[PACKED]

    def ignoring(*arguments: Any, lengths: tuple[int, ...], **options: Any) -> Any:
        del lengths
        return right(*arguments, **options)

    ALL_ATTENTION_FUNCTIONS.register(PACKED, ignoring)
    try:
        with pytest.raises(FailedPrecondition, match="examples in one row"):
            check_packing(base, together, alone)
    finally:
        ALL_ATTENTION_FUNCTIONS.register(PACKED, right)


def test_a_model_with_other_attention_is_refused(padded: Any) -> None:
    with pytest.raises(ValueError, match="'sdpa'"):
        token_losses(padded, pack(_examples(1)))


def test_the_loss_falls_and_only_the_adapter_changes(base: Any) -> None:
    model = _lora(base)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    examples = _examples(5)
    before = mean_loss(model, examples)
    reports: list[loop.StepReport] = []
    settings = loop.LoopSettings(40, 5, 1e-2, 0.1, 0.0, 1.0, 0)
    loop.train(model, Supervised(examples), settings, reports.append)
    assert mean_loss(model, examples) < before - 0.1
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if not p.requires_grad)
    assert reports[-1].step == reports[-1].total_steps == 40
    assert reports[-1].epoch == 40.0
    assert reports[-1].trained_tokens == 40 * sum(len(example.token_ids) for example in examples)
    assert reports[-1].remaining_seconds == 0.0


def test_the_same_seed_gives_the_same_curve_and_another_seed_another(base: Any) -> None:
    curves = []
    for seed in (3, 3, 4):
        losses: list[float] = []
        loop.train(
            _lora(base),
            Supervised(_examples(12)),
            replace(SETTINGS, seed=seed),
            lambda report, into=losses: into.append(report.loss),  # type: ignore[misc]
        )
        curves.append(losses)
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]


def test_a_step_without_anything_to_learn_changes_nothing(base: Any) -> None:
    model = _lora(base)
    before = copy.deepcopy(model.state_dict())
    reports: list[loop.StepReport] = []
    loop.train(model, Supervised([Example([5, 6], [False, False])]), replace(SETTINGS, total_steps=1), reports.append)
    assert (reports[0].loss, reports[0].grad_norm) == (0.0, 0.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_loss_that_is_no_number_ends_training_with_advice(base: Any) -> None:
    model = _lora(base)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("inf"))
    with pytest.raises(FailedPrecondition, match="learning rate below") as caught:
        loop.train(model, Supervised(_examples(3)), SETTINGS, lambda _: None)
    assert caught.value.reason == "LOSS_NOT_FINITE"


def test_the_rate_rises_in_a_line_and_falls_in_a_line() -> None:
    settings = replace(SETTINGS, total_steps=10, warmup_ratio=0.2)
    rates = [round(loop.rate(step, settings), 4) for step in range(10)]
    assert rates == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert loop.rate(0, replace(settings, warmup_ratio=0.0)) == 1.0


@pytest.mark.parametrize(("workers", "sharded"), [(2, False), (3, False), (3, True)])
def test_several_workers_follow_the_curve_of_one_and_in_a_sharded_group_each_makes_as_many_passes(
    base: Any, workers: int, sharded: bool
) -> None:
    examples = _examples(12)
    alone: list[float] = []
    loop.train(_lora(base), Supervised(examples), SETTINGS, lambda report: alone.append(report.loss))

    models = [_lora(base) for _ in range(workers)]
    passes = [0] * workers

    def work(group: Group) -> tuple[list[float], float]:
        group = replace(group, sharded=sharded)
        losses: list[float] = []
        model = models[group.rank]

        def count(*_: Any) -> None:
            passes[group.rank] += 1

        model.get_base_model().get_decoder().register_forward_hook(count)
        loop.train(model, Supervised(examples), SETTINGS, lambda report: losses.append(report.loss), group)
        return losses, mean_loss(model, examples, group)

    curves = together(workers, work)
    assert all(curve == curves[0] for curve in curves)
    assert curves[0][0] == pytest.approx(alone, rel=1e-4)
    # The last batch of an epoch has two rows.
    assert (len(set(passes)) == 1) == (sharded or workers < 3)
    assert curves[0][1] == pytest.approx(mean_loss(models[0], examples), rel=1e-5)


@pytest.mark.parametrize("tensor_type", [torch.float32, torch.bfloat16])
def test_a_fused_layer_computes_what_peft_computes(base: Any, tensor_type: torch.dtype) -> None:
    plain = _lora(copy.deepcopy(base).to(tensor_type))
    fused = copy.deepcopy(plain)
    assert fuse(fused) == 4
    packed = pack(_by_length(_examples(5)))
    losses = []
    for model in (plain, fused):
        loss = token_losses(model, packed)
        loss.mean().backward()
        losses.append(loss.detach())
    exact = tensor_type == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5 if exact else 0.02, atol=1e-5 if exact else 0.02)
    expected = _gradients(plain)
    for name, gradient in _gradients(fused).items():
        assert gradient.dtype == torch.float32
        difference = (gradient - expected[name]).norm() / expected[name].norm()
        assert difference < (1e-4 if exact else 0.05), name


def test_layers_with_dropout_keep_pefts_way(base: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj"]))
    assert fuse(model) == 0
