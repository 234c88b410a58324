"""VeRA: a low-rank update by random matrices that all sites share, scaled by trained vectors of each site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import AdapterSpec, check_at_least, check_probability
from autopeft.search_space.adapters.low_rank import LowRank
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Vera(LowRank):
    """y + b * B (d * A x), where A: [R, D_in] and B: [D_out, R] are random and frozen.

    The vectors are trained: d: [R] starts at `d_initial`, b: [D_out] at zero. The model has one A and one B, in the
    size of its largest site; other sites read the first rows and columns, as in peft. A and B are drawn from
    `projection_key`, not from a slot's seed: all slots have the same ones, and they are not stored.
    """

    kind: ClassVar[str] = "vera"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("dropout", "d_initial")
    repeatable: ClassVar[bool] = False  # a second one would be a copy, because all random values are shared
    can_be_expert: ClassVar[bool] = False  # for the same reason
    source: ClassVar[str] = "Kopiczko et al. 2024, VeRA, section 3.1"
    summary: ClassVar[str] = "scales of a random low-rank update that all sites share"

    rank: int = 256
    dropout: float = 0.0
    d_initial: float = 0.1
    projection_key: int = 0

    def __post_init__(self) -> None:
        AdapterSpec.__post_init__(self)
        check_at_least("rank", self.rank, 1)
        check_probability("dropout", self.dropout)
        check_at_least("projection_key", self.projection_key, 0, 2**63 - 1)

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        def shared(*shape: int) -> Parameter:
            return Parameter(shape=shape, init="he", trainable=False, scope="model", key=self.projection_key)

        return {
            "d": Parameter(shape=(self.rank,), init=float(self.d_initial), decay=False),
            "b": Parameter(shape=(site.out_features,), decay=False),
            "A": shared(self.rank, site.in_features),
            "B": shared(site.out_features, self.rank),
        }

    @override
    def apply(self, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        # If slots differ in size, A and B beyond a slot's own size are zero, or the supernet's, which the mask removes.
        d = p["d"] if call.mask is None else p["d"] * call.mask
        inner = call.dropout(x) @ p["A"].mT * d[:, None]
        return y + inner @ p["B"].mT * p["b"][:, None]

    @override
    def matrices(self, p: Values) -> tuple[Tensor, Tensor]:
        return p["d"][..., None] * p["A"], p["b"][..., None] * p["B"]
