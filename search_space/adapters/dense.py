"""Dense deltas: training of chosen linear layers whole, beside the shared frozen weight."""

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
class Dense(AdapterSpec):
    """(W + D) x + b + d, with D: [D_out, D_in] and d: [D_out] zero at the start; d exists where the layer has a bias.

    It is the training of the layer itself, but slots share W, so candidates of a pack train other layers. AdamW moves D
    as it would move W, except for the decay, which pulls W + D towards the pretrained W (as Li et al. 2018, L2-SP) and
    not towards zero; `d` has none. With `norm` at the same layers, it trains whole layers: the upper ones (Shi et al.
    2023, Telly) or a region of layers and modules (Zhang et al. 2024, CoFiTune, the coarse level).
    """

    kind: ClassVar[str] = "dense"
    roles: ClassVar[tuple[str, ...]] = LINEAR_ROLES
    default_roles: ClassVar[tuple[str, ...]] = LINEAR_ROLES
    mergeable: ClassVar[bool] = True
    can_be_expert: ClassVar[bool] = False  # a dense weight per expert would enlarge the model
    source: ClassVar[str] = "Shi et al. 2023, Towards Efficient Fine-Tuning of Pre-trained Code Models (Telly)"
    summary: ClassVar[str] = "training of whole linear layers"

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        own = {"D": Parameter(shape=(site.out_features, site.in_features))}
        return own | {"d": Parameter(shape=(site.out_features,), decay=False)} if site.bias else own

    @override
    def flops_per_token(self, site: Site) -> int:
        return 2 * site.in_features * site.out_features

    @override
    def apply(self, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        y = y + x @ p["D"].mT
        return y + p["d"][:, None] if "d" in p else y

    @override
    def merge(self, p: Values, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + p["D"], None if bias is None else bias + p["d"]
