"""Packed training of LoRA on LINEAR computes what transformers and PEFT do, for every architecture of the catalogue.

That they are also served so is tests/integration/test_mixed_batches.py's.
"""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from graft.data.prepare import Example
from graft.domain.errors import FailedPrecondition
from graft.registry.facts import ARCHITECTURES, LINEAR, read_facts
from graft.training.batching import microbatches
from graft.training.imports import LoraConfig, get_peft_model
from graft.training.lora import fuse
from graft.training.packing import PACKED, check_packing, token_losses
from tests.support.tiny_models import make_tiny_model

KINDS = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def _example(length: int, seed: int) -> Example:
    drawn = torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed))
    return Example(drawn.tolist(), [1] * length)


def test_every_architecture_of_the_catalogue_is_trained_here() -> None:
    assert set(ARCHITECTURES) == set(KINDS)


@pytest.mark.parametrize("architecture", KINDS)
def test_gradient_steps_on_a_packed_row_give_the_adapter_that_transformers_and_peft_answer_with(
    architecture: str, tmp_path: Path
) -> None:
    folder = make_tiny_model(tmp_path / "model", KINDS[architecture])
    packed = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=PACKED, dtype=torch.float32)
    model = get_peft_model(packed, LoraConfig(r=4, target_modules=list(LINEAR), task_type="CAUSAL_LM"))
    assert fuse(model) == 2 * len(LINEAR)
    examples = [_example(20, 0), _example(40, 1)]
    alone = tuple(next(microbatches([example])) for example in examples)
    check_packing(model, next(microbatches(examples)), alone)

    before = token_losses(model, alone[1]).detach()
    both = next(microbatches(examples))
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapter, lr=1e-2)
    for _ in range(4):
        token_losses(model, both).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    sides = {name: side for name, side in model.named_parameters() if "lora_B" in name}
    assert len(sides) == 2 * len(LINEAR)
    assert all(side.abs().max() > 1e-3 for side in sides.values())
    with torch.no_grad():
        after = token_losses(model, alone[1])
    assert after.mean() < before.mean() - 0.1

    model.save_pretrained(tmp_path / "adapter")
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(eager, tmp_path / "adapter")
    ids = torch.tensor([examples[1].token_ids])
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(theirs(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-4)


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(FailedPrecondition, match="GPT2LMHeadModel; supported: LlamaForCausalLM") as raised:
        read_facts("old", tmp_path, tmp_path)
    assert raised.value.reason == "UNSUPPORTED_ARCHITECTURE"


def test_a_sliding_window_limits_the_context_where_it_is_used(tmp_path: Path) -> None:
    used = make_tiny_model(tmp_path / "used", "mistral", sliding_window=64)
    named = make_tiny_model(tmp_path / "named", "qwen2", sliding_window=64, use_sliding_window=False)
    assert read_facts("used", used, tmp_path).context_tokens == 64
    assert read_facts("named", named, tmp_path).context_tokens == 512
