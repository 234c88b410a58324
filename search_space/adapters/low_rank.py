"""Base of types whose update is a low-rank product of factors that are made of the parameters."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import AdapterSpec
from autopeft.search_space.backbones.backbone import LINEAR_ROLES, Site

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank(AdapterSpec):
    """y + scale * B A x, where A: [R, D_in] and B: [D_out, R] follow from the parameters.

    A type states its factors alone. They serve the forward pass, merging, and exporters: once trained, each of these
    adapters is a plain LoRA, for tools that have LoRA and not this type.
    """

    roles: ClassVar[tuple[str, ...]] = LINEAR_ROLES
    default_roles: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    size_field: ClassVar[str | None] = "rank"
    mergeable: ClassVar[bool] = True

    @abstractmethod
    def matrices(self, p: Values) -> tuple[Tensor, Tensor]:
        """Return A: [K, R, D_in] and B: [K, D_out, R]; of smaller slots, what is beyond their own rank is ignored."""

    @property
    def total_rank(self) -> int:
        """R, the rank of the plain LoRA that computes the same."""
        assert self.size is not None
        return self.size

    @property
    def update_scale(self) -> float:
        """The scale of B A x."""
        return 1.0

    def owned(self, mask: Tensor | None) -> Tensor | None:
        """Return [K, R] with 1 for the ranks of the factors that a slot owns, from the mask of sizes."""
        return mask

    def matrices_of_one(self, p: Values) -> tuple[Tensor, Tensor]:
        """Return A: [R, D_in] and B: [D_out, R], which includes the scale, from the parameters of one slot."""
        a, b = self.matrices({name: value[None] for name, value in p.items()})
        return a[0], self.update_scale * b[0]

    @override
    def flops_per_token(self, site: Site) -> int:
        return 2 * self.total_rank * (site.in_features + site.out_features)

    @override
    def constants(self, site: Site) -> dict[str, Any]:
        return {"scale": self.update_scale}

    @override
    def apply(self, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        from autopeft.kernels.packed_lora import packed_lora

        return y + packed_lora(call.dropout(x), *self.matrices(p), call.constants["scale"], self.owned(call.mask))

    @override
    def apply_linear(
        self, p: Values, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call, slots: Tensor | None
    ) -> Tensor | None:
        from autopeft.kernels.packed_lora import packed_lora_linear

        if call.drops:
            return None
        owned = self.owned(call.mask)
        return packed_lora_linear(x, weight, bias, *self.matrices(p), call.constants["scale"], owned, slots)

    @override
    def merge(self, p: Values, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a, b = self.matrices_of_one(p)
        return weight + b @ a, bias
