"""DoRA: LoRA on the direction of a weight, and a trained magnitude per output feature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from autopeft.search_space.adapters.lora import Lora
from autopeft.search_space.parameter import Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Dora(Lora):
    """y = m * V x / |V| + b with V = W + scale * B A and |V| the norm of each of its rows.

    A: [R, D_in] random, B: [D_out, R] zero, m: [D_out] the row norms of W at the start, which is the
    identity. |V| is a constant to the gradient (section 4.3). The fields are LoRA's. With g = m / |V| and x'
    the x after dropout, y = W x + b + (g - 1) W x' + g * scale * B A x', as in the authors' code.
    """

    kind: ClassVar[str] = "dora"
    repeatable: ClassVar[bool] = False
    source: ClassVar[str] = "Liu et al. 2024, DoRA, equations 5 and 11"
    summary: ClassVar[str] = "low-rank update of a weight's direction, and its magnitude"

    def parameters(self, site):
        magnitude = Parameter(shape=(site.out_features,), init="row_norm", decay=False)
        return {**Lora.parameters(self, site), "m": magnitude}

    def apply(self, p, x, y, call):
        import torch.nn.functional as F

        from autopeft.kernels.packed_lora import packed_lora
        from autopeft.search_space.backbones.linear import weight_of

        weight, scale = weight_of(call.base).to(x.dtype), call.constants["scale"]
        dropped = call.dropout(x)
        if dropped is not x:
            frozen = F.linear(dropped, weight)
        else:
            frozen = y if call.base.bias is None else y - call.base.bias.detach()
        factor = (p["m"] / _row_norms(weight, p["A"], p["B"], scale, call.mask))[:, None, :]
        return y + (factor - 1.0) * frozen + factor * packed_lora(dropped, p["A"], p["B"], scale, call.mask)

    def merge(self, p, weight, bias):
        direction = weight + self.scale * (p["B"] @ p["A"])
        return (p["m"] / direction.norm(dim=1))[:, None] * direction, bias


def _row_norms(weight, a, b, scale, mask):
    """Row norms of W + scale * B A as a constant: [K, D_out].

    |w + d|^2 = |w|^2 + 2 w.d + |d|^2 with d = scale * B A, so that no [K, D_out, D_in] is ever made.
    """
    import torch

    with torch.no_grad():
        b = scale[:, None, None] * (b if mask is None else b * mask[:, None, :])
        cross = (b * (weight @ a.transpose(1, 2))).sum(-1)
        square = (b * (b @ (a @ a.transpose(1, 2)))).sum(-1)
        return (weight.square().sum(1) + 2.0 * cross + square).sqrt()
