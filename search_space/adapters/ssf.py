"""SSF: a trained scale and shift of features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from autopeft.search_space.adapters.base import AdapterSpec
from autopeft.search_space.backbones.backbone import LINEAR_ROLES
from autopeft.search_space.parameter import Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Ssf(AdapterSpec):
    """scale * y + shift, both [D_out]. One and zero at the start: the identity (the paper adds noise)."""

    kind: ClassVar[str] = "ssf"
    roles: ClassVar[tuple[str, ...]] = (*LINEAR_ROLES, "norm")
    default_roles: ClassVar[tuple[str, ...]] = (*LINEAR_ROLES, "norm")
    mergeable: ClassVar[bool] = True
    source: ClassVar[str] = "Lian et al. 2022, Scaling & Shifting Your Features, equations 3 and 4"
    summary: ClassVar[str] = "scale and shift of a layer's output"

    def fits(self, site):
        # A linear can be given a bias when it is merged; an RMSNorm has no place for the shift.
        return site.role != "norm" or site.bias

    def parameters(self, site):
        return {
            "scale": Parameter(shape=(site.out_features,), init="ones", decay=False),
            "shift": Parameter(shape=(site.out_features,), decay=False),
        }

    def flops_per_token(self, site):
        return 0

    def apply(self, p, x, y, call):
        return y * p["scale"][:, None, :] + p["shift"][:, None, :]

    def merge(self, p, weight, bias):
        # weight: [D_out, D_in], or [D] at a norm.
        scaled = weight * (p["scale"][:, None] if weight.dim() == 2 else p["scale"])
        return scaled, p["shift"] if bias is None else bias * p["scale"] + p["shift"]
