"""Every architecture of the catalogue: packed training computes what transformers does, with LoRA on LINEAR."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from graft.data.prepare import Example
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_packed_row_has_the_losses_of_transformers_own_attention(architecture: str, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", KINDS[architecture])
    assert read_facts("it", folder, tmp_path).context_tokens == 512
    packed = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=PACKED, dtype=torch.float32)
    model = get_peft_model(packed, LoraConfig(r=4, target_modules=list(LINEAR), task_type="CAUSAL_LM"))
    assert fuse(model) == 2 * len(LINEAR)
    examples = [_example(20, 0), _example(40, 1)]
    alone = tuple(next(microbatches([example])) for example in examples)
    check_packing(model, next(microbatches(examples)), alone)

    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    ids = torch.tensor([examples[1].token_ids])
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(eager(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        torch.testing.assert_close(token_losses(model, alone[1]), expected, atol=1e-4, rtol=1e-4)


def test_a_sliding_window_limits_the_context_where_it_is_used(tmp_path: Path) -> None:
    used = make_tiny_model(tmp_path / "used", "mistral", sliding_window=64)
    named = make_tiny_model(tmp_path / "named", "qwen2", sliding_window=64, use_sliding_window=False)
    assert read_facts("used", used, tmp_path).context_tokens == 64
    assert read_facts("named", named, tmp_path).context_tokens == 512
