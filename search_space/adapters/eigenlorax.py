"""EigenLoRAx: a low-rank update in the principal subspaces of pretrained LoRAs."""

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

    from autopeft.search_space.call import Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Eigenlorax(LowRank):
    """y + scale * (V C) (D U) x, where the rows of U: [N, D_in] and the columns of V: [D_out, N] are frozen.

    U are the leading right singular vectors of the matrices A of the pretrained LoRAs in `given`, one below the other;
    V those of their B, scaled as each LoRA scales them. They are orthonormal and not centred, so that each of these
    LoRAs can be expressed if N is large enough. Where the LoRAs span fewer directions, random ones orthogonal to them
    follow. The coefficients D: [R, N] and C: [N, R] alone are trained; C is zero at the start.

    `rank`: R. `components`: N, or the number of inputs or outputs if that is smaller. U and V are stored, because the
    folders may not be there later.
    """

    kind: ClassVar[str] = "eigenlorax"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("scale", "dropout")
    can_be_expert: ClassVar[bool] = False  # all experts would have the same basis
    takes_given: ClassVar[bool] = True
    source: ClassVar[str] = "Kaushik et al. 2025, EigenLoRAx: Recycling Adapters to Find Principal Subspaces, section 3"
    summary: ClassVar[str] = "coefficients in the principal subspaces of pretrained LoRAs"

    rank: int = 8
    components: int = 16
    scale: float = 2.0
    dropout: float = 0.0
    given: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        AdapterSpec.__post_init__(self)
        check_at_least("rank", self.rank, 1)
        check_at_least("components", self.components, 1)
        check_probability("dropout", self.dropout)
        object.__setattr__(self, "given", tuple(self.given))  # a file has a list

    @property
    @override
    def update_scale(self) -> float:
        return float(self.scale)

    def directions(self, site: Site) -> int:
        """Return the number N of directions at `site`."""
        return min(self.components, site.in_features, site.out_features)

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        def basis(side: str, *shape: int) -> Parameter:
            return Parameter(shape=shape, init="orthogonal", trainable=False, given=self.given, given_side=side)

        count = self.directions(site)
        return {
            "D": Parameter(shape=(self.rank, count), init="kaiming"),
            "C": Parameter(shape=(count, self.rank)),
            "U": basis("A", count, site.in_features),
            "V": basis("B", site.out_features, count),
        }

    @override
    def matrices(self, p: Values) -> tuple[Tensor, Tensor]:
        return p["D"] @ p["U"], p["V"] @ p["C"]
