"""Linear layers whose frozen weight is stored in 4 or 8 bits by bitsandbytes: the dequantised weight, and products.

The weight is dequantised for each use and not kept, neither between uses nor for the backward pass.
"""

from __future__ import annotations

from copy import copy
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from typing_extensions import override

#: Types of bitsandbytes' parameters.
_STORED = ("Params4bit", "Int8Params")
#: Largest absolute value of int8, which stands for the largest absolute weight of a row.
_INT8_MAX = 127.0


def is_quantized(module: nn.Module) -> bool:
    """Return whether the weight of a module is stored in 4 or 8 bits."""
    return type(getattr(module, "weight", None)).__name__ in _STORED


def dequantized(module: Any) -> Tensor:
    """Return the weight [D_out, D_in] of a quantised linear in the dtype in which the linear computes."""
    weight, dtype = module.weight, module.compute_dtype
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        state = copy(weight.quant_state)
        shape, state.dtype = state.shape, dtype
        if shape[-1] % state.blocksize:
            # Blocks go on from row to row; bitsandbytes 0.50 on a CPU begins one in each row, and reads beyond the end.
            state.shape = torch.Size((1, prod(shape)))
        full: Tensor = dequantize_4bit(weight.detach(), state)
        return full.view(shape)
    (scale,) = quantization_state(module).values()
    # As bitsandbytes does it in training on a CPU: Dettmers et al. 2022, LLM.int8(), section 2.1, by rows of W.
    full = weight.detach().to(dtype)
    return full.mul_(scale[:, None] / _INT8_MAX)


def quantization_state(module: Any) -> dict[str, Tensor]:
    """Return the stored tensors beside the weight of a quantised linear, by name: scales, and for 4 bits the code."""
    weight = module.weight
    if type(weight).__name__ == "Params4bit":
        stored = weight.quant_state.as_dict()
        return {name: value for name, value in stored.items() if isinstance(value, Tensor)}
    # bitsandbytes' own forward function moves the scale to the state.
    return {"SCB": weight.SCB if weight.SCB is not None else module.state.SCB}


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the `quantization_state` of all quantised linears of a model, by the path of the module and the name."""
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        if is_quantized(module)
        for name, value in quantization_state(module).items()
    }


def product(x: Tensor, module: nn.Module) -> Tensor:
    """Return x W^T for a quantised linear, in x's type, without the bias. x: [..., D_in]. Returns [..., D_out]."""
    result: Tensor = _Product.apply(x, module)  # type: ignore[no-untyped-call]
    return result


class _Product(torch.autograd.Function):
    """The product with a weight that is dequantised again in the backward pass. Gradients: x."""

    @override
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        return F.linear(x, dequantized(module).to(x.dtype))

    @override
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, None]:
        return gy @ dequantized(ctx.module).to(gy.dtype), None
