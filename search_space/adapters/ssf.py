"""SSF: a trained scale and shift of each output feature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import AdapterSpec
from autopeft.search_space.backbones.backbone import LINEAR_ROLES, Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Ssf(AdapterSpec):
    """scale * y + shift, where scale and shift are each [D_out].

    They start at one and zero, which is the identity (the paper adds noise).
    """

    kind: ClassVar[str] = "ssf"
    roles: ClassVar[tuple[str, ...]] = (*LINEAR_ROLES, "norm")
    default_roles: ClassVar[tuple[str, ...]] = (*LINEAR_ROLES, "norm")
    mergeable: ClassVar[bool] = True
    needs: ClassVar[str] = "linear layers, or norms with a bias"
    source: ClassVar[str] = "Lian et al. 2022, Scaling & Shifting Your Features, equations 3 and 4"
    summary: ClassVar[str] = "scale and shift of a layer's output"

    @override
    def fits(self, site: Site) -> bool:
        # Merging can add a bias to a linear; an RMSNorm has no parameter for the shift.
        return site.role != "norm" or site.bias

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        return {
            "scale": Parameter(shape=(site.out_features,), init="ones", decay=False),
            "shift": Parameter(shape=(site.out_features,), decay=False),
        }

    @override
    def flops_per_token(self, site: Site) -> int:
        return 0

    @override
    def apply(self, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        return y * p["scale"][:, None, :] + p["shift"][:, None, :]

    @override
    def merge(self, p: Values, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # weight: [D_out, D_in], or [D] at a norm.
        scaled = weight * (p["scale"][:, None] if weight.dim() == 2 else p["scale"])
        return scaled, p["shift"] if bias is None else bias * p["scale"] + p["shift"]
