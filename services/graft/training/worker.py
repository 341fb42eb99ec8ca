"""What each training worker does: load the base, attach LoRA, train its share, and on rank 0 save and report.

Does not know Ray: who its companions are, how many threads it may use and whom to tell is passed in.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from graft.data.prepare import Example, prepare
from graft.domain.errors import InvalidArgument
from graft.domain.resources import DatasetFormat
from graft.training.batching import microbatches
from graft.training.imports import AutoModelForCausalLM, AutoTokenizer, LoraConfig, get_peft_model
from graft.training.loop import LoopSettings, StepReport, train
from graft.training.lora import fuse
from graft.training.objectives.objective import Group
from graft.training.objectives.supervised import Supervised, mean_loss
from graft.training.packing import PACKED, check_packing
from graft.training.saving import describe, save_adapter
from graft.training.spec import Clock, RunSpec

HELD_OUT_EXAMPLES = 256
"""Held-out loss is measured on the first so many validation examples after each epoch: its standard error is then a
sixteenth of the spread of single losses, and more would take longer than the steps between."""
THREADS_SECONDS = 5.0
"""How often a worker asks how many cores are its own: another run on the node may begin or end."""

SMALL_BASE_BYTES = 32 * 1024 * 1024
"""A base below it is bound by overheads and not by products: bfloat16 would only cost it precision."""

Tell = Callable[[str, dict[str, Any]], None]


def compute_dtype(base_model: Path) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, else float32: on AVX2 bf16 products are 7 to 15 times slower.

    What it gains is in `benchmarks/results/training.json`, both types in one run. LoRA's own weights, gradients and
    optimizer state are float32 in either case.
    """
    if sum(file.stat().st_size for file in base_model.glob("*.safetensors")) < SMALL_BASE_BYTES:
        return torch.float32
    if torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.float32


def run_worker(spec: RunSpec, tell: Tell, group: Group, threads: Callable[[], int], clock: Clock) -> None:
    """Trains `spec` as one of the group's workers. `tell(kind, data)` reports, and is called on rank 0 only.

    `threads()` tells how many this worker may use now.

    Raises InvalidArgument or FailedPrecondition when data, base model or hyperparameters are at fault.
    """
    torch.set_num_threads(threads())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not (Path(spec.base_model_path) / "config.json").is_file():
        raise InvalidArgument(
            f"The base model {spec.base_model!r} is not on this node: {spec.base_model_path} has no config.json. "
            "Put Graft's cache where every node sees it.",
            reason="BASE_MODEL_MISSING",
        )
    tokenizer = AutoTokenizer.from_pretrained(spec.base_model_path, local_files_only=True)

    def read(path: str, layout: DatasetFormat) -> tuple[Example, ...]:
        return prepare(Path(path), layout, tokenizer, spec.context_tokens, spec.over_length_policy).examples

    examples = read(spec.dataset_path, spec.dataset_format)
    held_out: tuple[Example, ...] = ()
    if spec.validation_path is not None and spec.validation_format is not None:
        held_out = read(spec.validation_path, spec.validation_format)[:HELD_OUT_EXAMPLES]
    clock.lap("data")

    base = AutoModelForCausalLM.from_pretrained(
        spec.base_model_path,
        dtype=compute_dtype(Path(spec.base_model_path)),
        attn_implementation=PACKED,
        local_files_only=True,
    ).to(device)
    torch.manual_seed(spec.seed)  # LoRA's A is drawn: every worker must draw the same
    model = get_peft_model(
        base,
        LoraConfig(
            r=spec.lora.rank,
            lora_alpha=spec.lora.alpha,
            lora_dropout=spec.lora.dropout,
            target_modules=list(spec.lora.target_modules),
            task_type="CAUSAL_LM",
        ),
    )
    fuse(model)
    torch.manual_seed(spec.seed + group.rank)  # dropout, if any, must differ
    shortest = sorted(examples, key=lambda item: len(item.token_ids))[:2]
    check_packing(
        model,
        next(microbatches(shortest, most_tokens=2 * spec.context_tokens)).to(device),
        tuple(next(microbatches([example])).to(device) for example in shortest),
    )
    clock.lap("model")
    if group.rank == 0:
        workers = f"{group.world_size} worker" + ("s" if group.world_size > 1 else "")
        tell(
            "started",
            {
                "message": f"Training on {len(examples)} examples with {workers} of {torch.get_num_threads()} threads "
                f"in {str(base.dtype).removeprefix('torch.')}.",
                "startup_seconds": clock.laps,
            },
        )
    follow = _Follower(spec, model, held_out, tell, group, threads)
    settings = LoopSettings(
        total_steps=spec.total_steps,
        batch_size=spec.batch_size,
        learning_rate=spec.learning_rate,
        warmup_ratio=spec.warmup_ratio,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        seed=spec.seed,
    )
    train(model, Supervised(examples, device), settings, follow.on_step, group)
    if group.rank == 0:
        folder = Path(spec.output_dir) / "adapter"
        save_adapter(model, folder, describe(spec, model, held_out or examples))
        tell("finished", {**follow.result, "adapter_bytes": (folder / "adapter_model.safetensors").stat().st_size})
    # Nobody leaves before rank 0 has told the end: a worker that is gone is a failure to those that remain.
    group.reduce(torch.zeros(1))


class _Follower:
    """What happens between steps: reports, held-out loss, checkpoints, threads."""

    def __init__(
        self,
        spec: RunSpec,
        model: Any,
        held_out: tuple[Example, ...],
        tell: Tell,
        group: Group,
        threads: Callable[[], int],
    ) -> None:
        self._spec = spec
        self._model = model
        self._held_out = held_out
        self._tell = tell
        self._group = group
        self._threads = threads
        self._asked = time.monotonic()
        self.result: dict[str, float] = {}
        """Data of the last report."""

    def on_step(self, report: StepReport) -> None:
        """Called on every worker; the held-out loss is measured by all."""
        metrics: dict[str, Any] = asdict(report)
        metrics |= metrics.pop("metrics")
        self.result |= {"train_loss": report.loss, "trained_tokens": report.trained_tokens}
        last = report.step == report.total_steps
        if self._held_out and (report.epoch.is_integer() or last):
            metrics["validation_loss"] = mean_loss(self._model, self._held_out, self._group)
            self.result["validation_loss"] = metrics["validation_loss"]
        if self._group.rank == 0:
            self._tell("metrics", metrics)
            if report.step % self._spec.checkpoint_steps == 0 and not last:
                self._checkpoint(report.step, metrics)
        if time.monotonic() - self._asked >= THREADS_SECONDS:
            self._asked = time.monotonic()
            torch.set_num_threads(self._threads())

    def _checkpoint(self, step: int, metrics: dict[str, Any]) -> None:
        folder = Path(self._spec.output_dir) / "checkpoints" / f"step-{step}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_adapter(self._model, folder)
        kept = {"train_loss": metrics["loss"]}
        if "validation_loss" in metrics:
            kept["validation_loss"] = metrics["validation_loss"]
        self._tell("checkpoint", {"step": step, "uri": str(folder), "metrics": kept})
