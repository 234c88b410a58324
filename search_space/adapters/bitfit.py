"""BitFit: training of the backbone's existing biases."""

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
class Bitfit(AdapterSpec):
    """y + b, where b: [D_out] is the change of the module's own bias.

    b is zero at the start, which is the identity.
    """

    kind: ClassVar[str] = "bitfit"
    roles: ClassVar[tuple[str, ...]] = (*LINEAR_ROLES, "norm")
    default_roles: ClassVar[tuple[str, ...]] = (*LINEAR_ROLES, "norm")
    mergeable: ClassVar[bool] = True
    needs: ClassVar[str] = "modules with a bias"
    source: ClassVar[str] = "Ben Zaken et al. 2022, BitFit, section 3"
    summary: ClassVar[str] = "training of the existing biases"

    @override
    def fits(self, site: Site) -> bool:
        return site.bias

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        return {"b": Parameter(shape=(site.out_features,), decay=False)}

    @override
    def flops_per_token(self, site: Site) -> int:
        return 0

    @override
    def apply(self, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        return y + p["b"][:, None, :]

    @override
    def merge(self, p: Values, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert bias is not None  # `fits`
        return weight, bias + p["b"]
