"""AdapterBias: a shift of a linear layer's output whose strength depends on the token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.linear_operators import Numbers, OutputOperator
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Values


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterBias(OutputOperator):
    """y + (a . y) v, where v: [D_out] is the shift, zero at the start, and a: [D_out] gives its strength per token."""

    kind: ClassVar[str] = "adapterbias"
    default_roles: ClassVar[tuple[str, ...]] = ("mlp.down",)
    source: ClassVar[str] = "Fu et al. 2022, AdapterBias: Parameter-efficient Token-dependent Representation Shift"
    summary: ClassVar[str] = "shift of the output by the token"

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        return {
            "v": Parameter(shape=(site.out_features,), decay=False),
            "a": Parameter(shape=(site.out_features,), init="kaiming", decay=False),
        }

    @override
    def flops_per_token(self, site: Site) -> int:
        return 4 * site.out_features

    @override
    def act(self, p: Values, x: Tensor, y: Tensor, numbers: Numbers, mask: Tensor | None) -> Tensor:
        return y + y @ p["a"][:, :, None] @ p["v"][:, None]
