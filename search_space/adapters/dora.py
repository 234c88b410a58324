"""DoRA: LoRA on the direction of a weight, and a trained magnitude per output feature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.lora import Lora
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Dora(Lora):
    """y = m * V x / |V| + b, where V = W + scale * B A and |V|: [D_out] are the norms of the rows of V.

    At the start, A: [R, D_in] is random, B: [D_out, R] is zero and m: [D_out] are the row norms of W, which is the
    identity. The gradient treats |V| as a constant (section 4.3). The fields are those of LoRA. With g = m / |V| and x'
    the input after dropout, y = W x + b + (g - 1) W x' + g * scale * B A x', as in the authors' code.
    """

    kind: ClassVar[str] = "dora"
    repeatable: ClassVar[bool] = False
    source: ClassVar[str] = "Liu et al. 2024, DoRA, equations 5 and 11"
    summary: ClassVar[str] = "low-rank update of a weight's direction, and its magnitude"

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        magnitude = Parameter(shape=(site.out_features,), init="row_norm", decay=False)
        return {**Lora.parameters(self, site), "m": magnitude}

    @override
    def apply(self, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        import torch.nn.functional as F

        from autopeft.kernels.packed_lora import packed_lora
        from autopeft.search_space.backbones.linear import weight_of

        base: Any = call.base
        weight, scale = weight_of(base).to(x.dtype), call.constants["scale"]
        dropped = call.dropout(x)
        if dropped is not x:
            frozen = F.linear(dropped, weight)
        else:
            frozen = y if base.bias is None else y - base.bias.detach()
        factor = (p["m"] / _row_norms(weight, p["A"], p["B"], scale, call.mask))[:, None, :]
        return y + (factor - 1.0) * frozen + factor * packed_lora(dropped, p["A"], p["B"], scale, call.mask)

    @override
    def merge(self, p: Values, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        direction = weight + self.scale * (p["B"] @ p["A"])
        return (p["m"] / direction.norm(dim=1))[:, None] * direction, bias


def _row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: Tensor, mask: Tensor | None) -> Tensor:
    """Return the row norms of W + scale * B A, without gradients.

    weight: [D_out, D_in], a: [K, R, D_in], b: [K, D_out, R], scale: [K], mask: [K, R]. Returns [K, D_out].

    Each row is computed by |w + d|^2 = |w|^2 + 2 w.d + |d|^2 with d = scale * B A, which avoids a tensor of the shape
    [K, D_out, D_in].
    """
    import torch

    with torch.no_grad():
        b = scale[:, None, None] * (b if mask is None else b * mask[:, None, :])
        cross = (b * (weight @ a.transpose(1, 2))).sum(-1)
        square = (b * (b @ (a @ a.transpose(1, 2)))).sum(-1)
        return (weight.square().sum(1) + 2.0 * cross + square).sqrt()
