"""The task head: the linear layers that are trained beside the adapters.

It is a bank like any other, so that each slot of a pack has a head of its own. It is not searched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from autopeft.search_space.adapters.base import AdapterSpec
from autopeft.search_space.parameter import Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Head(AdapterSpec):
    """Replaces a linear: W x + b, W: [D_out, D_in] of standard deviation 0.02, b: [D_out] zero at first."""

    kind: ClassVar[str] = "head"
    roles: ClassVar[tuple[str, ...]] = ("head",)
    default_roles: ClassVar[tuple[str, ...]] = ("head",)
    mergeable: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = False
    can_be_expert: ClassVar[bool] = False
    source: ClassVar[str] = "the task's own output layer"
    summary: ClassVar[str] = "trainable output layer"

    def parameters(self, site):
        weight = Parameter(shape=(site.out_features, site.in_features), init="small_normal")
        bias = Parameter(shape=(site.out_features,), decay=False)
        return {"W": weight, "b": bias} if site.bias else {"W": weight}

    def flops_per_token(self, site):
        return 2 * site.in_features * site.out_features

    def apply(self, p, x, y, call):
        out = x @ p["W"].transpose(1, 2)
        return out + p["b"][:, None, :] if "b" in p else out

    def merge(self, p, weight, bias):
        return p["W"], p.get("b")
