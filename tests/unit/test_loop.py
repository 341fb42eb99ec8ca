import copy
import random
from itertools import chain
from typing import Any

import pytest
import torch

from graft.data.prepare import DataStats, Example
from graft.domain.jobs import Hyperparameters, JobSpec, Lora
from graft.domain.resources import BaseModel
from graft.training import loop
from graft.training.derive import derive
from tests.support.tiny_llama import make_tiny_llama

SETTINGS = loop.LoopSettings(
    total_steps=6, batch_size=5, learning_rate=1e-2, warmup_ratio=0.2, weight_decay=0.0, max_grad_norm=1.0, seed=3
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(make_tiny_llama(tmp_path_factory.mktemp("tiny")), dtype=torch.float32)


def _lora(base: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))


def _examples(count: int) -> list[Example]:
    rng = random.Random(0)
    made = []
    for _ in range(count):
        prompt, completion = rng.randint(2, 30), rng.randint(1, 6)
        tokens = [rng.randint(3, 250) for _ in range(prompt + completion)]
        made.append(Example(tokens, [False] * prompt + [True] * completion))
    return made


def test_the_loss_is_that_of_the_full_logits_at_the_learned_tokens(base: Any) -> None:
    examples = _examples(7)
    found = loop.token_losses(base, examples)
    expected = []
    for example in examples:
        logits = base(torch.tensor([example.token_ids])).logits[0].log_softmax(-1)
        expected += [
            -logits[t - 1, token]
            for t, (token, learned) in enumerate(zip(example.token_ids, example.loss_mask, strict=True))
            if learned
        ]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_microbatches_hold_every_example_once_within_the_token_budget() -> None:
    examples = [Example([1] * length, [True] * length) for length in (3000, 700, 700, 700, 10, 900)]
    groups = list(loop.microbatches(examples))
    assert sorted(len(e.token_ids) for group in groups for e in group) == [10, 700, 700, 700, 900, 3000]
    for group in groups:
        padded = len(group) * max(len(example.token_ids) for example in group)
        assert padded <= loop.MICROBATCH_TOKENS or len(group) == 1


def test_small_microbatches_give_the_gradients_of_one_big_batch(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    curves = []
    for budget in (10_000, 40):
        monkeypatch.setattr(loop, "MICROBATCH_TOKENS", budget)
        losses: list[float] = []
        loop.train(_lora(base), _examples(12), SETTINGS, lambda report, into=losses: into.append(report.loss))  # type: ignore[misc]
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_the_loss_falls_and_only_the_adapter_changes(base: Any) -> None:
    model = _lora(base)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    examples = _examples(5)
    before = loop.mean_loss(model, examples)
    reports: list[loop.StepReport] = []
    settings = loop.LoopSettings(40, 5, 1e-2, 0.1, 0.0, 1.0, 0)
    loop.train(model, examples, settings, reports.append)
    assert loop.mean_loss(model, examples) < before - 0.1
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if not p.requires_grad)
    assert reports[-1].step == reports[-1].total_steps == 40
    assert reports[-1].trained_tokens == 40 * sum(len(example.token_ids) for example in examples)
    assert reports[-1].remaining_seconds == 0.0


def test_every_epoch_sees_every_example_once_in_another_order() -> None:
    settings = loop.LoopSettings(6, 4, 1e-3, 0.0, 0.0, 1.0, 0)
    steps = list(loop.batches(12, settings))
    first, second = list(chain(*steps[:3])), list(chain(*steps[3:]))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert list(loop.batches(12, settings)) == steps


def test_two_workers_follow_the_curve_of_one(base: Any) -> None:
    import threading

    examples = _examples(12)
    alone: list[float] = []
    loop.train(_lora(base), examples, SETTINGS, lambda report: alone.append(report.loss))

    barrier = threading.Barrier(2)
    tensors: dict[int, torch.Tensor] = {}
    together: dict[int, list[float]] = {0: [], 1: []}

    def worker(rank: int) -> None:
        def reduce(tensor: torch.Tensor) -> None:
            tensors[rank] = tensor.clone()
            barrier.wait()
            tensor.copy_(tensors[0] + tensors[1])
            barrier.wait()

        loop.train(
            models[rank],
            examples,
            SETTINGS,
            lambda report: together[rank].append(report.loss),
            rank=rank,
            world_size=2,
            reduce=reduce,
        )

    models = [_lora(base), _lora(base)]
    threads = [threading.Thread(target=worker, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert together[0] == together[1]
    assert together[0] == pytest.approx(alone, rel=1e-4)


BASE = BaseModel("b", "/b", "sha256:b", 135_000_000, 1, 2048, "MIT", "folder", ("q_proj", "v_proj"), 64)


def _resolved(spec: JobSpec, rows: int = 400) -> dict[str, Any]:
    stats = DataStats(rows, rows, rows * 40, rows * 2, 60, 40, 0)
    return {item.name: item for item in derive(spec, BASE, stats)}


def test_every_hyperparameter_is_derived_with_a_reason() -> None:
    found = _resolved(JobSpec("b", "ds"))
    names = set(Hyperparameters.__dataclass_fields__) | {f"lora.{name}" for name in Lora.__dataclass_fields__}
    assert set(found) == names
    assert all(item.reason for item in found.values())
    assert found["learning_rate"].value == 5e-4
    assert found["max_steps"].value == 100
    assert found["lora.target_modules"].value == ["q_proj", "v_proj"]


def test_what_is_given_is_kept_and_the_rest_follows_from_it() -> None:
    asked = Hyperparameters(epochs=2.0, batch_size=4, learning_rate=1e-4)
    found = _resolved(JobSpec("b", "ds", lora=Lora(rank=16), hyperparameters=asked))
    for name, value in (("epochs", 2.0), ("batch_size", 4), ("learning_rate", 1e-4), ("lora.rank", 16)):
        assert (found[name].value, found[name].derived) == (value, False)
    assert (found["max_steps"].value, found["lora.alpha"].value) == (200, 32.0)


def test_few_rows_get_more_epochs_and_a_batch_that_fits() -> None:
    found = _resolved(JobSpec("b", "ds"), rows=5)
    assert (found["batch_size"].value, found["epochs"].value, found["max_steps"].value) == (5, 5.0, 5)
