"""The loop against TRL's SFTTrainer, the reference: same data, order, seed and schedule."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.data.prepare import Example
from graft.training import loop
from graft.training.batching import batches
from graft.training.objectives.supervised import Supervised
from graft.training.packing import PACKED
from tests.support.tiny_llama import make_tiny_llama

pytestmark = [pytest.mark.integration, pytest.mark.timeout(200)]

SETTINGS = loop.LoopSettings(
    total_steps=16, batch_size=4, learning_rate=1e-2, warmup_ratio=0.0, weight_decay=0.01, max_grad_norm=1.0, seed=5
)


def _learnable(count: int) -> list[Example]:
    """Prompts of many lengths, whose completion repeats one of two patterns."""
    rng = random.Random(1)
    made = []
    for number in range(count):
        prompt = [rng.randint(3, 250) for _ in range(rng.randint(2, 60))] + [10 + number % 2]
        completion = [50 + number % 2] * rng.randint(1, 8) + [2]
        made.append(Example(prompt + completion, [False] * len(prompt) + [True] * len(completion)))
    return made


def _trl_losses(model: Any, folder: Path, examples: list[Example], tokenizer: Any) -> list[float]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    order = [index for step in batches(len(examples), 4, SETTINGS.total_steps, SETTINGS.seed) for index in step]
    rows = [
        {"input_ids": examples[index].token_ids, "completion_mask": [int(x) for x in examples[index].loss_mask]}
        for index in order
    ]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=SETTINGS.batch_size,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            learning_rate=SETTINGS.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=0,
            weight_decay=SETTINGS.weight_decay,
            max_grad_norm=SETTINGS.max_grad_norm,
            completion_only_loss=True,
            max_length=512,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=SETTINGS.seed,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_loss_curve_is_that_of_trl_within_one_percent(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_tiny_llama(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(SETTINGS.seed)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    ours = copy.deepcopy(theirs)
    ours.get_base_model().set_attn_implementation(PACKED)
    examples = _learnable(32)

    losses: list[float] = []
    loop.train(ours, Supervised(examples), SETTINGS, lambda report: losses.append(report.loss))
    reference = _trl_losses(theirs, tmp_path / "trl", examples, AutoTokenizer.from_pretrained(folder))

    assert len(reference) == SETTINGS.total_steps
    assert losses == pytest.approx(reference, rel=0.01)
    # It moves by far more than the two may differ.
    assert losses[-1] < 0.8 * losses[0]
