"""A weight change as an adapter: what of it fits into low-rank factors, and how much that is.

    W' - W  ≈  B A,   A of rank R by inputs, B of outputs by rank R        (the truncated singular value decomposition)

Each linear layer of the decoder gets its own factors, saved as a PEFT adapter with alpha = rank, so a scale of 1. What
changed elsewhere (norms, embeddings, the head) no adapter carries: it counts as lost. Owns reading the base's weights
one by one, so that a second model is never in memory. Does not know what was trained, or how.
"""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graft.training.imports import LoraConfig
from graft.training.sharding import assign, whole

POWER_ITERATIONS = 4
"""With twice the rank as width, of `torch.svd_lowrank`. For 576 by 1536 at rank 64 it keeps less than the best rank-64
factors by 1% of what they keep where the spectrum is flat (noise, the worst case) and by 1e-7 where it decays; 0.06 s a
matrix on one core, where the whole decomposition takes 0.25 s, and 13 s for all of a 135M llama's."""
BLOCK = re.compile(r"\.(\d+)\.")


class BaseWeights:
    """The base model's weights by the names that the model in memory gives them, read when they are asked for."""

    def __init__(self, folder: Path, model: Any) -> None:
        from safetensors import safe_open

        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file: Any = safe_open(str(path), framework="pt")
            self._files |= dict.fromkeys(file.keys(), file)
        embedding = model.get_input_embeddings().weight
        self._embedding = next(name for name, parameter in model.named_parameters() if parameter is embedding)

    def __getitem__(self, name: str) -> torch.Tensor:
        """In float32, on the CPU. A head that the base does not have apart is its embedding."""
        stored = name if name in self._files else self._embedding
        return self._files[stored].get_tensor(stored).float()


@dataclass(frozen=True)
class Delta:
    """Low-rank factors of a model's change."""

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """Module name → A of (R, inputs) and B of (outputs, R)."""
    rank: int
    blocks: tuple[int, ...]
    """Indices of the blocks that changed; all when none did."""
    all_blocks: bool
    retained_fraction: float
    """Of the squared Frobenius norm of the whole change. 1 when nothing changed."""
    worst_module: str
    worst_fraction: float
    """The same of the linear layer that loses most."""
    lost: tuple[str, ...]
    """Changed parameters that no adapter carries, a block's number as `*`."""


def factor(change_O_I: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of the best rank-R approximation B A of a change, equally large, padded with zeros where R is more than
    the change has dimensions. The approximation is a projection, exact for a change of that rank or less."""
    fitting = min(rank, *change_O_I.shape)
    if 2 * fitting >= min(change_O_I.shape):
        left_O_R = torch.linalg.svd(change_O_I, full_matrices=False)[0][:, :fitting]
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left_O_R = torch.svd_lowrank(change_O_I, q=2 * fitting, niter=POWER_ITERATIONS)[0][:, :fitting]
    right_R_I = left_O_R.T @ change_O_I
    size_R = right_R_I.norm(dim=1).sqrt()
    a_R_I = change_O_I.new_zeros(rank, change_O_I.shape[1])
    b_O_R = change_O_I.new_zeros(change_O_I.shape[0], rank)
    a_R_I[:fitting] = right_R_I / size_R.clamp(min=torch.finfo(size_R.dtype).tiny)[:, None]
    b_O_R[:, :fitting] = left_O_R * size_R
    return a_R_I, b_O_R


@torch.no_grad()  # type: ignore[untyped-decorator] # torch is untyped to mypy here
def extract(model: Any, base: BaseWeights, rank: int) -> Delta:
    """The change of a model, in float32 and without adapters, against its base. Of a model that is spread over workers,
    by all of them, each with one parameter after the other whole."""
    linear = dict(_linear(model))
    total = kept_of_all = 0.0
    fractions: dict[str, float] = {}
    factors = {}
    lost: dict[str, None] = {}
    for name, parameter in model.named_parameters():
        change = whole(parameter.detach()) - base[name].to(parameter.device)
        size = _squared(change)
        total += size
        module = name.removesuffix(".weight")
        if size and module not in linear:
            lost[BLOCK.sub(".*.", name)] = None
        elif size:
            a_R_I, b_O_R = factor(change, rank)
            factors[module] = (a_R_I.cpu(), b_O_R.cpu())
            kept = max(0.0, size - _squared(change - b_O_R @ a_R_I))
            kept_of_all += kept
            fractions[module] = kept / size
    every = sorted({_block(module) for module in linear})
    blocks = sorted({_block(module) for module in factors}) or every
    for module, layer in linear.items():
        # A module's block changed, and it did not: PEFT's configuration names modules and blocks, not pairs of them.
        if _block(module) in blocks and module not in factors:
            factors[module] = (torch.zeros(rank, layer.in_features), torch.zeros(layer.out_features, rank))
    worst = min(fractions, key=lambda module: fractions[module], default="")
    return Delta(
        factors=factors,
        rank=rank,
        blocks=tuple(blocks),
        all_blocks=blocks == every,
        retained_fraction=kept_of_all / total if total else 1.0,
        worst_module=worst,
        worst_fraction=fractions.get(worst, 1.0),
        lost=tuple(lost),
    )


@torch.no_grad()  # type: ignore[untyped-decorator] # torch is untyped to mypy here
def become(model: Any, base: BaseWeights, delta: Delta) -> None:
    """Makes `model` what is served with the adapter: the base's weights plus the delta, and nothing else of it."""
    for name, parameter in model.named_parameters():
        served = base[name].to(parameter.device)
        factors = delta.factors.get(name.removesuffix(".weight"))
        if factors is not None:
            a_R_I, b_O_R = (side.to(parameter.device) for side in factors)
            served = served + b_O_R @ a_R_I
        assign(parameter, served)


def write_delta(delta: Delta, base_model_path: str, folder: Path) -> None:
    """Writes the two files of a PEFT adapter into `folder`, which is made anew."""
    from safetensors.torch import save_file

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    LoraConfig(
        r=delta.rank,
        lora_alpha=delta.rank,
        target_modules=sorted({module.rpartition(".")[2] for module in delta.factors}),
        layers_to_transform=None if delta.all_blocks else list(delta.blocks),
        base_model_name_or_path=base_model_path,
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).save_pretrained(str(folder))
    tensors = {
        f"base_model.model.{module}.lora_{side}.weight": tensor.contiguous()
        for module, factors in delta.factors.items()
        for side, tensor in zip("AB", factors, strict=True)
    }
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


def _linear(model: Any) -> Iterator[tuple[str, Any]]:
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            yield name, module


def _block(module: str) -> int:
    found = BLOCK.search(module)
    return int(found[1]) if found else -1


def _squared(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().sum())
