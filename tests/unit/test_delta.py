"""Low-rank deltas against changes that are known, and against the whole decomposition."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.training.delta import BaseWeights, Delta, become, extract, factor, write_delta
from tests.support.tiny_llama import make_tiny_llama

TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base"), layers=3)


@pytest.fixture
def model(base_folder: Path) -> Any:
    return _load(base_folder)


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _change(model: Any, pattern: str, rank: int | None) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(pattern, name):
                noise = torch.randn_like(parameter)
                if rank is not None:
                    outputs, inputs = parameter.shape
                    noise = torch.randn(outputs, rank) @ torch.randn(rank, inputs)
                parameter.add_(0.01 * noise)


def _extract(model: Any, folder: Path, rank: int) -> Delta:
    return extract(model, BaseWeights(folder, model), rank)


def test_a_change_of_rank_four_is_exact_at_rank_eight(model: Any, base_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    _change(model, "_proj", 4)
    delta = _extract(model, base_folder, 8)
    assert delta.retained_fraction == pytest.approx(1.0, abs=1e-6)
    assert delta.worst_fraction == pytest.approx(1.0, abs=1e-6)
    assert delta.lost == ()
    write_delta(delta, str(base_folder), tmp_path / "adapter")
    served = PeftModel.from_pretrained(_load(base_folder), tmp_path / "adapter")
    assert (served(TOKENS).logits - model(TOKENS).logits).abs().max() < 1e-4
    become(model, BaseWeights(base_folder, model), delta)
    assert (served(TOKENS).logits - model(TOKENS).logits).abs().max() < 1e-4


def test_the_retained_fraction_is_that_of_the_whole_decomposition(model: Any, base_folder: Path) -> None:
    _change(model, "", None)
    before = dict(_load(base_folder).named_parameters())
    total = kept = 0.0
    worst = 1.0
    for name, parameter in model.named_parameters():
        change = (parameter - before[name]).detach()
        total += float(change.square().sum())
        if "_proj" in name:
            sizes = torch.linalg.svdvals(change).square()
            kept += float(sizes[:5].sum())
            worst = min(worst, float(sizes[:5].sum() / sizes.sum()))
    delta = _extract(model, base_folder, 5)
    # Noise is the worst case of the randomised decomposition; of its spectrum it misses a few hundredths.
    assert delta.retained_fraction == pytest.approx(kept / total, rel=0.05)
    assert delta.retained_fraction <= kept / total
    assert delta.worst_fraction == pytest.approx(worst, rel=0.05)
    assert set(delta.lost) == {
        "model.embed_tokens.weight",
        "model.layers.*.input_layernorm.weight",
        "model.layers.*.post_attention_layernorm.weight",
        "model.norm.weight",
    }


def test_what_no_adapter_carries_lowers_the_retained_fraction_and_is_the_bases_when_served(
    model: Any, base_folder: Path
) -> None:
    _change(model, "q_proj", 2)
    _change(model, "norm", None)
    delta = _extract(model, base_folder, 8)
    before = dict(_load(base_folder).named_parameters())
    sizes = {name: float((value - before[name]).detach().square().sum()) for name, value in model.named_parameters()}
    carried = sum(size for name, size in sizes.items() if "q_proj" in name)
    assert delta.retained_fraction == pytest.approx(carried / sum(sizes.values()), rel=1e-4)
    become(model, BaseWeights(base_folder, model), delta)
    assert torch.equal(model.model.norm.weight, before["model.norm.weight"])


def test_only_the_blocks_that_changed_are_in_the_adapter(model: Any, base_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    _change(model, r"layers\.2\..*_proj", 2)
    delta = _extract(model, base_folder, 4)
    write_delta(delta, str(base_folder), tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["layers_to_transform"] == [2]
    assert all(".layers.2." in module for module in delta.factors)
    served = PeftModel.from_pretrained(_load(base_folder), tmp_path / "adapter")
    assert (served(TOKENS).logits - model(TOKENS).logits).abs().max() < 1e-4


def test_no_change_is_an_adapter_that_changes_nothing(model: Any, base_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    delta = _extract(model, base_folder, 4)
    assert (delta.retained_fraction, delta.worst_module) == (1.0, "")
    write_delta(delta, str(base_folder), tmp_path / "adapter")
    served = PeftModel.from_pretrained(_load(base_folder), tmp_path / "adapter")
    assert torch.equal(served(TOKENS).logits, model(TOKENS).logits)


def test_a_head_of_its_own_is_compared_with_the_embedding_that_it_was(model: Any, base_folder: Path) -> None:
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    assert _extract(model, base_folder, 4).lost == ()
    with torch.no_grad():
        head.weight[3] += 1
    assert _extract(model, base_folder, 4).lost == ("lm_head.weight",)


@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (300, 500)])
def test_factors_are_balanced_and_padded_to_the_rank(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    change = torch.randn(shape[0], 3) @ torch.randn(3, shape[1])
    a_R_I, b_O_R = factor(change, 64)
    assert (a_R_I.shape, b_O_R.shape) == ((64, shape[1]), (shape[0], 64))
    torch.testing.assert_close(b_O_R @ a_R_I, change, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a_R_I.norm(dim=1)[:3], b_O_R.norm(dim=0)[:3])
    again = factor(change, 64)
    assert torch.equal(again[0], a_R_I)
