"""Causal attention within each example of a packed row, and the losses of such a row.

Everything in a decoder but attention works token by token, so examples that lie in one row need no padding as long
as attention stays within each. It is registered with transformers under the name PACKED; a mask of N by N is never
made. Does not know batches or gradients.
"""

from itertools import groupby
from typing import Any

import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from graft.domain.errors import FailedPrecondition
from graft.training.batching import Packed
from graft.training.imports import ALL_ATTENTION_FUNCTIONS

PACKED = "graft_packed"
"""Value of a model's `attn_implementation`."""


def packed_attention(
    _module: Any,
    query_1_H_N_D: torch.Tensor,
    key_1_G_N_D: torch.Tensor,
    value_1_G_N_D: torch.Tensor,
    _attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    lengths: tuple[int, ...] = (),
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attends within each of the row's examples; H query heads share G key heads. Returns (1, N, H, D).

    Examples of one length are one call. Without `lengths` the row is one example.
    """
    heads, tokens = query_1_H_N_D.shape[1:3]
    repeats = heads // key_1_G_N_D.shape[1]
    lengths = lengths or (tokens,)
    answers = []
    start = 0
    for length, alike in groupby(lengths):
        count = len(list(alike))
        end = start + count * length

        def cut(tensor: torch.Tensor, times: int, here: slice, shape: tuple[int, int]) -> torch.Tensor:
            part = tensor[0, :, here].unflatten(1, shape).transpose(0, 1)
            return part.repeat_interleave(times, dim=1) if times > 1 else part

        here, shape = slice(start, end), (count, length)
        answer_B_H_T_D = scaled_dot_product_attention(
            cut(query_1_H_N_D, 1, here, shape),
            cut(key_1_G_N_D, repeats, here, shape),
            cut(value_1_G_N_D, repeats, here, shape),
            dropout_p=dropout,
            scale=scaling,
            is_causal=True,
        )
        answers.append(answer_B_H_T_D.transpose(1, 2).flatten(0, 1))
        start = end
    return torch.cat(answers)[None], None


ALL_ATTENTION_FUNCTIONS.register(PACKED, packed_attention)


def token_losses(model: Any, packed: Packed) -> torch.Tensor:
    """Cross-entropy of every token with loss, in nats, shape (K,). `model` as for `token_logits`."""
    return cross_entropy(token_logits(model, packed), packed.targets_K, reduction="none")


def token_logits(model: Any, packed: Packed) -> torch.Tensor:
    """What every token with loss is predicted by, in float32, shape (K, V).

    `model`: a causal language model of transformers with PACKED attention, bare or with LoRA. Its head is applied to
    the K predicting positions alone: over a vocabulary of 49,152 it costs as much as ten layers of a 135M base.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if causal.config._attn_implementation != PACKED:
        raise ValueError(f"The model's attention is {causal.config._attn_implementation!r} instead of {PACKED!r}.")
    hidden_1_N_D = causal.get_decoder()(
        input_ids=packed.token_ids_N[None],
        position_ids=packed.positions_N[None],
        use_cache=False,
        lengths=packed.lengths,
    ).last_hidden_state
    logits_K_V = causal.get_output_embeddings()(hidden_1_N_D[0, packed.predicting_K])
    return logits_K_V.float()


def check_packing(model: Any, together: Packed, alone: tuple[Packed, ...]) -> None:
    """Raises FailedPrecondition if examples in one row see each other: an architecture may ignore `lengths`."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        mixed = token_losses(model, together)
        single = torch.cat([token_losses(model, packed) for packed in alone])
    model.train(was_training)
    difference = float((mixed - single).abs().max()) if len(mixed) else 0.0
    # float32 differs by 1e-5 and bfloat16 by some hundredths; attention across examples by tenths to whole nats.
    if difference > (1e-3 if next(model.parameters()).dtype == torch.float32 else 0.25):
        raise FailedPrecondition(
            f"{type(model).__name__} computes other losses (by {difference:.2f} nats) for examples in one row than for "
            "each alone, so it cannot be trained with packed examples. Use a base model of another architecture.",
            reason="PACKING_UNSUPPORTED",
        )
