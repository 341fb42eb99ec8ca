"""LoRA on a CPU, one matrix product an adapter: rows of a batch are grouped by adapter once a step.

vLLM's own kernels gather a whole A and B for every token, and index the last slot for rows without an adapter (their
index is -1), so that base requests in a mixed batch answer as the adapter in that slot. Here such rows are in no group.
"""

from typing import Any, TypeAlias

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

Rows: TypeAlias = "slice | torch.Tensor"
"""Contiguous rows as a slice, which needs no copy; others as an index tensor."""


def group_rows(slots: list[int]) -> list[tuple[int, Rows]]:
    """`(slot, rows)` of every adapter in a batch; rows with slot -1 (no adapter) are in none."""
    members: dict[int, list[int]] = {}
    for row, slot in enumerate(slots):
        if slot >= 0:
            members.setdefault(slot, []).append(row)
    groups: list[tuple[int, Rows]] = []
    for slot, rows in members.items():
        contiguous = rows[-1] - rows[0] + 1 == len(rows)
        groups.append((slot, slice(rows[0], rows[-1] + 1) if contiguous else torch.tensor(rows)))
    return groups


def _take(x: torch.Tensor, rows: Rows, dtype: torch.dtype) -> torch.Tensor:
    # index_select takes half the time of indexing by a tensor.
    return (x[rows] if isinstance(rows, slice) else x.index_select(0, rows)).to(dtype)


def _add_product(
    y: torch.Tensor, rows: Rows, columns: slice, x: torch.Tensor, b: torch.Tensor, scale: float = 1.0
) -> None:
    """`y[rows, columns] += x @ b.T * scale`, in one pass where rows are contiguous and types agree."""
    if not isinstance(rows, slice):
        y[:, columns].index_add_(0, rows, (x @ b.t()).to(y.dtype), alpha=scale)
    elif y.dtype == b.dtype:
        y[rows, columns].addmm_(x, b.t(), alpha=scale)
    else:
        y[rows, columns].add_(x @ b.t(), alpha=scale)


def _weight(stacked: torch.Tensor, slot: int) -> torch.Tensor:
    """A slot's matrix, shape (out, in), of a stack of shape (slots, 1, out, in) or (slots, out, in)."""
    matrix = stacked[slot]
    return matrix[0] if matrix.dim() == 3 else matrix


class GroupedPunicaWrapper(PunicaWrapperCPU):  # type: ignore[misc]  # vLLM has no types
    """The wrapper with the shapes of `PunicaWrapperBase`; results are the same for rows that have an adapter."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._token_groups: list[tuple[int, Rows]] = []
        self._sampler_groups: list[tuple[int, Rows]] = []

    def update_metadata(self, *arguments: Any, **options: Any) -> None:
        """Takes a step's mapping, and groups its rows for all layers."""
        super().update_metadata(*arguments, **options)
        self._token_groups = group_rows(self.token_lora_indices.tolist())
        self._sampler_groups = group_rows(self.sampler_indices.tolist())

    def add_shrink(
        self, y: Any, x: torch.Tensor, lora_a_stacked: tuple[torch.Tensor, ...], scale: float, **_: Any
    ) -> None:
        """`y[i] = x @ A_i.T * scale` for rows with an adapter, zero for others."""
        x = x.view(-1, x.shape[-1])
        for target, stacked in zip(y, lora_a_stacked, strict=False):
            flat = target.view(-1, target.shape[-1])
            flat.zero_()
            for slot, rows in self._token_groups:
                a = _weight(stacked, slot)
                flat[rows] = (_take(x, rows, a.dtype) @ a.t()).mul_(scale).to(flat.dtype)

    def add_expand(
        self,
        y: torch.Tensor,
        x: Any,
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **_: Any,
    ) -> None:
        """`y[:, slice_i] += x[i] @ B_i.T` for rows with an adapter."""
        y = y.view(-1, y.shape[-1])
        offset = offset_start
        for part, stacked, width in zip(x, lora_b_stacked, output_slices, strict=False):
            self._expand(y, part.view(-1, part.shape[-1]), stacked, offset, width, add_inputs=add_inputs)
            offset += width

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **_: Any
    ) -> None:
        """`y += x @ B.T` for rows with an adapter."""
        flat = y.view(-1, y.shape[-1])
        self._expand(flat, x.view(-1, x.shape[-1]), lora_b_stacked, 0, flat.shape[-1], add_inputs=add_inputs)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,  # noqa: ARG002 - the products need none
        **_: Any,
    ) -> None:
        """`y[:, slice_i] += x @ A_i.T @ B_i.T * scale` for rows with an adapter; a batch without any costs nothing."""
        if not self._token_groups:
            return
        y = y.view(-1, y.shape[-1])
        x = x.view(-1, x.shape[-1])
        for slot, rows in self._token_groups:
            mine = _take(x, rows, lora_a_stacked[0].dtype)
            offset = 0
            for a_stacked, b_stacked, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                b = _weight(b_stacked, slot)
                common = min(width, b.shape[0])
                shrunk = mine @ _weight(a_stacked, slot).t()
                _add_product(y, rows, slice(offset, offset + common), shrunk, b[:common], scale)
                offset += width

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,  # noqa: ARG002 - the products need none
        **_: Any,
    ) -> None:
        """`y += x @ A.T @ B.T * scale` for sampled rows with an adapter.

        Raises NotImplementedError for logits of a prompt where an adapter changes the head: vLLM asks for them request
        by request, without saying whose they are.
        """
        y = y.view(-1, y.shape[-1])
        x = x.view(-1, x.shape[-1])
        if x.shape[0] != len(self.sampler_indices):
            if any(_weight(lora_b_stacked, slot).any() for slot, _ in self._sampler_groups):
                raise NotImplementedError("Log-probabilities of prompts need adapters that leave lm_head alone.")
            return
        for slot, rows in self._sampler_groups:
            b = _weight(lora_b_stacked, slot)
            common = min(y.shape[-1], b.shape[0])
            a = _weight(lora_a_stacked, slot)
            _add_product(y, rows, slice(0, common), _take(x, rows, a.dtype) @ a.t(), b[:common], scale)

    def _expand(
        self, y: torch.Tensor, x: torch.Tensor, stacked: torch.Tensor, offset: int, width: int, *, add_inputs: bool
    ) -> None:
        if not add_inputs:
            y[:, offset : offset + width].zero_()
        for slot, rows in self._token_groups:
            b = _weight(stacked, slot)
            # Adapter and model may pad their outputs differently.
            common = min(width, b.shape[0])
            _add_product(y, rows, slice(offset, offset + common), _take(x, rows, b.dtype), b[:common])
