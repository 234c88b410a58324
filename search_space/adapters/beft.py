"""BEFT: training of a bias, added where the linear layer has none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.bitfit import Bitfit
from autopeft.search_space.backbones.backbone import LINEAR_ROLES, Site

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Beft(Bitfit):
    """y + b, where b: [D_out] is zero at the start; unlike BitFit, also where the linear layer has no bias."""

    kind: ClassVar[str] = "beft"
    roles: ClassVar[tuple[str, ...]] = LINEAR_ROLES
    default_roles: ClassVar[tuple[str, ...]] = ("attn.v",)
    needs: ClassVar[str] = ""
    source: ClassVar[str] = "Huang et al. 2025, BEFT: Bias-Efficient Fine-Tuning of Language Models"
    summary: ClassVar[str] = "training of biases, also new ones"

    @override
    def fits(self, site: Site) -> bool:
        return True

    @override
    def merge(self, p: Values, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, p["b"] if bias is None else bias + p["b"]
