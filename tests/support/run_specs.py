"""What a training run on the tiny llama is told, for tests that run it without a job: name what matters to them."""

from typing import Any

from graft.domain.jobs import Lora, OverLengthPolicy
from graft.domain.resources import DatasetFormat
from graft.training.spec import RunSpec


def tiny_run(base: object, dataset: object, output_dir: object, **changes: Any) -> RunSpec:
    """One worker, 12 steps of 8 rows, a checkpoint every 5, LoRA on three layers; paths or URLs as they are printed."""
    given = {
        "job_id": "ft-1",
        "attempt": 1,
        "base_model": "tiny",
        "base_model_path": str(base),
        "base_model_digest": "sha256:b",
        "dataset_path": str(dataset),
        "dataset_format": DatasetFormat.PROMPT_COMPLETION,
        "validation_path": None,
        "validation_format": None,
        "output_dir": str(output_dir),
        "total_steps": 12,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "warmup_ratio": 0.1,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "context_tokens": 64,
        "seed": 0,
        "num_workers": 1,
        "checkpoint_steps": 5,
        "over_length_policy": OverLengthPolicy.DROP,
        "lora": Lora(4, 8.0, 0.0, ("q_proj", "v_proj", "down_proj")),
    }
    return RunSpec(**(given | changes))


def validated_on(dataset: object) -> dict[str, Any]:
    """The changes that measure the held-out loss on a data set."""
    return {"validation_path": str(dataset), "validation_format": DatasetFormat.PROMPT_COMPLETION}
