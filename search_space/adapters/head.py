"""The task head: linear layers that are trained together with the adapters.

A head has a bank like an adapter, so that each slot of a pack has its own head. The search does not vary it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import AdapterSpec
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Head(AdapterSpec):
    """W x + b in place of the model's own linear.

    At the start, W: [D_out, D_in] is normal with standard deviation 0.02 and b: [D_out] is zero.
    """

    kind: ClassVar[str] = "head"
    roles: ClassVar[tuple[str, ...]] = ("head",)
    default_roles: ClassVar[tuple[str, ...]] = ("head",)
    mergeable: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = False
    can_be_expert: ClassVar[bool] = False
    source: ClassVar[str] = "the task's own output layer"
    summary: ClassVar[str] = "trainable output layer"

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        weight = Parameter(shape=(site.out_features, site.in_features), init="small_normal")
        bias = Parameter(shape=(site.out_features,), decay=False)
        return {"W": weight, "b": bias} if site.bias else {"W": weight}

    @override
    def flops_per_token(self, site: Site) -> int:
        return 2 * site.in_features * site.out_features

    @override
    def apply(self, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        out = x @ p["W"].transpose(1, 2)
        return out + p["b"][:, None, :] if "b" in p else out

    @override
    def merge(self, p: Values, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return p["W"], p.get("b")
