"""The contestants of `training.py`: Graft's worker, and TRL's SFTTrainer as it comes, packed and free of padding.

Each is opened once a process and plays rounds. A round names the steps; it answers with the tokens and seconds from the
end of the first step, which fills caches, to the end of the last, and with every step's loss.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Round
from graft.data.prepare import Example, prepare
from graft.domain.jobs import Lora, OverLengthPolicy
from graft.domain.resources import DatasetFormat
from graft.registry.facts import LINEAR
from graft.training import tuning, worker
from graft.training.batching import batches
from graft.training.objectives.objective import Group
from graft.training.spec import Clock, RunSpec

Play = Callable[[Round], Round]

THREADS = len(os.sched_getaffinity(0))
BATCH_SIZE = 8
LEARNING_RATE = 5e-4
RANK = 8
SEED = 0
CONTEXT_TOKENS = 2048
PACKED_TOKENS = 512
"""Length of TRL's packed rows: about the tokens of a batch of 8 reviews, so that all take steps of one size."""


def result(step_ends: list[float], step_tokens: list[float], losses: list[float]) -> Round:
    """`step_tokens` counts from the start, as both loops do."""
    return {
        "tokens": step_tokens[-1] - step_tokens[0],
        "seconds": step_ends[-1] - step_ends[0],
        "steps": len(step_ends),
        "losses": losses,
        "threads": torch.get_num_threads(),
    }


def graft(base: Path, data: Path, dtype: torch.dtype) -> Play:
    """Graft's training worker itself, without Ray around it, in the type that is asked for."""

    def compute_dtype(base_model: Path) -> torch.dtype:  # noqa: ARG001 - the signature of what it replaces
        return dtype

    tuning.compute_dtype = compute_dtype

    def play(asked: Round) -> Round:
        step_ends: list[float] = []
        reports: list[dict[str, Any]] = []

        def tell(kind: str, data: dict[str, Any]) -> None:
            if kind == "metrics":
                step_ends.append(time.perf_counter())
                reports.append(data)

        folder = tempfile.mkdtemp()
        try:
            spec = run_spec(base, data, Path(folder), asked["steps"])
            worker.run_worker(spec, tell, Group(), lambda: THREADS, Clock())
        finally:
            shutil.rmtree(folder)
        return result(step_ends, [report["trained_tokens"] for report in reports], [item["loss"] for item in reports])

    return play


def run_spec(base: Path, data: Path, output: Path, steps: int) -> RunSpec:
    """The run that the other contestants repeat."""
    return RunSpec(
        job_id="benchmark",
        attempt=1,
        base_model=base.name,
        base_model_path=str(base),
        base_model_digest="",
        dataset_path=str(data),
        dataset_format=DatasetFormat.MESSAGES,
        validation_path=None,
        validation_format=None,
        output_dir=str(output),
        total_steps=steps,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        warmup_ratio=0.0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        context_tokens=CONTEXT_TOKENS,
        seed=SEED,
        num_workers=1,
        checkpoint_steps=10**9,  # none
        over_length_policy=OverLengthPolicy.FAIL,
        lora=Lora(RANK, 2.0 * RANK, 0.0, LINEAR),
    )


def trl(base: Path, data: Path, dtype: torch.dtype, flags: dict[str, Any]) -> Play:
    """TRL's SFTTrainer over the same examples in the same order, from the same adapter, on the same threads."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(THREADS)
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    policy = OverLengthPolicy.FAIL
    examples = prepare(data, DatasetFormat.MESSAGES, tokenizer, CONTEXT_TOKENS, policy).examples
    bare = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, local_files_only=True)
    torch.manual_seed(SEED)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(LINEAR), task_type="CAUSAL_LM")
    model = get_peft_model(bare, lora)
    fresh = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}

    def play(asked: Round) -> Round:
        steps = asked["steps"]
        with torch.no_grad():
            for name, value in model.named_parameters():
                if value.requires_grad:
                    value.copy_(fresh[name])
        step_ends: list[float] = []

        class Clocked(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
            def on_step_end(self, *_: Any, **__: Any) -> None:
                step_ends.append(time.perf_counter())

        folder = tempfile.mkdtemp()
        try:
            trainer = SFTTrainer(
                model=model,
                args=SFTConfig(
                    output_dir=folder,
                    **{"per_device_train_batch_size": BATCH_SIZE, "max_length": CONTEXT_TOKENS} | flags,
                    max_steps=steps,
                    train_sampling_strategy="sequential",
                    learning_rate=LEARNING_RATE,
                    lr_scheduler_type="linear",
                    warmup_steps=0,
                    weight_decay=0.0,
                    max_grad_norm=1.0,
                    completion_only_loss=True,
                    use_cpu=True,
                    bf16=dtype is torch.bfloat16,
                    gradient_checkpointing=False,
                    dataloader_pin_memory=False,
                    logging_steps=1,
                    save_strategy="no",
                    report_to=[],
                    disable_tqdm=True,
                    seed=SEED,
                ),
                train_dataset=Dataset.from_list(rows(examples, steps)),
                processing_class=tokenizer,
                callbacks=[Clocked()],
            )
            trainer.train()
        finally:
            shutil.rmtree(folder)
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        return result(step_ends, [entry["num_tokens"] for entry in logged], [entry["loss"] for entry in logged])

    return play


def rows(examples: Sequence[Example], steps: int) -> list[dict[str, list[int]]]:
    """The examples of so many steps, in the order in which Graft's loop takes them."""
    order = [index for batch in batches(len(examples), BATCH_SIZE, steps, SEED) for index in batch]
    return [
        {
            "input_ids": list(examples[index].token_ids),
            "completion_mask": [int(item) for item in examples[index].loss_mask],
        }
        for index in order
    ]


TRL_FLAGS: dict[str, dict[str, Any]] = {
    "trl-padded": {},
    "trl-padding-free": {"padding_free": True, "max_length": None},
    # A packed row is a batch by itself.
    "trl-packed": {"packing": True, "packing_strategy": "bfd", "max_length": PACKED_TOKENS}
    | {"per_device_train_batch_size": 1},
}


def open_contestant(name: str, base: Path, data: Path) -> Play:
    """`name` is a contestant and a type, as in `trl-packed/float32`."""
    kind, dtype_name = name.split("/")
    dtype: torch.dtype = getattr(torch, dtype_name)
    return graft(base, data, dtype) if kind == "graft" else trl(base, data, dtype, TRL_FLAGS[kind])
