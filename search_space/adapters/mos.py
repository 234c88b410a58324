"""MoS: a low-rank update whose factors are made of shards from pools that sites share, and of rows of their own."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import AdapterSpec, check_at_least, check_probability
from autopeft.search_space.adapters.linear_operators import divisors
from autopeft.search_space.adapters.low_rank import LowRank
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Draws, Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Mos(LowRank):
    """y + scale * B A x, where most rows of A and columns of B are put together from N shards of public pools.

    The pools, A: [P, D_in] and B: [P, D_out], are trained and shared by all sites of the same role and features; the
    adapters of a model with L of these have as many parameters as LoRAs of rank P / L + Q. Each of their vectors is cut
    into N shards. The places of the shards of a site are random and fixed, with other ones for A than for B, so that
    pairs of a row and a column are of the site alone (`A_places` and `B_places`: [R, N]; within a factor of a site, no
    shard occurs twice as long as there are others). Q further rows and columns are private: they belong to the site.

    `rank`: R. `pool`: P. `private_rank`: Q. N is the largest divisor of D_in and D_out up to `shards`. `pool`, `shards`
    and `private_rank` do not nest, so in a supernet each value has its own weights, except of the pools.
    """

    kind: ClassVar[str] = "mos"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("scale", "dropout")
    can_be_expert: ClassVar[bool] = False  # the experts would share the pools
    source: ClassVar[str] = "Wang et al. 2025, MoS: Mixture of Shards, section 3"
    summary: ClassVar[str] = "low-rank update whose factors consist of shards from pools that sites share"

    rank: int = 8
    pool: int = 32
    shards: int = 4
    private_rank: int = 1
    scale: float = 2.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        AdapterSpec.__post_init__(self)
        for name in ("rank", "pool", "shards", "private_rank"):
            check_at_least(name, getattr(self, name), 1)
        check_probability("dropout", self.dropout)

    @property
    @override
    def total_rank(self) -> int:
        return self.rank + self.private_rank

    @property
    @override
    def update_scale(self) -> float:
        return float(self.scale)

    def cuts(self, site: Site) -> int:
        """Return the number N of shards of a vector at `site`."""
        return max(d for d in divisors(gcd(site.in_features, site.out_features)) if d <= self.shards)

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        cuts = self.cuts(site)
        places = Parameter(shape=(self.rank, cuts), init=Draws(below=self.pool * cuts), trainable=False, indices=True)
        return {
            "A_private": Parameter(shape=(self.private_rank, site.in_features), init="kaiming"),
            "B_private": Parameter(shape=(self.private_rank, site.out_features)),
            "A": Parameter(shape=(self.pool, site.in_features), init="kaiming", scope="role"),
            "B": Parameter(shape=(self.pool, site.out_features), scope="role"),
            "A_places": places,
            "B_places": places,
        }

    @override
    def owned(self, mask: Tensor | None) -> Tensor | None:
        import torch

        return None if mask is None else torch.cat([mask, mask.new_ones(len(mask), self.private_rank)], 1)

    @override
    def matrices(self, p: Values) -> tuple[Tensor, Tensor]:
        import torch

        a, b = (torch.cat([_gathered(p[name], p[f"{name}_places"]), p[f"{name}_private"]], 1) for name in "AB")
        return a, b.mT


def _gathered(pool: Tensor, places: Tensor) -> Tensor:
    """Return vectors of shards. pool: [K, P, D], places: [K, R, N] of shards of D / N values. Returns [K, R, D]."""
    import torch

    shards = pool.reshape(len(pool), -1, pool.shape[-1] // places.shape[-1])
    slots = torch.arange(len(pool), device=pool.device)[:, None, None]
    return shards[slots, places.long()].flatten(2)
