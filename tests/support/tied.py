"""An adapter type for tests alone, with every kind of tensor that a type may declare (`Parameter`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from autopeft.search_space.adapters import ADAPTERS, AdapterSpec
from autopeft.search_space.backbones.backbone import LINEAR_ROLES
from autopeft.search_space.parameter import Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Tied(AdapterSpec):
    """y + g * B (z * A x): A: [R, D_in] and g: [D_out] are trained, and shared by the model and by sites of one shape.
    z: [R] is frozen: [R] of the site, drawn from the slot's seed.
    """

    kind: ClassVar[str] = "tied"
    roles: ClassVar[tuple[str, ...]] = LINEAR_ROLES
    default_roles: ClassVar[tuple[str, ...]] = ("attn.q", "attn.qkv", "attn.v", "mlp.up", "mlp.down")
    size_field: ClassVar[str | None] = "rank"
    mergeable: ClassVar[bool] = True
    can_be_expert: ClassVar[bool] = False
    source: ClassVar[str] = "none"
    summary: ClassVar[str] = "for tests"

    rank: int = 2

    def parameters(self, site):
        return {
            "B": Parameter(shape=(site.out_features, self.rank), init="small_normal"),
            "A": Parameter(shape=(self.rank, site.in_features), init="kaiming", scope="model"),
            "g": Parameter(shape=(site.out_features,), init=1.0, decay=False, scope="shape"),
            "z": Parameter(shape=(self.rank,), init="normal", trainable=False),
        }

    def flops_per_token(self, site):
        return 2 * self.rank * (site.in_features + site.out_features)

    def apply(self, p, x, y, call):
        z = p["z"] if call.mask is None else p["z"] * call.mask
        return y + (x @ p["A"].mT * z[:, None]) @ p["B"].mT * p["g"][:, None]

    def merge(self, p, weight, bias):
        return weight + (p["g"][:, None] * p["B"]) @ (p["z"][:, None] * p["A"]), bias


@pytest.fixture
def tied(monkeypatch: pytest.MonkeyPatch) -> type[Tied]:
    """Among the types for as long as a test runs."""
    monkeypatch.setitem(ADAPTERS, Tied.kind, Tied)
    return Tied
