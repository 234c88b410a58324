"""Norm tuning: training the scales and biases of the normalisation layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from autopeft.search_space.adapters.base import AdapterSpec
from autopeft.search_space.parameter import Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm(AdapterSpec):
    """y + weight * n(x) + bias: changes, each [D], of the norm's own scale and bias; n(x) has neither.

    As changes they are zero at the start (the identity), and norms that store their scale minus one (Gemma's)
    need no rule of their own. Norms without a bias have no `bias`.
    """

    kind: ClassVar[str] = "norm"
    roles: ClassVar[tuple[str, ...]] = ("norm",)
    default_roles: ClassVar[tuple[str, ...]] = ("norm",)
    mergeable: ClassVar[bool] = True
    source: ClassVar[str] = "Zhao et al. 2023, Tuning LayerNorm in Attention, section 3"
    summary: ClassVar[str] = "training of the normalisation layers"

    def parameters(self, site):
        vector = Parameter(shape=(site.out_features,), decay=False)
        return {"weight": vector, "bias": vector} if site.bias else {"weight": vector}

    def flops_per_token(self, site):
        return 0

    def apply(self, p, x, y, call):
        change = p["weight"][:, None, :] * _normalised(call.base, x)
        return y + change + p["bias"][:, None, :] if "bias" in p else y + change

    def merge(self, p, weight, bias):
        return weight + p["weight"], None if bias is None else bias + p["bias"]


def _normalised(norm, x):
    """What `norm` multiplies with its weight. Raises ValueError for a norm with an unknown formula."""
    import torch.nn.functional as F
    from torch import nn

    name = type(norm).__name__
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x, x.shape[-1:], eps=norm.eps)
    if name.endswith("RMSNorm"):
        eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    raise ValueError(f"the formula of {name} is not known: norm tuning knows LayerNorm and RMSNorm")
