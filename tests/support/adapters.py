"""Random PEFT adapters for the tiny llama, as files: what training leaves behind, without training."""

import json
from pathlib import Path
from typing import Any

from graft.domain.resources import BaseModel

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tiny_base(folder: Path, digest: str = "sha256:tiny") -> BaseModel:
    """The tiny llama of `tiny_llama.make_tiny_llama` as a base model."""
    return BaseModel(
        id="tiny",
        path=str(folder),
        digest=digest,
        parameter_count=400_000,
        size_bytes=1_400_000,
        context_tokens=512,
        license="Apache-2.0",
        source="tests",
        target_modules=TARGETS,
        max_lora_rank=64,
    )


def make_adapter(
    base: Path,
    folder: Path,
    *,
    seed: int = 0,
    rank: int = 8,
    scale: float = 0.3,
    targets: tuple[str, ...] = TARGETS,
    config: dict[str, Any] | None = None,
) -> Path:
    """Writes an adapter of normal weights, strong enough to change greedy answers, and returns its folder."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    with safe_open(base / "model.safetensors", framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118  # not a dict
            if name.split(".")[-2] not in targets:
                continue
            outputs, inputs = weights.get_slice(name).get_shape()
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * scale
            tensors[f"{module}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * scale
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "target_modules": list(targets),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings | (config or {})))
    return folder
