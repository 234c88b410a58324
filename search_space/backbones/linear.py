"""Weights of the backbone's modules in one orientation, [D_out, D_in], however the module stores them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopeft.search_space.backbones.quantized import dequantized, is_quantized, product


def _is_transposed(module: nn.Module) -> bool:
    """Return whether the weight is stored as [D_in, D_out], as in GPT-2's Conv1D."""
    return type(module).__name__ == "Conv1D"


def weight_of(module: Any) -> Tensor:
    """Return the weight as [D_out, D_in] (norms: [D]), detached; a view, and a copy only of a quantised weight."""
    if is_quantized(module):
        return dequantized(module)
    weight: Tensor = module.weight.detach()
    return weight.T if _is_transposed(module) else weight


def frozen_product(x: Tensor, module: Any) -> Tensor:
    """Return x W^T in x's type, without the bias. x: [..., D_in]. Returns [..., D_out]. Gradients: x."""
    return product(x, module) if is_quantized(module) else F.linear(x, weight_of(module).to(x.dtype))


@torch.no_grad()
def set_weight(module: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Write `weight` [D_out, D_in] and `bias` [D_out] in place; a missing bias is created, and None removes it."""
    module.weight.copy_(weight.T if _is_transposed(module) else weight)
    if bias is None:
        if getattr(module, "bias", None) is not None:
            module.bias = None
    elif getattr(module, "bias", None) is None:
        module.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    else:
        module.bias.copy_(bias)
