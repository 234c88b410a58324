"""VB-LoRA: a low-rank update whose factors are made of vectors from one bank of the model."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import AdapterSpec, check_at_least, check_probability
from autopeft.search_space.adapters.linear_operators import divisors
from autopeft.search_space.adapters.low_rank import LowRank
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Vblora(LowRank):
    """y + B A x, where each row of A and each column of B consists of sub-vectors of L values from the bank.

    A sub-vector is the sum of `top_k` of the H vectors in the bank V: [H, L], weighted by the softmax of the largest
    `top_k` of its own logits. The bank is trained and shared by the model; the logits, a: [R, D_in / L, H] and b:
    [D_out / L, R, H], are trained for each site. Both are random at the start, so the update is small, but not zero.

    L is the largest divisor of D_in and D_out up to `vector_length`. A site with a smaller one than others reads the
    first values of the vectors; peft refuses such models. Logits of all vectors are trained and stored; the paper
    stores the chosen ones alone, as an exported LoRA does with the factors themselves.
    """

    kind: ClassVar[str] = "vblora"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("dropout",)
    identity_at_start: ClassVar[bool] = False
    can_be_expert: ClassVar[bool] = False  # the experts would share the bank
    source: ClassVar[str] = "Li et al. 2024, VB-LoRA, section 3"
    summary: ClassVar[str] = "low-rank update whose factors consist of vectors from a bank that all sites share"

    rank: int = 4
    vectors: int = 256
    vector_length: int = 256
    top_k: int = 2
    dropout: float = 0.0

    def __post_init__(self) -> None:
        AdapterSpec.__post_init__(self)
        check_at_least("rank", self.rank, 1)
        check_at_least("vectors", self.vectors, 1)
        check_at_least("vector_length", self.vector_length, 1)
        check_at_least("top_k", self.top_k, 1)
        check_probability("dropout", self.dropout)
        if self.top_k > self.vectors:
            raise ValueError(f"top_k must be at most vectors ({self.vectors}), got {self.top_k}")

    def length(self, site: Site) -> int:
        """Return the length L of the sub-vectors at `site`."""
        return max(d for d in divisors(gcd(site.in_features, site.out_features)) if d <= self.vector_length)

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        length = self.length(site)

        def logits(*shape: int) -> Parameter:
            return Parameter(shape=(*shape, self.vectors), init="vector_logits")

        return {
            "a": logits(self.rank, site.in_features // length),
            "b": logits(site.out_features // length, self.rank),
            "V": Parameter(shape=(self.vectors, length), init="vector_bank", scope="model"),
        }

    @override
    def matrices(self, p: Values) -> tuple[Tensor, Tensor]:
        # [K, R, D_in / L, L] and [K, D_out / L, R, L]
        a, b = (self._mixed(p[name], p["V"]) for name in ("a", "b"))
        return a.flatten(2), b.mT.flatten(1, 2)

    def _mixed(self, logits: Tensor, bank: Tensor) -> Tensor:
        """Return the sub-vectors. logits: [K, n, m, H], bank: [K, H, L]. Returns [K, n, m, L]."""
        import torch

        largest, chosen = logits.topk(self.top_k, dim=-1)
        slots = torch.arange(len(bank), device=bank.device)[:, None, None, None]
        return (largest.softmax(-1)[..., None] * bank[slots, chosen]).sum(-2)
