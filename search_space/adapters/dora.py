"""DoRA: LoRA on the direction of a weight, and a trained magnitude per output feature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.lora import DRAWN, FROM_SITE, INITS, Lora
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

    A row of zeros in V has no direction. Its norm is taken as 1, so that its output and its gradients are 0 or finite,
    and a row of zeros in W stays as it is: its magnitude starts at 0, which gives its row of B no gradient.
    """

    kind: ClassVar[str] = "dora"
    repeatable: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = True
    source: ClassVar[str] = "Liu et al. 2024, DoRA, equations 5 and 11"
    summary: ClassVar[str] = "low-rank update of a weight's direction, and its magnitude"

    def __post_init__(self) -> None:
        Lora.__post_init__(self)
        if self.has_offset:
            without = [init for init in INITS if init in DRAWN or not FROM_SITE[init].offset]
            raise ValueError(f"init must be one of {', '.join(without)} for dora, got {self.init!r}")

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        magnitude = Parameter(shape=(site.out_features,), init="row_norm", decay=False)
        return {**Lora.parameters(self, site), "m": magnitude}

    @override
    def apply(self, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        from autopeft.kernels.packed_lora import packed_lora
        from autopeft.search_space.backbones.linear import frozen_product, weight_of

        base: Any = call.base
        weight, scale = weight_of(base).to(x.dtype), call.constants["scale"]
        dropped = call.dropout(x)
        if dropped is not x:
            frozen = frozen_product(dropped, base)
        else:
            frozen = y if base.bias is None else y - base.bias.detach()
        factor = (p["m"] / _row_norms(weight, p["A"], p["B"], scale, call.mask))[:, None, :]
        return y + (factor - 1.0) * frozen + factor * packed_lora(dropped, p["A"], p["B"], scale, call.mask)

    @override
    def merge(self, p: Values, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        direction = self._direction(p, weight)
        return (p["m"] / _not_zero(direction.norm(dim=1)))[:, None] * direction, bias

    def without_zero_rows(self, p: Mapping[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
        """Return the values of an equal adapter for code that divides by every norm, such as peft's.

        A: [R, D_in], B: [D_out, R], m: [D_out], weight: [D_out, D_in]. Where V has a row of zeros, the row of B becomes
        1 and the magnitude 0: the row then has a direction, and the output is still 0.
        """
        empty = self._direction(p, weight).norm(dim=1) == 0
        return {**p, "B": p["B"].masked_fill(empty[:, None], 1.0), "m": p["m"].masked_fill(empty, 0.0)}

    def _direction(self, p: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        return weight + self.scale * (p["B"] @ p["A"])


def _not_zero(norms: Tensor) -> Tensor:
    """Replace norms of 0 by 1: the rows are 0, and so are their quotients."""
    return norms.masked_fill(norms == 0, 1.0)


def _row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: Tensor, mask: Tensor | None) -> Tensor:
    """Return the row norms of W + scale * B A, without gradients, and 1 for rows of zeros.

    weight: [D_out, D_in], a: [K, R, D_in], b: [K, D_out, R], scale: [K], mask: [K, R]. Returns [K, D_out].

    Each row is computed by |w + d|^2 = |w|^2 + 2 w.d + |d|^2 with d = scale * B A, which avoids a tensor of the shape
    [K, D_out, D_in].
    """
    import torch

    with torch.no_grad():
        b = scale[:, None, None] * (b if mask is None else b * mask[:, None, :])
        cross = (b * (weight @ a.transpose(1, 2))).sum(-1)
        square = (b * (b @ (a @ a.transpose(1, 2)))).sum(-1)
        # Rounding can make the sum negative where d is nearly -w.
        return _not_zero((weight.square().sum(1) + 2.0 * cross + square).clamp_min(0.0).sqrt())
