"""Prefix tuning: trained keys and values that every query attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import AdapterSpec, check_at_least, check_one_of
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values

INITS = ("small_normal", "normal", "zeros")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix(AdapterSpec):
    """softmax(q [P_k; K]^T) [P_v; V] in every head; P_k, P_v: [L, D_kv] precede the keys and values of the tokens.

    The prefixes are trained directly, without the reparameterisation by an MLP of Li & Liang 2021 (section 4.3). They
    have no rotary embedding, and the positions of the tokens still start at 0. (HF peft passes the prefix as a cache,
    which shifts the tokens by L.) Causal masks and sliding windows do not apply to prefixes. A prefix is never the
    identity, because even a prefix of zeros has a share of the softmax.

    `init`: "small_normal" has standard deviation 0.02, "normal" has 1, as in HF peft. A prefix at attn together with a
    parallel bottleneck at mlp is the MAM adapter of He et al. 2022 (section 4.6).
    """

    kind: ClassVar[str] = "prefix"
    roles: ClassVar[tuple[str, ...]] = ("attn",)
    default_roles: ClassVar[tuple[str, ...]] = ("attn",)
    size_field: ClassVar[str | None] = "length"
    per_slot_fields: ClassVar[tuple[str, ...]] = ("init",)
    identity_at_start: ClassVar[bool] = False
    can_be_expert: ClassVar[bool] = False
    needs: ClassVar[str] = "attention by transformers' attention interface, and known sizes of the key and value heads"
    source: ClassVar[str] = "Li & Liang 2021, Prefix-Tuning, section 4.2"
    summary: ClassVar[str] = "trained keys and values in attention"

    length: int = 16
    init: str = "small_normal"

    def __post_init__(self) -> None:
        AdapterSpec.__post_init__(self)
        check_at_least("length", self.length, 1)
        check_one_of("init", self.init, INITS)

    @override
    def fits(self, site: Site) -> bool:
        return site.attention_interface and site.num_key_value_heads is not None and site.head_dim is not None

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        if site.num_key_value_heads is None or site.head_dim is None:
            raise ValueError(
                f"a prefix needs the number and size of the key and value heads, which are unknown at {site.name!r}"
            )
        shape = (self.length, site.num_key_value_heads * site.head_dim)
        return {name: Parameter(shape=shape, init=self.init) for name in ("K", "V")}

    @override
    def flops_per_token(self, site: Site) -> int:
        # Scores and weighted sum, over all query heads: 2 * 2 * L * D.
        return 4 * self.length * site.out_features

    @override
    def extend_attention(self, p: Values, call: Call) -> tuple[Tensor, Tensor]:
        return p["K"], p["V"]
