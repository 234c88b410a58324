"""RandLoRA: a sum of random matrices that all sites share, scaled by trained vectors, whose rank is that of W."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import check_at_least, check_positive, check_probability
from autopeft.search_space.adapters.linear_operators import Numbers, OutputOperator
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Randlora(OutputOperator):
    """y + alpha / R * sum_j B_j L_j A G_j x, or the transposed sum if D_in > D_out.

    With d the smaller and D the larger of D_in and D_out, there are N = d / R terms, rounded up, so that the update can
    have full rank. A: [R, d] and the B_j, [D, R], are random and frozen; the model has one set of them in the size of
    its largest site, of which other sites read the first rows and columns, as in peft. They are drawn from
    `projection_key` and not stored. The diagonals are trained: L: [R, N] starts at zero, G: [N, d] at 1 / d.

    As in peft, whose weights it computes with, the columns of B are in the order of the terms and the rows of L_j A G_j
    in the order of the ranks, so that a row does not always meet a column of its own term. All of them are alike.

    The larger the rank, the fewer parameters. Ranks do not nest, so in a supernet each has its own weights. The scaled
    factors, together as large as W and more, are made in each forward pass for each candidate.
    """

    kind: ClassVar[str] = "randlora"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("alpha", "dropout")
    repeatable: ClassVar[bool] = False  # a second one would be a copy, because all random values are shared
    can_be_expert: ClassVar[bool] = False  # for the same reason
    source: ClassVar[str] = "Albert et al. 2025, RandLoRA: Full-rank parameter-efficient fine-tuning, section 4"
    summary: ClassVar[str] = "scales of random matrices that all sites share, with an update of full rank"

    rank: int = 32
    alpha: float = 640.0
    dropout: float = 0.0
    projection_key: int = 0

    def __post_init__(self) -> None:
        OutputOperator.__post_init__(self)
        check_at_least("rank", self.rank, 1)
        check_positive("alpha", self.alpha)
        check_probability("dropout", self.dropout)
        check_at_least("projection_key", self.projection_key, 0, 2**63 - 1)

    @property
    @override
    def label(self) -> str:
        return f"randlora {self.rank}"

    def terms(self, site: Site) -> int:
        """Return the number N of random matrices in the sum."""
        return -(-min(site.in_features, site.out_features) // self.rank)

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        small, large = sorted((site.in_features, site.out_features))
        terms = self.terms(site)

        def shared(*shape: int) -> Parameter:
            return Parameter(shape=shape, init="unit_uniform", trainable=False, scope="model", key=self.projection_key)

        return {
            "L": Parameter(shape=(self.rank, terms), decay=False),
            "G": Parameter(shape=(terms, small), init=1.0 / small, decay=False),
            "A": shared(self.rank, small),
            "B": shared(large, terms, self.rank),
        }

    @override
    def flops_per_token(self, site: Site) -> int:
        return 2 * self.terms(site) * self.rank * (site.in_features + site.out_features)

    @override
    def numbers(self, in_features: int, out_features: int) -> dict[str, float]:
        return {"scale": self.alpha / self.rank}

    @override
    def act(self, p: Values, x: Tensor, y: Tensor, numbers: Numbers, mask: Tensor | None) -> Tensor:
        wide = p["B"].flatten(2)  # [K, D, N R]
        scaled = p["L"][..., None] * p["A"][:, :, None] * (numbers["scale"][:, None, None] * p["G"])[:, None]
        narrow = scaled.flatten(1, 2)  # [K, R N, d]
        return y + (x @ narrow.mT @ wide.mT if x.shape[-1] == narrow.shape[-1] else x @ wide @ narrow)
