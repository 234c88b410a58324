"""(IA)^3: trained scales of keys, values and the inner activations of the mlp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from autopeft.search_space.adapters.base import AdapterSpec
from autopeft.search_space.parameter import Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Ia3(AdapterSpec):
    """y = l * (W x + b) at attention projections, y = W (l * x) + b at `mlp.down`.

    l is one at the start, which is the identity.
    `output` or `input`: l as [D_out] or [D_in]. At a fused `attn.qkv` the queries are scaled too, as in peft.
    """

    kind: ClassVar[str] = "ia3"
    roles: ClassVar[tuple[str, ...]] = ("attn.k", "attn.v", "attn.qkv", "mlp.down")
    default_roles: ClassVar[tuple[str, ...]] = ("attn.k", "attn.v", "attn.qkv", "mlp.down")
    mergeable: ClassVar[bool] = True
    source: ClassVar[str] = "Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning, section 3.3"
    summary: ClassVar[str] = "scales of keys, values and inner activations"

    def parameters(self, site):
        if site.role == "mlp.down":
            return {"input": Parameter(shape=(site.in_features,), init="ones", decay=False)}
        return {"output": Parameter(shape=(site.out_features,), init="ones", decay=False)}

    def flops_per_token(self, site):
        return 0

    def implements(self, method, site):
        return method in (("apply_input",) if site.role == "mlp.down" else ("apply", "mix"))

    def apply_input(self, p, x, call):
        return x * p["input"][:, None, :] if "input" in p else x

    def apply(self, p, x, y, call):
        return y * p["output"][:, None, :] if "output" in p else y

    def mix(self, p, gates, x, y, call):
        return y * (gates @ (p["output"] - 1.0))

    def merge(self, p, weight, bias):
        if "input" in p:
            return weight * p["input"], bias
        return weight * p["output"][:, None], None if bias is None else bias * p["output"]
