"""The loop against TRL's trainers, the reference: same data, order, seed and schedule."""

import copy
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.data.prepare import Example, Prepared, prepare
from graft.domain.jobs import Method, OverLengthPolicy
from graft.domain.resources import DatasetFormat
from graft.training import loop
from graft.training.batching import batches
from graft.training.objectives.objective import Objective
from graft.training.objectives.preference import Preference, reference_log_probs
from graft.training.objectives.supervised import Supervised
from graft.training.packing import PACKED
from tests.support.tiny_llama import make_tiny_llama

pytestmark = [pytest.mark.integration, pytest.mark.timeout(200)]

SETTINGS = loop.LoopSettings(
    total_steps=16, batch_size=4, learning_rate=1e-2, warmup_ratio=0.0, weight_decay=0.01, max_grad_norm=1.0, seed=5
)
CONTEXT_TOKENS = 512
BETA = 0.3
Curves = dict[str, list[float]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def theirs(folder: Path) -> Any:
    """A model with a fresh adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(SETTINGS.seed)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))


@pytest.fixture
def ours(theirs: Any) -> Any:
    """The same model."""
    model = copy.deepcopy(theirs)
    model.get_base_model().set_attn_implementation(PACKED)
    return model


def _learnable(count: int, *, loss_on_all: bool = False) -> list[Example]:
    """Prompts of many lengths, whose completion repeats one of two patterns."""
    rng = random.Random(1)
    made = []
    for number in range(count):
        prompt = [rng.randint(3, 250) for _ in range(rng.randint(2, 60))] + [10 + number % 2]
        completion = [50 + number % 2] * rng.randint(1, 8) + [2]
        made.append(Example(prompt + completion, [loss_on_all] * len(prompt) + [True] * len(completion)))
    return made


def _words(rng: random.Random, most: int) -> str:
    return " ".join(rng.choice(["red", "green", "blue", "one", "two", "three"]) for _ in range(rng.randint(1, most)))


def _read(
    rows: Sequence[dict[str, Any]], format: DatasetFormat, method: Method, tokenizer: Any, folder: Path
) -> Prepared:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare(path, format, tokenizer, CONTEXT_TOKENS, OverLengthPolicy.FAIL, method=method)


def _curves(model: Any, objective: Objective[Any, Any], settings: loop.LoopSettings) -> Curves:
    curves: Curves = {"loss": []} | {name: [] for name in objective.metric_names}

    def on_step(report: loop.StepReport) -> None:
        for name, value in {"loss": report.loss, **report.metrics}.items():
            curves[name].append(value)

    loop.train(model, objective, settings, on_step)
    return curves


def _options(output_dir: Path, settings: loop.LoopSettings) -> dict[str, Any]:
    """TRL's arguments that say the same as `settings`, for rows that come in the order of the steps."""
    return {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": settings.batch_size,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "max_length": CONTEXT_TOKENS,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": settings.seed,
    }


def _ordered(rows: Sequence[dict[str, Any]], settings: loop.LoopSettings) -> Any:
    from datasets import Dataset

    steps = batches(len(rows), settings.batch_size, settings.total_steps, settings.seed)
    return Dataset.from_list([rows[index] for step in steps for index in step])


def _trained(trainer: Any, names: dict[str, str]) -> Curves:
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {ours: [entry[theirs] for entry in history] for ours, theirs in names.items()}


def _sft(model: Any, tokenizer: Any, output_dir: Path, rows: Sequence[dict[str, Any]], **options: Any) -> list[float]:
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(**_options(output_dir, SETTINGS), **options)
    trainer = SFTTrainer(model=model, args=args, train_dataset=_ordered(rows, SETTINGS), processing_class=tokenizer)
    return _trained(trainer, {"loss": "loss"})["loss"]


@pytest.mark.parametrize("loss_on_all", [False, True])
def test_the_supervised_loss_curve_is_that_of_trl_within_one_percent(
    ours: Any, theirs: Any, tokenizer: Any, tmp_path: Path, loss_on_all: bool
) -> None:
    examples = _learnable(32, loss_on_all=loss_on_all)
    losses = _curves(ours, Supervised(examples), SETTINGS)["loss"]
    rows = [
        {"input_ids": list(item.token_ids), "completion_mask": [int(learned) for learned in item.loss_mask]}
        for item in examples
    ]
    reference = _sft(theirs, tokenizer, tmp_path, rows, completion_only_loss=True)
    assert len(reference) == SETTINGS.total_steps
    assert losses == pytest.approx(reference, rel=0.01)
    # It moves by far more than the two may differ.
    assert losses[-1] < (0.95 if loss_on_all else 0.8) * losses[0]


def test_the_self_supervised_loss_curve_is_that_of_trl_within_one_percent(
    ours: Any, theirs: Any, tokenizer: Any, tmp_path: Path
) -> None:
    rng = random.Random(3)
    rows = [{"text": _words(rng, 30)} for _ in range(32)]
    documents = _read(rows, DatasetFormat.TEXT, Method.SELF_SUPERVISED, tokenizer, tmp_path).examples
    losses = _curves(ours, Supervised(documents), SETTINGS)["loss"]
    ends = [{"text": row["text"] + tokenizer.eos_token} for row in rows]
    reference = _sft(theirs, tokenizer, tmp_path, ends, packing=False)
    assert len(reference) == SETTINGS.total_steps
    assert losses == pytest.approx(reference, rel=0.01)
    assert losses[-1] < 0.8 * losses[0]


def test_the_curves_of_preference_are_those_of_trl_within_one_percent(
    ours: Any, theirs: Any, tokenizer: Any, tmp_path: Path
) -> None:
    from trl import DPOConfig, DPOTrainer

    settings = replace(SETTINGS, learning_rate=1e-3)
    rng = random.Random(2)
    rows = [
        {"prompt": _words(rng, 8) + "? ", "chosen": "yes " + _words(rng, 3), "rejected": "no " + _words(rng, 3)}
        for _ in range(32)
    ]
    pairs = _read(rows, DatasetFormat.PREFERENCE, Method.PREFERENCE, tokenizer, tmp_path).pairs
    reference_N_2 = reference_log_probs(ours, pairs, range(len(pairs)))
    curves = _curves(ours, Preference(pairs, reference_N_2, BETA), settings)

    trainer = DPOTrainer(
        model=theirs,
        args=DPOConfig(**_options(tmp_path, settings), beta=BETA),
        train_dataset=_ordered(rows, settings),
        processing_class=tokenizer,
    )
    names = {
        "loss": "loss",
        "accuracy": "rewards/accuracies",
        "margin": "rewards/margins",
        "chosen_reward": "rewards/chosen",
        "rejected_reward": "rewards/rejected",
    }
    reference = _trained(trainer, names)
    assert len(reference["loss"]) == settings.total_steps
    # In the first step policy and reference are one, and which reward is higher is chance.
    for name in names:
        assert curves[name][1:] == pytest.approx(reference[name][1:], rel=0.01, abs=1e-3), name
    assert curves["loss"][0] == pytest.approx(reference["loss"][0], rel=1e-4)
    assert curves["loss"][-1] < 0.5 * curves["loss"][0]
    assert curves["accuracy"][-1] == 1.0
