"""How much memory a worker needs to train, from the base model's shape alone. Pure; imports neither torch nor Ray.

An estimate, told before anything is loaded: float32 throughout, as where the hardware multiplies nothing smaller.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from graft.domain.errors import FailedPrecondition, InvalidArgument
from graft.domain.jobs import LastLayers, Lora, Tuning

MICROBATCH_TOKENS = 1024
"""Tokens in one forward pass. What backward needs kept is some 1.7 MB a token at 135M parameters in float32: 1.7 GB.
Speed has levelled off long before."""

FLOAT_BYTES = 4
QUANTIZED_BYTES = 0.55
"""A weight in nf4, with its block's scale (Dettmers et al. 2023, arXiv:2305.14314, section 3: 4.127 bits and what stays
in 16)."""


@dataclass(frozen=True)
class Shape:
    """A llama's sizes, from its `config.json`."""

    blocks: int
    hidden: int
    intermediate: int
    query: int
    """Outputs of the query projection: heads times the width of one."""
    key: int
    """Outputs of the key projection, and of the value projection."""
    vocabulary: int
    tied: bool
    """Whether the head is the embedding."""

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of a block's linear layers."""
        return {
            "q_proj": (self.query, self.hidden),
            "k_proj": (self.key, self.hidden),
            "v_proj": (self.key, self.hidden),
            "o_proj": (self.hidden, self.query),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    @property
    def block_parameters(self) -> int:
        """Of one block: its linear layers and two norms."""
        return sum(outputs * inputs for outputs, inputs in self.linear.values()) + 2 * self.hidden

    @property
    def head_parameters(self) -> int:
        """Of the head, and of the embedding."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.blocks * self.block_parameters + self.head_parameters * (1 if self.tied else 2) + self.hidden


@dataclass(frozen=True)
class Memory:
    """What a worker holds while it trains, in bytes."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int

    @property
    def total_bytes(self) -> int:
        """All together."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes

    def __str__(self) -> str:
        """For people: `3.8 GB (weights 0.5, gradients 0.5, AdamW 1.1, activations 1.7)`."""
        parts = (
            ("weights", self.weights_bytes),
            ("gradients", self.gradients_bytes),
            ("AdamW", self.optimizer_bytes),
            ("activations", self.activations_bytes),
        )
        return f"{self.total_bytes / 1e9:.3g} GB ({', '.join(f'{name} {size / 1e9:.2g}' for name, size in parts)})"


def read_shape(base_model: Path) -> Shape:
    """The shape that the folder's `config.json` tells. Raises FailedPrecondition when it does not."""
    try:
        config = json.loads((base_model / "config.json").read_text())
        heads = int(config["num_attention_heads"])
        width = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
        return Shape(
            blocks=int(config["num_hidden_layers"]),
            hidden=int(config["hidden_size"]),
            intermediate=int(config["intermediate_size"]),
            query=heads * width,
            key=int(config.get("num_key_value_heads") or heads) * width,
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FailedPrecondition(
            f"{base_model.name}/config.json does not tell the shape of a llama ({type(error).__name__}: {error}).",
            reason="BASE_MODEL_INVALID",
        ) from error


def trained_parameters(shape: Shape, tuning: Tuning, lora: Lora, last_layers: LastLayers) -> int:
    """How many parameters change."""
    head = shape.head_parameters
    if tuning is Tuning.FULL:
        return shape.parameters
    if tuning is Tuning.LAST_LAYERS:
        blocks = last_layers.blocks * shape.block_parameters
        return blocks + shape.hidden + (head if last_layers.train_head else 0)
    sides = [sum(sizes) for name, sizes in shape.linear.items() if name in lora.target_modules]
    return shape.blocks * lora.rank * sum(sides) + (head if lora.modules_to_save else 0)


def memory_bytes(shape: Shape, tuning: Tuning, lora: Lora, last_layers: LastLayers) -> Memory:
    """What training needs: weights, gradients, AdamW's two moments, and the activations of one microbatch.

    A block keeps about ten vectors of the hidden width a token and four of the intermediate one for its backward pass;
    the head keeps logits, their softmax and its gradient. Blocks below the first that trains keep nothing. `lora` and
    `last_layers` with every value concrete.
    """
    trained = trained_parameters(shape, tuning, lora, last_layers)
    own = shape.head_parameters if lora.modules_to_save or (last_layers.train_head and shape.tied) else 0
    weights = shape.parameters * (QUANTIZED_BYTES if lora.base_quantization else FLOAT_BYTES) + own * FLOAT_BYTES
    if tuning is Tuning.LORA:
        weights += (trained - own) * FLOAT_BYTES
    blocks = last_layers.blocks if tuning is Tuning.LAST_LAYERS else shape.blocks
    token_floats = blocks * (10 * shape.hidden + 4 * shape.intermediate) + 3 * shape.vocabulary
    return Memory(
        weights_bytes=int(weights),
        gradients_bytes=trained * FLOAT_BYTES,
        optimizer_bytes=2 * trained * FLOAT_BYTES,
        activations_bytes=MICROBATCH_TOKENS * token_floats * FLOAT_BYTES,
    )


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
            "parameters (tuning: lora), use a smaller base model, or a larger node.",
            reason="DOES_NOT_FIT",
            metadata={"needed_bytes": str(needed.total_bytes), "available_bytes": str(available_bytes)},
        )
