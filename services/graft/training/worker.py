"""What each training worker does: load the base, make it trainable, train its share, and on rank 0 save and report.

Does not know Ray: who its companions are, how many threads it may use and whom to tell is passed in.
"""

import heapq
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from graft.domain.errors import InvalidArgument, Unavailable
from graft.domain.jobs import EventLevel, Method
from graft.training.batching import microbatches
from graft.training.heldout import HeldOut
from graft.training.imports import AutoTokenizer, PeftModel
from graft.training.loop import LoopSettings, StepReport, Stop, train
from graft.training.methods import (
    HELD_OUT_EXAMPLES,
    HELD_OUT_TOKENS,
    close,
    learned_from,
    objective_of,
    probe_candidates,
    read_data,
)
from graft.training.objectives.objective import Group
from graft.training.objectives.supervised import mean_loss
from graft.training.packing import check_packing
from graft.training.places import patiently, put, remove, with_files
from graft.training.results import Yardstick, save_result
from graft.training.saving import KEPT_MODELS, save_checkpoint
from graft.training.sharding import shard
from graft.training.spec import RESULTS, Clock, RunSpec, Tell
from graft.training.tuning import load_base, tune, wants_sharding

THREADS_SECONDS = 5.0
"""How often a worker asks how many cores are its own: another run on the node may begin or end."""


@dataclass(frozen=True)
class Measured:
    """The held-out loss as it was measured after a step, before the next one."""

    step: int
    loss: float
    result: dict[str, float]
    """Metrics as the last report would give them if training ended here."""
    save: Callable[[Path], dict[str, float]]
    """Writes below a folder what the run would leave if it ended here, and returns the numbers of that. For results
    that are served as they are trained: other forms use the model up."""


def run_worker(
    spec: RunSpec,
    tell: Tell,
    group: Group,
    threads: Callable[[], int],
    clock: Clock,
    on_measured: Callable[[Measured], None] | None = None,
) -> None:
    """Trains `spec` as one of the group's workers. `tell(kind, data)` reports, and is called on rank 0 only.

    `threads()` tells how many this worker may use now; `on_measured` is called on rank 0 after each measurement of the
    held-out loss and may end training by an exception of its own.

    Raises InvalidArgument or FailedPrecondition when data, base model or hyperparameters are at fault.
    """
    torch.set_num_threads(threads())
    spec = patiently(lambda: with_files(spec), tell if group.rank == 0 else _silent)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not (Path(spec.base_model_path) / "config.json").is_file():
        raise InvalidArgument(
            f"The base model {spec.base_model!r} is not on this node: {spec.base_model_path} has no config.json. "
            "Put Graft's cache where every node sees it, or set storage.url.",
            reason="BASE_MODEL_MISSING",
        )
    tokenizer = AutoTokenizer.from_pretrained(spec.base_model_path, local_files_only=True)

    data, held_out_data = read_data(spec, tokenizer)
    clock.lap("data")

    group = replace(group, sharded=wants_sharding(spec, device, group))
    base = load_base(spec, device, group)
    dtype = base.dtype
    model = tune(spec, base)
    if group.sharded:
        shard(model, device)
    torch.manual_seed(spec.seed + group.rank)  # dropout, if any, must differ
    shortest = heapq.nsmallest(2, data.sequences, key=lambda item: len(item.token_ids))
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
                "message": f"Training on {data.stats.example_count} examples with {workers} of "
                f"{torch.get_num_threads()} threads in {str(dtype).removeprefix('torch.')}"
                + (", the base's blocks spread over them." if group.sharded else "."),
                "startup_seconds": clock.laps,
            },
        )
    settings = LoopSettings(
        total_steps=spec.total_steps,
        batch_size=spec.batch_size,
        learning_rate=spec.learning_rate,
        warmup_ratio=spec.warmup_ratio,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        seed=spec.seed,
    )
    if spec.method is Method.PREFERENCE and group.rank == 0:
        tell("message", {"message": "The model as it is scores the pairs first: it is the reference."})
    objective = objective_of(spec, model, data, learned_from(spec, data), device, group, tell)
    measured = None
    if held_out_data is not None:
        indices = range(len(held_out_data.sequences))
        measured = objective_of(spec, model, held_out_data, indices, device, group, tell)
    held_out = HeldOut(spec, model, measured, group)

    def yardstick() -> Yardstick:
        if held_out_data is not None:
            return Yardstick(held_out_data.sequences, True, held_out.loss)
        first = probe_candidates(objective, data.within(HELD_OUT_EXAMPLES, HELD_OUT_TOKENS))
        return Yardstick(first, False, lambda final: mean_loss(final, first, group.closing))

    def save(folder: Path) -> dict[str, float]:
        mine = tell if group.rank == 0 else _silent
        return save_result(replace(spec, output_dir=str(folder)), model, yardstick(), mine, group)

    follow = _Follower(spec, model, held_out, tell, group, threads, save, on_measured)
    try:
        train(model, objective, settings, follow.on_step, group)
    finally:
        close(objective)
    held_out.restore()
    result = save(Path(spec.output_dir)) if group.rank == 0 or group.sharded else {}
    if group.rank == 0:
        for name in RESULTS:
            if (folder := Path(spec.output_dir) / name).is_dir():
                patiently(partial(put, spec, folder), tell)
        tell("finished", {"message": held_out.summary, **follow.result, **result})
    # Nobody leaves before rank 0 has told the end: a worker that is gone is a failure to those that remain.
    group.reduce(torch.zeros(1))


def _silent(_kind: str, _data: dict[str, Any]) -> None:
    """Whom the other workers tell."""


class _Follower:
    """What happens between steps: reports, checkpoints, threads."""

    def __init__(
        self,
        spec: RunSpec,
        model: Any,
        held_out: HeldOut,
        tell: Tell,
        group: Group,
        threads: Callable[[], int],
        save: Callable[[Path], dict[str, float]],
        on_measured: Callable[[Measured], None] | None,
    ) -> None:
        self._spec = spec
        self._model = model
        self._held_out = held_out
        self._tell = tell
        self._group = group
        self._threads = threads
        self._save = save
        self._on_measured = on_measured
        self._asked = time.monotonic()
        self._models: list[str] = []
        """Checkpoints of whole models in a shared storage."""
        self._trained: dict[str, float] = {}

    @property
    def result(self) -> dict[str, float]:
        """Data of the last report: of training as it was after its last step, and of the held-out data."""
        return self._trained | self._held_out.result

    def on_step(self, report: StepReport) -> None:
        """Called on every worker; the held-out loss is measured by all. Raises Stop when it no longer falls."""
        metrics: dict[str, Any] = asdict(report)
        metrics |= metrics.pop("metrics")
        self._trained = {"train_loss": report.loss, "trained_tokens": report.trained_tokens}
        self._trained |= {f"train_{name}": value for name, value in report.metrics.items()}
        last = report.step == report.total_steps
        measured = self._held_out.after(report)
        metrics |= measured
        stopping = self._held_out.exhausted and not last
        if stopping:
            metrics["remaining_seconds"] = 0.0
        if self._group.rank == 0:
            self._tell("metrics", metrics)
        if report.step % self._spec.checkpoint_steps == 0 and not last:
            self._checkpoint(report.step, metrics)
        if measured and self._on_measured is not None and self._group.rank == 0:
            self._on_measured(Measured(report.step, measured["validation_loss"], self.result, self._save))
        if time.monotonic() - self._asked >= THREADS_SECONDS:
            self._asked = time.monotonic()
            torch.set_num_threads(self._threads())
        if stopping:
            raise Stop

    def _checkpoint(self, step: int, metrics: dict[str, Any]) -> None:
        """Called on every worker: a model that is spread over them is put together by all."""
        folder = Path(self._spec.output_dir) / "checkpoints" / f"step-{step}"
        if self._group.rank == 0 or self._group.sharded:
            save_checkpoint(self._model, Path(self._spec.base_model_path), folder, self._group)
        if self._group.rank:
            return
        try:
            uri = self._put(folder)
        except Unavailable as error:
            text = f"The checkpoint at step {step} is not kept: {error.message}"
            self._tell("message", {"message": text, "level": EventLevel.WARN.value})
            return
        kept = {"train_loss": metrics["loss"]}
        kept |= {name: value for name, value in metrics.items() if name.startswith("validation_")}
        self._tell("checkpoint", {"step": step, "uri": uri, "metrics": kept})

    def _put(self, folder: Path) -> str:
        uri = put(self._spec, folder)
        if self._spec.storage is not None and not isinstance(self._model, PeftModel):
            self._models.append(uri)
            with suppress(Unavailable):  # what stays goes at the next checkpoint
                while len(self._models) > KEPT_MODELS:
                    remove(self._spec, self._models[0])
                    del self._models[0]
        return uri
