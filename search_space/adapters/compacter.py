"""Compacter: bottlenecks of Kronecker products, one factor of which all sites share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import check_at_least
from autopeft.search_space.adapters.bottlenecks import BlockBottleneck, Layers, kronecker
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from autopeft.search_space.call import Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Compacter(BlockBottleneck):
    """A bottleneck of n R units (see `bottlenecks.py`), both projections of which are sum_i A_i kron (s_i t_i).

    A: [n, n, n] is trained and the same in both projections of all sites. Each site has factors s: [n, R, r] and
    t: [n, r, D / n] down, s: [n, D / n, r] and t: [n, r, R] up, and biases. With r = 1, the projections of a site take
    2 (n R + D) numbers, and A takes n^3. n is the largest divisor of the features up to `blocks`; sites with another n
    have another A. A starts as normal with a standard deviation of 0.01, truncated at two, the factors by the rule of
    Glorot: nearly the identity. At attn and mlp it is Compacter, at mlp alone Compacter++. The paper also trains the
    norms, which is the type `norm`.
    """

    kind: ClassVar[str] = "compacter"
    default_roles: ClassVar[tuple[str, ...]] = ("attn", "mlp")
    identity_at_start: ClassVar[bool] = False
    can_be_expert: ClassVar[bool] = False  # experts would share A
    source: ClassVar[str] = "Karimi Mahabadi et al. 2021, Compacter, section 4"
    summary: ClassVar[str] = "bottleneck of Kronecker products with a factor that all sites share"

    activation: str = "gelu"
    rank: int = 1

    def __post_init__(self) -> None:
        BlockBottleneck.__post_init__(self)
        check_at_least("rank", self.rank, 1)

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        n, into, out = self.grid(site), self.width(site), site.out_features
        return {
            "down_s": Parameter(shape=(n, self.size, self.rank), init="glorot"),
            "down_t": Parameter(shape=(n, self.rank, into // n), init="glorot"),
            "down_bias": Parameter(shape=(n, self.size), decay=False),
            "up_s": Parameter(shape=(n, out // n, self.rank), init="glorot"),
            "up_t": Parameter(shape=(n, self.rank, self.size), init="glorot"),
            "up_bias": Parameter(shape=(out,), decay=False),
            f"A{n}": Parameter(shape=(n, n, n), init="houlsby", scope="model"),
        }

    @override
    def layers(self, p: Values) -> Layers:
        a = p[f"A{p['down_s'].shape[1]}"]
        down, up = (kronecker(a, p[f"{name}_s"] @ p[f"{name}_t"]) for name in ("down", "up"))
        return Layers(down, p["down_bias"].flatten(1), up, p["up_bias"])
