"""A base model's sizes, and how many parameters follow from them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Shape":
        """Of the content of a `config.json`. Raises KeyError, TypeError or ValueError when it does not tell."""
        heads = int(config["num_attention_heads"])
        width = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
        return cls(
            blocks=int(config["num_hidden_layers"]),
            hidden=int(config["hidden_size"]),
            intermediate=int(config["intermediate_size"]),
            query=heads * width,
            key=int(config.get("num_key_value_heads") or heads) * width,
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
        )

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
