"""Weights of the backbone's modules in one orientation, whatever the module keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def _is_transposed(module: nn.Module) -> bool:
    """GPT-2's Conv1D keeps [D_in, D_out]."""
    return type(module).__name__ == "Conv1D"


def weight_of(module: Any) -> Tensor:
    """The weight as [D_out, D_in] (norms: [D]); a view, not a copy."""
    return module.weight.detach().T if _is_transposed(module) else module.weight.detach()


@torch.no_grad()
def set_weight(module: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Write `weight` [D_out, D_in] and `bias` in place; a bias is added where none was, removed for None."""
    module.weight.copy_(weight.T if _is_transposed(module) else weight)
    if bias is None:
        if getattr(module, "bias", None) is not None:
            module.bias = None
    elif getattr(module, "bias", None) is None:
        module.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    else:
        module.bias.copy_(bias)
