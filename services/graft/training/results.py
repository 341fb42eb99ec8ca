"""What a run leaves: the trained model in the form in which it is served, and what that form costs.

    adapter          adapter/                        as PEFT saves it
    low_rank_delta   adapter/ and model/             of a base whose own weights trained
                     adapter/ and trained_adapter/   of DoRA and `modules_to_save`
    merged_model     model/, and trained_adapter/ of an adapter

Each `graft.json` holds probes that were scored by what is served from its folder. Does not train.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graft.data.prepare import Example
from graft.domain.jobs import Lora, ServedAs
from graft.training.delta import BaseWeights, Delta, become, extract, write_delta
from graft.training.imports import PeftModel
from graft.training.objectives.objective import ALONE, Group
from graft.training.saving import describe, save_adapter, save_model, write_whole
from graft.training.spec import ADAPTER, MODEL, TRAINED_ADAPTER, RunSpec, Tell
from graft.training.tuning import load_base


@dataclass(frozen=True)
class Yardstick:
    """What a model is measured on once it is trained."""

    examples: Sequence[Example]
    """The probes are chosen among them."""
    held_out: bool
    """Whether they are validation examples; else they are of the training data."""
    loss: Callable[[Any], float]
    """Of a model, in nats; without other workers, unless it is spread over them."""

    def __str__(self) -> str:
        return f"the {'validation' if self.held_out else 'training'} data's first {len(self.examples)} examples"


def save_result(spec: RunSpec, model: Any, yardstick: Yardstick, tell: Tell, group: Group = ALONE) -> dict[str, float]:
    """Writes the run's folders below `spec.output_dir` and returns the numbers that its last report adds.

    `model` is used up: it may end as what is served, or as nothing that may be used. Called by all workers of a sharded
    group, of which rank 0 writes and has the numbers; else by rank 0 alone.
    """
    root = Path(spec.output_dir)
    if spec.served_as is ServedAs.ADAPTER:
        _save_as_adapter(spec, model, yardstick.examples, group)
        return {"adapter_bytes": _weights_bytes(root / ADAPTER)}
    if isinstance(model, PeftModel):
        save_adapter(model, root / TRAINED_ADAPTER)
        model = model.float().merge_and_unload()  # in bfloat16 the sum would lose most of the change
        whole = spec.served_as is ServedAs.MERGED_MODEL
    else:
        whole = True
    result: dict[str, float] = {}
    if whole:
        save_model(
            model,
            Path(spec.base_model_path),
            root / MODEL,
            describe(spec, model, yardstick.examples),
            spec.task_definition,
            group,
        )
        result["model_bytes"] = _weights_bytes(root / MODEL)
    if spec.served_as is ServedAs.LOW_RANK_DELTA:
        result |= _save_as_delta(spec, model, yardstick, tell, group)
    return result


def _save_as_adapter(spec: RunSpec, model: Any, probes: Sequence[Example], group: Group) -> None:
    folder = Path(spec.output_dir) / ADAPTER
    if spec.lora.base_quantization:
        # Trained over a rounded base and served over the base as it is: the probes must be of the latter.
        save_adapter(model, folder)
        plain = replace(spec, lora=Lora(), start_from=None)
        served = PeftModel.from_pretrained(load_base(plain, next(model.parameters()).device), folder)
        save_adapter(served, folder, describe(spec, served, probes), spec.task_definition)
    else:
        save_adapter(model, folder, describe(spec, model, probes), spec.task_definition, group)


def _save_as_delta(spec: RunSpec, model: Any, yardstick: Yardstick, tell: Tell, group: Group) -> dict[str, float]:
    folder = Path(spec.output_dir) / ADAPTER
    trained_loss = yardstick.loss(model)
    base = BaseWeights(Path(spec.base_model_path), model)
    delta = extract(model, base, spec.delta_rank)
    become(model, base, delta)
    served_loss = yardstick.loss(model)
    about = describe(spec, model, yardstick.examples)
    if group.rank == 0:
        write_whole(folder, lambda at: write_delta(delta, spec.base_model_path, at), about, spec.task_definition)
    result = {
        "adapter_bytes": _weights_bytes(folder),
        "delta_retained_fraction": delta.retained_fraction,
        "delta_loss_change": served_loss - trained_loss,
    }
    if yardstick.held_out:
        result["validation_loss"] = trained_loss
    text = _tell_delta(delta)
    text += f" Its loss on {yardstick} is {served_loss:.4f}, and {trained_loss:.4f} as it was trained."
    tell("message", {"message": text, **result})
    return result


def _tell_delta(delta: Delta) -> str:
    text = f"As an adapter of rank {delta.rank} it keeps {delta.retained_fraction:.1%} of the weights' squared change"
    if delta.worst_module:
        text += f" (least in {delta.worst_module}: {delta.worst_fraction:.1%})"
    if delta.lost:
        text += f"; of {', '.join(delta.lost)} an adapter keeps nothing"
    return f"{text}."


def _weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
