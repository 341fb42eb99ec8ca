"""Makes a smaller base model from a larger one: cuts depth, then heals it by next-token training on raw text.

A process of its own, which `graft.registry.derive` starts through `graft.child`: its last report is `finished` or
`failed`. Does not know the catalogue.
"""

import hashlib
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from graft.child import receive, tell
from graft.data.prepare import Example
from graft.data.raw_text import default_source, python_documentation, read_documents, sequences
from graft.domain.errors import FailedPrecondition, InvalidArgument
from graft.domain.jobs import LastLayers, Lora, Tuning
from graft.domain.memory import FLOAT_BYTES, memory_bytes
from graft.registry.facts import LINEAGE
from graft.training.batching import microbatches
from graft.training.depth import angular_distances, by_angle, cut, evenly
from graft.training.failures import failure
from graft.training.imports import AutoModelForCausalLM, AutoTokenizer
from graft.training.loop import LoopSettings, StepReport, Stop, train
from graft.training.memory import read_shape
from graft.training.objectives.supervised import Supervised, mean_loss
from graft.training.packing import PACKED, token_losses
from graft.training.tuning import node_memory_bytes

SEQUENCE_TOKENS = 512
"""Of one document each. Longer ones cost more attention for a budget that is spent in minutes."""
BATCH_SEQUENCES = 2
"""1,024 tokens a step: more would leave too few steps in that budget."""
LEARNING_RATE = 3e-4
MEASURED_SEQUENCES = 24
"""Held-out sequences whose loss is told (12,000 tokens at most): a few seconds, three times."""
SAMPLED_SEQUENCES = 16
"""Sequences on which the angles are measured: they differ between blocks by far more than between samples."""
MOST_TOKENS_A_SECOND = 20_000
"""No more text than this is read for each second of healing."""


@dataclass(frozen=True)
class Order:
    """What to make."""

    base: str
    base_digest: str
    base_folder: str
    output: str
    """Folder to fill; it exists and is empty."""
    layers: int
    """Blocks to keep."""
    choose: str
    """`angle` or `even`."""
    text: str
    """A text or JSONL file; empty for Python's own documentation."""
    tokens: int
    """Most tokens to heal with; 0 for as many as the time allows."""
    seconds: float
    """Longest healing."""
    seed: int = 0


def derive(order: Order) -> dict[str, Any]:
    """Makes the model in `order.output`; returns its lineage.

    Raises FailedPrecondition when the memory does not suffice, InvalidArgument when there is too little text.
    """
    check_fits(order, node_memory_bytes(_device()))
    tell("phase", message=f"Loading {order.base}.")
    tokenizer = AutoTokenizer.from_pretrained(order.base_folder, local_files_only=True)
    model = _load(order.base_folder)
    learned, held_out, text = _read(order, tokenizer)
    tell("phase", message=f"Text: {text}, {_tokens(learned):,} tokens to learn, {_tokens(held_out):,} held out.")
    before = mean_loss(model, held_out)
    kept, by = _choose(order, model, learned)
    cut(model, kept)
    after_cut = mean_loss(model, held_out)
    told = {"perplexity_before": _perplexity(before), "perplexity_after_cut": _perplexity(after_cut)}
    tell("cut", kept=kept, chosen_by=by, **told)
    healed_tokens = _heal(order, model, learned)
    model.to(_stored_type(Path(order.base_folder))).save_pretrained(order.output)
    _copy_tokenizer(Path(order.base_folder), Path(order.output))
    del model
    # From the disk, as everybody will have it: the type there is often 16 bits wide.
    after = mean_loss(_load(order.output), held_out)
    return {
        "from": order.base,
        "digest": order.base_digest,
        "layers_kept": kept,
        "chosen_by": by,
        "text": text,
        "text_digest": _text_digest(order),
        "tokens_healed": healed_tokens,
        "held_out_tokens": _tokens(held_out),
        "perplexity": {
            "before_cut": _perplexity(before),
            "after_cut": _perplexity(after_cut),
            "after_healing": _perplexity(after),
        },
    }


def _load(folder: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=PACKED, local_files_only=True
    )
    return model.to(_device())


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_fits(order: Order, available_bytes: int) -> None:
    """Raises FailedPrecondition DOES_NOT_FIT unless the base model can be loaded, and what is kept of it trained."""
    shape = read_shape(Path(order.base_folder))
    kept = memory_bytes(replace(shape, blocks=order.layers), Tuning.FULL, Lora(), LastLayers())
    whole_bytes = shape.parameters * FLOAT_BYTES
    if max(whole_bytes, kept.total_bytes) > available_bytes:
        raise FailedPrecondition(
            f"Loading {order.base} needs about {whole_bytes / 1e9:.3g} GB and healing {order.layers} layers of it "
            f"{kept}, and there are {available_bytes / 1e9:.3g} GB. Keep fewer --layers, take a smaller base model, or "
            "a larger machine.",
            reason="DOES_NOT_FIT",
            metadata={"needed_bytes": str(kept.total_bytes), "available_bytes": str(available_bytes)},
        )


def _text_digest(order: Order) -> str:
    """Empty for Python's own documentation, which its version tells."""
    if not order.text:
        return ""
    with open(order.text, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _read(order: Order, tokenizer: Any) -> tuple[list[Example], list[Example], str]:
    documents = read_documents(Path(order.text)) if order.text else python_documentation()
    most = order.tokens or int(order.seconds * MOST_TOKENS_A_SECOND)
    learned, held_out = sequences(documents, tokenizer, SEQUENCE_TOKENS, most, MEASURED_SEQUENCES)
    if len(learned) < BATCH_SEQUENCES or not held_out:
        raise InvalidArgument(
            f"The text gives {len(learned)} sequences of {SEQUENCE_TOKENS} tokens to learn from and {len(held_out)} to "
            "measure on. Give more text (--data), some hundred kilobytes at least, or more --tokens.",
            reason="TEXT_TOO_SHORT",
        )
    return learned, held_out, Path(order.text).name if order.text else default_source()


def _choose(order: Order, model: Any, learned: Sequence[Example]) -> tuple[list[int], str]:
    """The blocks to keep, and by what. Evenly also where the angles are no numbers: broken weights, say."""
    blocks = len(model.get_decoder().layers)
    if order.choose == "even":
        return evenly(blocks, order.layers), "even"
    device = next(model.parameters()).device
    rows = [row.to(device) for row in microbatches(learned[:SAMPLED_SEQUENCES])]
    distances = angular_distances(model, rows)
    if not all(map(math.isfinite, distances)):
        return evenly(blocks, order.layers), "even"
    return by_angle(distances, order.layers), "angle"


def _heal(order: Order, model: Any, learned: Sequence[Example]) -> int:
    """Trains every parameter; returns the tokens seen."""
    model.requires_grad_(True)
    device = next(model.parameters()).device
    batch = learned[:BATCH_SEQUENCES]
    _gradient(model, batch, device)  # the first also pays for memory that the others find there
    started = time.monotonic()
    _gradient(model, batch, device)
    tokens_per_second = _tokens(batch) / (time.monotonic() - started)
    most = tokens_per_second * order.seconds
    tokens = min(most, order.tokens) if order.tokens else most
    steps = max(1, round(tokens / (_tokens(learned) / len(learned) * BATCH_SEQUENCES)))
    tell("phase", message=f"Healing for {steps} steps, at about {tokens_per_second:.0f} tokens/s.")
    deadline = time.monotonic() + order.seconds
    seen = 0

    def on_step(report: StepReport) -> None:
        nonlocal seen
        seen = report.trained_tokens
        tell("step", **asdict(report))
        if time.monotonic() > deadline and report.step < steps:
            tell("phase", message=f"The time is up after {seen:,} tokens.")
            raise Stop

    settings = LoopSettings(
        total_steps=steps,
        batch_size=BATCH_SEQUENCES,
        learning_rate=LEARNING_RATE,
        warmup_ratio=0.1,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=order.seed,
    )
    train(model, Supervised(learned, device), settings, on_step)
    return seen


def _gradient(model: Any, batch: Sequence[Example], device: torch.device) -> None:
    """One forward and backward pass, for its time."""
    for packed in microbatches(batch):
        loss = token_losses(model, packed.to(device)).mean()
        loss.backward()
        loss.item()  # waits for a device that works on its own
    model.zero_grad()


def _tokens(examples: Sequence[Example]) -> int:
    return sum(len(example.token_ids) for example in examples)


def _perplexity(loss: float) -> float:
    return round(math.exp(min(loss, 700.0)), 4)  # beyond it a float is infinite, which JSON has no word for


def _stored_type(folder: Path) -> torch.dtype:
    from safetensors import safe_open

    with safe_open(min(folder.glob("*.safetensors")), framework="pt") as file:
        dtype: torch.dtype = file.get_tensor(next(iter(file.keys()))).dtype
    return dtype


def _copy_tokenizer(source: Path, target: Path) -> None:
    """As they are, whatever the tokenizer's class: everything small that does not describe the weights."""
    for file in source.iterdir():
        weights = file.suffix in (".safetensors", ".bin", ".gguf") or file.name.endswith(".index.json")
        if file.is_file() and not weights and not (target / file.name).exists() and file.name != LINEAGE:
            shutil.copyfile(file, target / file.name)


def main() -> int:
    """Exit code 0 after `finished`, 1 after `failed`."""
    order = Order(**receive(lambda given: shutil.rmtree(given["output"], ignore_errors=True)))
    try:
        lineage = derive(order)
    except BrokenPipeError:
        return 1
    except Exception as error:  # noqa: BLE001 - told to the parent, whatever it is
        import traceback

        traceback.print_exc()
        tell("failed", **failed(error, order))
        return 1
    tell("finished", lineage=lineage)
    return 0


def failed(error: Exception, order: Order) -> dict[str, Any]:
    """Data of a `failed` report: what a job would say, in the words of this command."""
    told = failure(error, "standard error")
    detail = str(error).strip().splitlines() or ["no message"]
    others = {
        "OUT_OF_MEMORY": "There is too little memory to heal it. Keep fewer --layers, take a smaller base model, or "
        "a larger machine.",
        "DISK_FULL": f"The disk of {Path(order.output).parent} is full. Free some space, then derive again.",
        "LOSS_NOT_FINITE": f"Healing diverged: its loss is no number any more. Try another text (--data); "
        f"otherwise the weights of {order.base} are at fault.",
        "TRAINING_FAILED": f"Deriving failed with {type(error).__name__}: {detail[0]}",
    }
    reason = "DERIVE_FAILED" if told["reason"] == "TRAINING_FAILED" else told["reason"]
    return told | {"reason": reason, "message": others.get(told["reason"], told["message"])}


if __name__ == "__main__":
    sys.exit(main())
