"""LoRA: a low-rank update parallel to a linear layer."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import (
    AdapterSpec,
    check_at_least,
    check_one_of,
    check_positive,
    check_probability,
)
from autopeft.search_space.backbones.backbone import LINEAR_ROLES, Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values

INITS = ("kaiming", "gaussian", "orthogonal")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora(AdapterSpec):
    """y + scale * B A x, with A: [R, D_in] random and B: [D_out, R] zero at the start.

    `scaling`: "alpha" divides alpha by the rank (Hu et al. 2021, section 4.1), "rslora" by the square root of the rank
    (Kalajdzievski 2023, theorem 3.2). `init` is the distribution of A: "kaiming" is uniform with a = sqrt(5), as in the
    reference code, "gaussian" has standard deviation 1/R, "orthogonal" has orthonormal rows. `rate_ratio`: the learning
    rate of B divided by that of A (Hayou et al. 2024, LoRA+). `freeze_a`: A keeps its initial values and B alone is
    trained (Zhang et al. 2023, LoRA-FA); A is stored with B.
    """

    kind: ClassVar[str] = "lora"
    roles: ClassVar[tuple[str, ...]] = LINEAR_ROLES
    default_roles: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    size_field: ClassVar[str | None] = "rank"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("alpha", "scaling", "dropout", "init", "rate_ratio")
    later_fields: ClassVar[tuple[str, ...]] = (*AdapterSpec.later_fields, "rate_ratio", "freeze_a")
    mergeable: ClassVar[bool] = True
    source: ClassVar[str] = "Hu et al. 2021, LoRA, section 4.1"
    summary: ClassVar[str] = "low-rank update beside a linear layer"

    rank: int = 8
    alpha: float = 16.0
    scaling: str = "alpha"
    dropout: float = 0.0
    init: str = "kaiming"
    rate_ratio: float = 1.0
    freeze_a: bool = False

    def __post_init__(self) -> None:
        AdapterSpec.__post_init__(self)
        check_at_least("rank", self.rank, 1)
        check_one_of("scaling", self.scaling, ("alpha", "rslora"))
        check_one_of("init", self.init, INITS)
        check_probability("dropout", self.dropout)
        check_positive("rate_ratio", self.rate_ratio)

    @property
    def scale(self) -> float:
        """Factor of B A x that follows from `alpha`, `rank` and `scaling`."""
        return self.alpha / (sqrt(self.rank) if self.scaling == "rslora" else self.rank)

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        return {
            "A": Parameter(shape=(self.rank, site.in_features), init=self.init, trainable=not self.freeze_a),
            "B": Parameter(shape=(site.out_features, self.rank)),
        }

    @override
    def rate_of(self, name: str) -> float:
        return self.rate if name == "A" else self.rate * self.rate_ratio

    @override
    def flops_per_token(self, site: Site) -> int:
        return 2 * self.rank * (site.in_features + site.out_features)

    @override
    def constants(self, site: Site) -> dict[str, Any]:
        return {"scale": self.scale}

    @override
    def apply(self, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        from autopeft.kernels.packed_lora import packed_lora

        return y + packed_lora(call.dropout(x), p["A"], p["B"], call.constants["scale"], call.mask)

    @override
    def apply_linear(
        self, p: Values, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call, slots: Tensor | None
    ) -> Tensor | None:
        from autopeft.kernels.packed_lora import packed_lora_linear

        if call.drops:
            return None
        return packed_lora_linear(x, weight, bias, p["A"], p["B"], call.constants["scale"], call.mask, slots)

    @override
    def mix(self, p: Values, gates: Tensor, x: Tensor, y: Tensor, call: Call) -> Tensor:
        from autopeft.kernels.mixture_lora import mixture_lora

        return mixture_lora(call.dropout(x), p["A"], p["B"], gates, *_of_mixture(call, gates))

    @override
    def mix_linear(
        self,
        p: Values,
        gates: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: Call,
        slots: Tensor | None,
    ) -> Tensor:
        from autopeft.kernels.mixture_lora import mixture_lora_linear

        return mixture_lora_linear(x, weight, bias, p["A"], p["B"], gates, *_of_mixture(call, gates), slots)

    @override
    def merge(self, p: Values, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * (p["B"] @ p["A"]), bias


def _of_mixture(call: Call, gates: Tensor) -> tuple[Tensor, Tensor | None, int]:
    """Return the scale [K], the mask [K, E, R] and the largest number of nonzero gates per token. gates: [K, M, E]."""
    mask = None if call.mask is None else call.mask[:, None].expand(-1, gates.shape[-1], -1)
    return call.constants["scale"], mask, int(call.max_over_slots("num_active"))
