"""Whether a training fits: the shape that a base's folder tells, and what a node has for it.

What training needs is estimated in `graft.domain.memory`. Imports neither torch nor Ray.
"""

import json
from pathlib import Path

from graft.domain.errors import FailedPrecondition, InvalidArgument
from graft.domain.jobs import LastLayers, Memory
from graft.domain.shapes import Shape


def read_shape(base_model: Path) -> Shape:
    """The shape that the folder's `config.json` tells. Raises FailedPrecondition when it does not."""
    try:
        return Shape.of(json.loads((base_model / "config.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FailedPrecondition(
            f"{base_model.name}/config.json does not tell the shape of a llama ({type(error).__name__}: {error}).",
            reason="BASE_MODEL_INVALID",
        ) from error


def check_blocks(shape: Shape, base_model: str, last_layers: LastLayers) -> None:
    """Raises InvalidArgument unless the base has as many blocks as are to be trained."""
    if last_layers.blocks > shape.blocks:
        raise InvalidArgument(
            f"last_layers.blocks asks for the last {last_layers.blocks} blocks, and {base_model} has {shape.blocks}. "
            f"Use 1 to {shape.blocks}; tuning: full changes the embeddings as well.",
            reason="TOO_MANY_BLOCKS",
        )


def check_memory(needed: Memory, available_bytes: int) -> None:
    """Raises FailedPrecondition DOES_NOT_FIT when training needs more than there is."""
    if needed.total_bytes > available_bytes:
        raise FailedPrecondition(
            f"Training needs about {needed} in a worker, and this node has {available_bytes / 1e9:.3g} GB. Tune fewer "
            "parameters (tuning: lora), use a smaller base model or a larger node, or spread the base over more "
            "workers (num_workers with sharding: always).",
            reason="DOES_NOT_FIT",
            metadata={"needed_bytes": str(needed.total_bytes), "available_bytes": str(available_bytes)},
        )
