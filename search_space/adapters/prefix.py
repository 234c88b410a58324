"""Prefix tuning: trained keys and values that every query may attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from autopeft.search_space.adapters.base import AdapterSpec, check_at_least, check_one_of
from autopeft.search_space.parameter import Parameter

INITS = ("small_normal", "normal", "zeros")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix(AdapterSpec):
    """softmax(q [P_k; K]^T) [P_v; V] in every head; P_k, P_v: [L, D_kv] precede the tokens' keys and values.

    The prefixes are trained directly; the reparameterisation through an MLP of Li & Liang 2021 (section 4.3)
    is left out. They get no rotary embedding, and the positions of the tokens still start at 0. (HF peft
    passes the prefix as a cache and so shifts the tokens by L.) Causal masks and sliding windows do not apply
    to them. Even a prefix of zeros takes its share of the softmax, so none is the identity.

    `init`: "small_normal" has standard deviation 0.02, "normal" 1 as in HF peft. A prefix at attn and a
    parallel bottleneck at mlp are the MAM adapter of He et al. 2022 (section 4.6).
    """

    kind: ClassVar[str] = "prefix"
    roles: ClassVar[tuple[str, ...]] = ("attn",)
    default_roles: ClassVar[tuple[str, ...]] = ("attn",)
    size_field: ClassVar[str | None] = "length"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("init",)
    identity_at_start: ClassVar[bool] = False
    can_be_expert: ClassVar[bool] = False
    source: ClassVar[str] = "Li & Liang 2021, Prefix-Tuning, section 4.2"
    summary: ClassVar[str] = "trained keys and values in attention"

    length: int = 16
    init: str = "small_normal"

    def __post_init__(self) -> None:
        check_at_least("length", self.length, 1)
        check_one_of("init", self.init, INITS)

    def fits(self, site):
        return site.num_key_value_heads is not None and site.head_dim is not None

    def parameters(self, site):
        if not self.fits(site):
            raise ValueError(f"a prefix needs the key and value heads, which are not known at {site.name!r}")
        shape = (self.length, site.num_key_value_heads * site.head_dim)
        return {name: Parameter(shape=shape, init=self.init) for name in ("K", "V")}

    def flops_per_token(self, site):
        # Scores and weighted sum, over all query heads: 2 * 2 * L * D.
        return 4 * self.length * site.out_features

    def extend_attention(self, p, call):
        return p["K"], p["V"]
