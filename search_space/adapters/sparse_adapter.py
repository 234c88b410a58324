"""SparseAdapter: a bottleneck adapter whose projections are pruned before training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import check_at_least, check_one_of, check_positive
from autopeft.search_space.adapters.bottleneck import Bottleneck
from autopeft.search_space.adapters.shira import scattered
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Kept, Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values

KEPT = ("magnitude", "snip")


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseAdapter(Bottleneck):
    """A `Bottleneck` in which `density` of the entries of each projection remain, chosen once before training.

    `kept`: the entries w with the largest |w| at the start ("magnitude") or with the largest |w * dL/dw| ("snip",
    Lee et al. 2019), where L is the loss of 32 training rows and the adapter is the only one on the model. The
    others are zero, and neither count nor are stored. Large-Sparse is a larger `size` at a smaller `density`.
    """

    kind: ClassVar[str] = "sparseadapter"
    per_slot_fields: ClassVar[tuple[str, ...]] = (*Bottleneck.per_slot_fields, "kept")
    can_be_expert: ClassVar[bool] = False  # the experts of a site would keep the same entries
    source: ClassVar[str] = "He et al. 2022, SparseAdapter, section 3"
    summary: ClassVar[str] = "bottleneck whose projections are pruned before training"

    init: str = "houlsby"
    density: float = 0.2
    kept: str = "magnitude"

    def __post_init__(self) -> None:
        Bottleneck.__post_init__(self)
        check_positive("density", self.density)
        check_at_least("density", self.density, 0.0, 1.0)
        check_one_of("kept", self.kept, KEPT)
        if self.init == "zero":
            raise ValueError("init must be houlsby or kaiming for sparseadapter: zeros have no entries to choose from")

    @property
    @override
    def nested(self) -> bool:
        return False

    def before_pruning(self) -> Bottleneck:
        """Return the adapter with all entries."""
        names = ("size", "form", "activation", "init", "scale")
        return Bottleneck(**{name: getattr(self, name) for name in names})

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        whole = self.before_pruning()
        own: dict[str, Parameter] = {}
        for name, declared in whole.parameters(site).items():
            if name.endswith("bias"):
                own[name] = declared
                continue
            shape = (self.size * max(1, round(self.density * declared.count / self.size)),)
            init = Kept(of=whole, tensor=name, units=0 if name == "down" else 1, snip=self.kept == "snip")
            own[name] = Parameter(shape=shape, init=init)
            own[f"{name}_places"] = Parameter(shape=shape, init=init, trainable=False, indices=True)
        return own

    @override
    def apply(self, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        units, z = p["down_bias"].shape[1], y if self.form == "serial" else x
        down, up = (
            scattered(p[name], p[f"{name}_places"], units * width, call.mask).unflatten(1, (units, width))
            for name, width in (("down", z.shape[-1]), ("up", y.shape[-1]))
        )
        return Bottleneck.apply(self, {**p, "down": down, "up": up.mT}, x, y, call)
