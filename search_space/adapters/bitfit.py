"""BitFit: training the biases that the backbone has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from autopeft.search_space.adapters.base import AdapterSpec
from autopeft.search_space.backbones.backbone import LINEAR_ROLES
from autopeft.search_space.parameter import Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Bitfit(AdapterSpec):
    """y + b with b: [D_out], the change of the module's own bias. Zero at the start: the identity."""

    kind: ClassVar[str] = "bitfit"
    roles: ClassVar[tuple[str, ...]] = (*LINEAR_ROLES, "norm")
    default_roles: ClassVar[tuple[str, ...]] = (*LINEAR_ROLES, "norm")
    mergeable: ClassVar[bool] = True
    source: ClassVar[str] = "Ben Zaken et al. 2022, BitFit, section 3"
    summary: ClassVar[str] = "training of the existing biases"

    def fits(self, site):
        return site.bias

    def parameters(self, site):
        return {"b": Parameter(shape=(site.out_features,), decay=False)}

    def flops_per_token(self, site):
        return 0

    def apply(self, p, x, y, call):
        return y + p["b"][:, None, :]

    def merge(self, p, weight, bias):
        return weight, bias + p["b"]
