"""Norm tuning: training of the scales and biases of the normalisation layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import AdapterSpec
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm(AdapterSpec):
    """y + weight * n(x) + bias, where n(x) is the normalised input without scale and bias.

    `weight` and `bias`, each [D], are changes of the norm's own scale and bias. Changes start at zero (the identity),
    and norms that store their scale minus one (Gemma's) need no special case. `bias` exists only for norms with a bias.
    """

    kind: ClassVar[str] = "norm"
    roles: ClassVar[tuple[str, ...]] = ("norm",)
    default_roles: ClassVar[tuple[str, ...]] = ("norm",)
    mergeable: ClassVar[bool] = True
    needs: ClassVar[str] = "norms that are a LayerNorm or an RMSNorm"
    source: ClassVar[str] = "Zhao et al. 2023, Tuning LayerNorm in Attention, section 3"
    summary: ClassVar[str] = "training of the normalisation layers"

    @override
    def fits(self, site: Site) -> bool:
        return site.known_norm

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        vector = Parameter(shape=(site.out_features,), decay=False)
        return {"weight": vector, "bias": vector} if site.bias else {"weight": vector}

    @override
    def flops_per_token(self, site: Site) -> int:
        return 0

    @override
    def apply(self, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        change = p["weight"][:, None, :] * _normalised(call.base, x)
        return y + change + p["bias"][:, None, :] if "bias" in p else y + change

    @override
    def merge(self, p: Values, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + p["weight"], None if bias is None else bias + p["bias"]


def _normalised(norm: Any, x: Tensor) -> Tensor:
    """Return x: [K, M, D] as `norm` normalises it before its scale. Raises ValueError for an unknown type of norm."""
    import torch.nn.functional as F
    from torch import nn

    name = type(norm).__name__
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x, x.shape[-1:], eps=norm.eps)
    if name.endswith("RMSNorm"):
        eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    raise ValueError(f"norm tuning does not support {name}, only LayerNorm and RMSNorm")
