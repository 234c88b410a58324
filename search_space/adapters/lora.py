"""LoRA: a low-rank update beside a linear layer."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, ClassVar

from autopeft.search_space.adapters.base import (
    AdapterSpec,
    check_at_least,
    check_one_of,
    check_probability,
)
from autopeft.search_space.backbones.backbone import LINEAR_ROLES
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call

INITS = ("kaiming", "gaussian", "orthogonal")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora(AdapterSpec):
    """y + scale * B A x, with A: [R, D_in] random and B: [D_out, R] zero at the start.

    `scaling`: "alpha" divides alpha by the rank (Hu et al. 2021, section 4.1), "rslora" by its root
    (Kalajdzievski 2023, theorem 3.2). `init`: "kaiming" is uniform with a = sqrt(5) as in the reference code,
    "gaussian" has standard deviation 1/R, "orthogonal" has orthonormal rows.
    """

    kind: ClassVar[str] = "lora"
    roles: ClassVar[tuple[str, ...]] = LINEAR_ROLES
    default_roles: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    size_field: ClassVar[str | None] = "rank"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("alpha", "scaling", "dropout", "init")
    mergeable: ClassVar[bool] = True
    source: ClassVar[str] = "Hu et al. 2021, LoRA, section 4.1"
    summary: ClassVar[str] = "low-rank update beside a linear layer"

    rank: int = 8
    alpha: float = 16.0
    scaling: str = "alpha"
    dropout: float = 0.0
    init: str = "kaiming"

    def __post_init__(self) -> None:
        check_at_least("rank", self.rank, 1)
        check_one_of("scaling", self.scaling, ("alpha", "rslora"))
        check_one_of("init", self.init, INITS)
        check_probability("dropout", self.dropout)

    @property
    def scale(self) -> float:
        return self.alpha / (sqrt(self.rank) if self.scaling == "rslora" else self.rank)

    def parameters(self, site):
        return {
            "A": Parameter(shape=(self.rank, site.in_features), init=self.init),
            "B": Parameter(shape=(site.out_features, self.rank)),
        }

    def flops_per_token(self, site):
        return 2 * self.rank * (site.in_features + site.out_features)

    def constants(self, site):
        return {"scale": self.scale}

    def apply(self, p, x, y, call):
        from autopeft.kernels.packed_lora import packed_lora

        return y + packed_lora(call.dropout(x), p["A"], p["B"], call.constants["scale"], call.mask)

    def apply_linear(self, p, x, weight, bias, call, slots):
        from autopeft.kernels.packed_lora import packed_lora_linear

        if call.drops:
            return None
        return packed_lora_linear(x, weight, bias, p["A"], p["B"], call.constants["scale"], call.mask, slots)

    def mix(self, p, gates, x, y, call):
        from autopeft.kernels.mixture_lora import mixture_lora

        return mixture_lora(call.dropout(x), p["A"], p["B"], gates, *_of_mixture(call, gates))

    def mix_linear(self, p, gates, x, weight, bias, call, slots):
        from autopeft.kernels.mixture_lora import mixture_lora_linear

        return mixture_lora_linear(x, weight, bias, p["A"], p["B"], gates, *_of_mixture(call, gates), slots)

    def merge(self, p, weight, bias):
        return weight + self.scale * (p["B"] @ p["A"]), bias


def _of_mixture(call: Call, gates: Tensor) -> tuple[Tensor, Tensor | None, int]:
    """Scale [K], mask [K, E, R] and the most gates of a token that are not 0, for gates [K, M, E]."""
    mask = None if call.mask is None else call.mask[:, None].expand(-1, gates.shape[-1], -1)
    return call.constants["scale"], mask, int(call.max_over_slots("num_active"))
