"""What each Ray Train worker does: load the base, attach LoRA, train its share, and on rank 0 save and report.

Gradients are summed with one all-reduce a step over the LoRA parameters alone (a few MB), instead of through DDP's
wrapper: the loop calls the model's body and head apart, which DDP's forward hooks would not see.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from graft.data.prepare import Example, prepare
from graft.domain.resources import DatasetFormat
from graft.training.loop import LoopSettings, StepReport, mean_loss, train
from graft.training.spec import RunSpec

PROBES = 4
"""Examples whose mean log-probability is kept with the adapter, for proof that the engine computes the same."""

Tell = Callable[[str, dict[str, Any]], None]


def run_worker(spec: RunSpec, tell: Tell, *, rank: int, world_size: int) -> None:
    """Trains `spec` as one of `world_size` workers. `tell(kind, data)` is called on rank 0 only."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    torch.manual_seed(spec.seed)
    tokenizer = AutoTokenizer.from_pretrained(spec.base_model_path, local_files_only=True)

    def read(path: str, layout: DatasetFormat) -> tuple[Example, ...]:
        return prepare(Path(path), layout, tokenizer, spec.context_tokens, spec.over_length_policy).examples

    examples = read(spec.dataset_path, spec.dataset_format)
    held_out: tuple[Example, ...] = ()
    if spec.validation_path is not None and spec.validation_format is not None:
        held_out = read(spec.validation_path, spec.validation_format)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    base = AutoModelForCausalLM.from_pretrained(spec.base_model_path, dtype=dtype, local_files_only=True)
    if torch.cuda.is_available():
        base = base.cuda()
    lora = LoraConfig(
        r=spec.lora_rank,
        lora_alpha=spec.lora_alpha,
        lora_dropout=spec.lora_dropout,
        target_modules=list(spec.lora_target_modules),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, lora)
    if rank == 0:
        tell("started", {"message": f"Training on {len(examples)} examples with {world_size} worker(s)."})
    last: list[StepReport] = []

    def on_step(report: StepReport) -> None:
        last[:] = [report]
        if rank != 0:
            return
        tell("metrics", asdict(report))
        if report.step % spec.checkpoint_steps == 0 and report.step < report.total_steps:
            folder = Path(spec.output_dir) / "checkpoints" / f"step-{report.step}"
            _save(model, folder)
            tell("checkpoint", {"step": report.step, "uri": str(folder), "metrics": {"train_loss": report.loss}})

    def reduce(tensor: torch.Tensor) -> None:
        torch.distributed.all_reduce(tensor)

    settings = LoopSettings(
        total_steps=spec.total_steps,
        batch_size=spec.batch_size,
        learning_rate=spec.learning_rate,
        warmup_ratio=spec.warmup_ratio,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        seed=spec.seed,
    )
    train(model, examples, settings, on_step, rank=rank, world_size=world_size, reduce=reduce)
    if rank == 0:
        result: dict[str, Any] = {"train_loss": last[0].loss, "trained_tokens": last[0].trained_tokens}
        if held_out:
            result["validation_loss"] = mean_loss(model, held_out)
        folder = Path(spec.output_dir) / "adapter"
        _save(model, folder, _about(spec, model, held_out or examples))
        result["adapter_bytes"] = (folder / "adapter_model.safetensors").stat().st_size
        tell("finished", result)
    if world_size > 1:
        torch.distributed.barrier()


def _about(spec: RunSpec, model: Any, examples: Sequence[Example]) -> dict[str, Any]:
    probes = []
    for example in examples[:PROBES]:
        start = example.loss_mask.index(True)
        # The prompt up to the first learned token, and everything after it as one completion.
        probe = Example(example.token_ids, [position >= start for position in range(len(example.token_ids))])
        probes.append(
            {
                "prompt_token_ids": example.token_ids[:start],
                "completion_token_ids": example.token_ids[start:],
                "mean_logprob": -mean_loss(model, [probe]),
            }
        )
    return {
        "base_model": spec.base_model,
        "base_model_digest": spec.base_model_digest,
        "job": spec.job_id,
        "attempt": spec.attempt,
        "probes": probes,
    }


def _save(model: Any, folder: Path, about: dict[str, Any] | None = None) -> None:
    """Writes the adapter beside its place and renames it there: a folder of that name is always whole."""
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, safe_serialization=True)
    if about is not None:
        (temporary / "graft.json").write_text(json.dumps(about, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
