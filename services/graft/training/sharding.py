"""Spreads a model's blocks over the workers (FSDP2), and lets the rest of training take a tensor for what it is.

Owns which weights are spread, and how their gradients are summed and clipped. A block's weights are split along their
first dimension; each worker gathers one block after the other as it computes, and keeps its own part of weights,
gradients and AdamW's moments (Zhao et al. 2023, arXiv:2304.11277). Embedding, final norm and head stay whole in each
worker: the loop applies the head apart from the body, to the tokens with loss alone (docs/adr/0001). So every forward
and backward pass is made by all workers, or by none. Does not know what is learned, nor when to spread
(`graft.training.tuning`).
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from graft.training.objectives.objective import Group

PATIENCE = timedelta(minutes=30)
"""How long workers wait for each other, as in the group that Ray Train makes. NCCL's own 10 minutes may pass while rank
0 writes a whole model and puts it into a bucket."""


def shard(model: Any, device: torch.device) -> None:
    """Spreads the blocks of a model on the CPU over the workers' devices, and moves the rest to this one's.

    Every worker calls it with the same weights. One block at a time is whole on the device. Gradients of the blocks
    are from then on summed over the workers by each backward pass, into each worker's part.
    """
    from torch.distributed import new_group
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    decoder = (model.get_base_model() if hasattr(model, "get_base_model") else model).get_decoder()
    # The workers' own group is gloo's, which gathers nothing on a GPU.
    backend = "nccl" if device.type == "cuda" else "gloo"
    mesh = DeviceMesh.from_group(new_group(backend=backend, timeout=PATIENCE), device.type)
    for block in decoder.layers:
        fully_shard(block, mesh=mesh)
        # A loss is divided by the whole batch's scale already: a mean over workers would divide it twice. Not by a
        # factor of the collective (gloo has none), so a plain sum.
        block.set_gradient_divide_factor(1.0)
        block.set_force_sum_reduction_for_comms(True)
    # Owns no weights: as the root of the blocks it lets each be gathered while the one before it computes.
    fully_shard(decoder, mesh=mesh, ignored_params={p for p in decoder.parameters() if not isinstance(p, DTensor)})
    model.to(device)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This worker's part of a spread tensor, sharing its memory; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a spread tensor, gathered by all workers; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()  # type: ignore[untyped-decorator] # torch is untyped to mypy here
def assign(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Makes a parameter what `value` is on every worker, without a message: each takes its own part."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    local(parameter).copy_(local(value))


def gathered(model: Any, group: Group, *, trained_only: bool) -> dict[str, torch.Tensor] | None:
    """Weights as `state_dict` names them, whole and on the CPU of rank 0, by all workers; empty on the others.

    None of a model that is not spread: it has its `state_dict`.
    """
    if not group.sharded:
        return None
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if trained_only and name not in trained:
            continue
        if isinstance(value, DTensor):
            value = whole(value)  # let go at once on the other workers
            value = value.cpu() if group.rank == 0 else value
        if group.rank == 0:
            kept[name] = value  # of what is not spread the very tensor: tied weights stay one
    return kept


def clip(parameters: Sequence[torch.nn.Parameter], most: float, group: Group) -> float:
    """Scales gradients, summed over the workers already, to a norm of `most` at most; returns the norm before."""
    if not group.sharded:
        return float(torch.nn.utils.clip_grad_norm_(parameters, most))
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    spread = [local(gradient) for gradient in gradients if isinstance(gradient, DTensor)]
    copied = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    square = torch.nn.utils.get_total_norm(spread).cpu().double().reshape(1).square()
    group.reduce(square)
    norm = float((square + torch.nn.utils.get_total_norm(copied).cpu().double().square()).sqrt())
    factor = most / (norm + 1e-6)  # as torch's own
    if factor < 1:
        for gradient in (*spread, *copied):
            gradient.mul_(factor)
    return norm
