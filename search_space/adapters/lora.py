"""LoRA: a low-rank update parallel to a linear layer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
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
from autopeft.search_space.parameter import Factor, Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values

#: Initialisations of A that are random, with B at zero.
DRAWN = ("kaiming", "gaussian", "orthogonal")


@dataclass(frozen=True, slots=True, kw_only=True)
class FromSite:
    """Facts of an initialisation that reads the site; `runtime/factors.py` computes it.

    `offset`: whether B A is not zero at the start, so that its initial value is subtracted. `nested`: see
    `AdapterSpec.nested`. `components`: number of components of a decomposition for each rank.
    """

    offset: bool = True
    nested: bool = True
    components: int = 1


#: Initialisations by the weight of the site or by training rows.
FROM_SITE = {
    "pissa": FromSite(),
    "pissa_niter_4": FromSite(),
    "olora": FromSite(),
    "eva": FromSite(offset=False),
    "corda_ipm": FromSite(),
    "corda_kpm": FromSite(),
    "lora_ga": FromSite(nested=False, components=2),
}
INITS = (*DRAWN, *FROM_SITE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora(AdapterSpec):
    """y + scale * (B A - B0 A0) x, with A: [R, D_in] random and B: [D_out, R] zero at the start, and without B0 A0.

    `scaling`: "alpha" divides alpha by the rank (Hu et al. 2021, section 4.1), "rslora" by the square root of the rank
    (Kalajdzievski 2023, theorem 3.2). `init` is the distribution of A: "kaiming" is uniform with a = sqrt(5), as in the
    reference code, "gaussian" has standard deviation 1/R, "orthogonal" has orthonormal rows.

    Other inits read the site, and most start with B A other than 0: these initial values, A0 and B0, are kept beside
    the shared weight, frozen and stored, so the adapter computes and stores as much as one of twice the rank. Dropout
    spares them. "pissa": A and B have the leading singular values of W (Meng et al. 2024), by the full decomposition or
    by four subspace iterations ("pissa_niter_4"). "olora": B and A are the leading parts of W = Q R (Büyükakyüz 2024).
    In a supernet, a smaller rank starts with the leading part of the values of the largest.

    The others read 256 training rows, the same for all seeds, through the model without adapters. "eva": A has the
    leading principal directions of the inputs (Paischer et al. 2024; ranks are not redistributed, rho = 1), B is zero.
    "corda_ipm", "corda_kpm": components of W C, with the inputs' second moment C, multiplied by the inverse of C, with
    the largest (instruction-previewed) or the smallest singular values (knowledge-preserved; Yang et al. 2024).
    "lora_ga": singular vectors of the gradient of W (Wang et al. 2024), scaled as peft scales them.

    `rate_ratio`: the learning rate of B divided by that of A (Hayou et al. 2024, LoRA+). `freeze_a`: A keeps its
    initial values and B alone is trained (Zhang et al. 2023, LoRA-FA); A is stored with B.
    """

    kind: ClassVar[str] = "lora"
    roles: ClassVar[tuple[str, ...]] = LINEAR_ROLES
    default_roles: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    size_field: ClassVar[str | None] = "rank"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("alpha", "scaling", "dropout", "init", "rate_ratio")
    later_fields: ClassVar[tuple[str, ...]] = (*AdapterSpec.later_fields, "rate_ratio", "freeze_a")
    mergeable: ClassVar[bool] = True
    needs: ClassVar[str] = "linear layers with at least as many inputs and outputs as its rank"
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
        if self.init in FROM_SITE:
            check_positive("alpha", self.alpha)

    @property
    def scale(self) -> float:
        """Factor of B A x that follows from `alpha`, `rank` and `scaling`."""
        return self.alpha / (sqrt(self.rank) if self.scaling == "rslora" else self.rank)

    @property
    def has_offset(self) -> bool:
        """Whether the initial value of B A is subtracted."""
        return self.init in FROM_SITE and FROM_SITE[self.init].offset

    @property
    @override
    def nested(self) -> bool:
        return self.init in DRAWN or FROM_SITE[self.init].nested

    @classmethod
    @override
    def strictest(cls, offered: Mapping[str, Collection[object]]) -> dict[str, Any]:
        init = from_site(offered.get("init", ()))
        return {"init": init} if init else {}

    @override
    def fits(self, site: Site) -> bool:
        if self.init in DRAWN:
            return True
        return self.rank * FROM_SITE[self.init].components <= min(site.in_features, site.out_features)

    @override
    def structure(self) -> tuple[Any, ...]:
        return (*AdapterSpec.structure(self), self.has_offset)

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        shapes = {"A": (self.rank, site.in_features), "B": (site.out_features, self.rank)}
        init: dict[str, str | Factor] = {"A": self.init, "B": "zeros"}
        if self.init in FROM_SITE:
            init["A"] = Factor(rule=self.init, side="A", scale=self.scale)
        if self.has_offset:
            init["B"] = Factor(rule=self.init, side="B", scale=self.scale)
        own = {
            name: Parameter(shape=shape, init=init[name], trainable=name == "B" or not self.freeze_a)
            for name, shape in shapes.items()
        }
        if not self.has_offset:
            return own
        return own | {f"{name}0": replace(parameter, trainable=False) for name, parameter in own.items()}

    @override
    def rate_of(self, name: str) -> float:
        return self.rate if name == "A" else self.rate * self.rate_ratio

    @override
    def flops_per_token(self, site: Site) -> int:
        return 2 * self.rank * (site.in_features + site.out_features) * (2 if self.has_offset else 1)

    @override
    def constants(self, site: Site) -> dict[str, Any]:
        return {"scale": self.scale}

    @override
    def apply(self, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        from autopeft.kernels.packed_lora import packed_lora

        dropped, scale = call.dropout(x), call.constants["scale"]
        if dropped is x:
            return y + packed_lora(x, *with_offset(p, call.mask, scale))
        y = y + packed_lora(dropped, p["A"], p["B"], scale, call.mask)
        return y - packed_lora(x, p["A0"], p["B0"], scale, call.mask) if self.has_offset else y

    @override
    def apply_linear(
        self, p: Values, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call, slots: Tensor | None
    ) -> Tensor | None:
        from autopeft.kernels.packed_lora import packed_lora_linear

        if call.drops:
            return None
        return packed_lora_linear(x, weight, bias, *with_offset(p, call.mask, call.constants["scale"]), slots)

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
        change = p["B"] @ p["A"] - p["B0"] @ p["A0"] if self.has_offset else p["B"] @ p["A"]
        return weight + self.scale * change, bias


def with_offset(p: Values, mask: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return A, B, scale and mask of a plain LoRA that computes the same, of twice the rank if there is an offset."""
    if "A0" not in p:
        return p["A"], p["B"], scale, mask
    import torch

    a, b = torch.cat([p["A"], p["A0"]], dim=-2), torch.cat([p["B"], -p["B0"]], dim=-1)
    return a, b, scale, None if mask is None else torch.cat([mask, mask], dim=-1)


def from_site(values: Iterable[object]) -> str | None:
    """Return the init among the values of the field that reads most of the site; None: none of them reads it."""
    found = [value for value in values if isinstance(value, str) and value in FROM_SITE]
    return max(found, key=lambda name: FROM_SITE[name].components, default=None)


def experts_problem(init: str) -> str:
    """Return why an init that reads the site is not for the experts of a mixture."""
    return f"{init} would start all experts of a site with the same values: for mixtures, use {', '.join(DRAWN)}"


def _of_mixture(call: Call, gates: Tensor) -> tuple[Tensor, Tensor | None, int]:
    """Return the scale [K], the mask [K, E, R] and the largest number of nonzero gates per token. gates: [K, M, E]."""
    mask = None if call.mask is None else call.mask[:, None].expand(-1, gates.shape[-1], -1)
    return call.constants["scale"], mask, int(call.max_over_slots("num_active"))
