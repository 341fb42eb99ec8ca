"""LoRA's linear layer as one autograd function: the same numbers as PEFT's, with fewer passes over memory.

    y = x Wᵀ + s (x Aᵀ) Bᵀ        Hu et al. 2021 (arXiv:2106.09685), section 4.1; W frozen, s = alpha / rank

PEFT computes the product with s, the sum and their gradients as tensors of their own, and in bfloat16 a float32 copy of
x as well. Here the small products are added in place, and A and B are rounded to x's type, as an inference engine does.
Saving and loading stay PEFT's. Does not know what is trained.
"""

from functools import partial
from typing import Any

import torch

from graft.training.imports import LoraLinear


class _FusedLora(torch.autograd.Function):  # type: ignore[misc] # torch is untyped to mypy here
    """N tokens, I inputs, O outputs, rank R."""

    @staticmethod
    def forward(
        ctx: Any,
        x_N_I: torch.Tensor,
        weight_O_I: torch.Tensor,
        bias_O: torch.Tensor | None,
        a_R_I: torch.Tensor,
        b_O_R: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        a_R_I = a_R_I.to(x_N_I.dtype)
        scaled_b_O_R = (b_O_R * scaling).to(x_N_I.dtype)
        low_N_R = x_N_I @ a_R_I.T
        ctx.save_for_backward(x_N_I, weight_O_I, a_R_I, scaled_b_O_R, low_N_R)
        ctx.scaling = scaling
        return torch.nn.functional.linear(x_N_I, weight_O_I, bias_O).addmm_(low_N_R, scaled_b_O_R.T)

    @staticmethod
    def backward(ctx: Any, gradient_N_O: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_N_I, weight_O_I, a_R_I, scaled_b_O_R, low_N_R = ctx.saved_tensors
        gradient_low_N_R = gradient_N_O @ scaled_b_O_R
        gradient_a = (gradient_low_N_R.T @ x_N_I).float()
        gradient_b = (gradient_N_O.T @ low_N_R).float().mul_(ctx.scaling)
        # The first layer's input is the frozen embedding's output: nobody asks for its gradient.
        gradient_x = (gradient_N_O @ weight_O_I).addmm_(gradient_low_N_R, a_R_I) if ctx.needs_input_grad[0] else None
        return gradient_x, None, None, gradient_a, gradient_b, None


def _forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    if module.disable_adapters:
        return module.base_layer(x)
    adapter = module.active_adapters[0]
    answer_N_O = _FusedLora.apply(
        x.flatten(0, -2),
        module.base_layer.weight,
        module.base_layer.bias,
        module.lora_A[adapter].weight,
        module.lora_B[adapter].weight,
        module.scaling[adapter],
    )
    return answer_N_O.unflatten(0, x.shape[:-1])


def fuse(model: Any) -> int:
    """Makes every plain LoRA layer of a PEFT model compute in one piece; returns how many. Weights are untouched.

    A layer with dropout (which acts between x and A alone) or with a variant of LoRA keeps PEFT's way.
    """
    fused = 0
    for module in model.modules():
        if not isinstance(module, LoraLinear) or type(module.base_layer) is not torch.nn.Linear:
            continue
        (adapter,) = module.active_adapters
        if adapter in module.lora_variant or not isinstance(module.lora_dropout[adapter], torch.nn.Identity):
            continue
        module.forward = partial(_forward, module)
        fused += 1
    return fused
