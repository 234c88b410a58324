"""(IA)^3: trained scales of keys, values and the inner activations of the mlp, and of other linears if asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import AdapterSpec
from autopeft.search_space.backbones.backbone import LINEAR_ROLES, Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Ia3(AdapterSpec):
    """y = l * (W x + b), but y = W (l * x) + b at `mlp.down`.

    l is one at the start, which is the identity. The parameter is called `input`: [D_in] at `mlp.down` and `output`:
    [D_out] elsewhere. The default roles are those of the paper; other linears are possible as in peft. At a fused
    `attn.qkv` the queries are scaled too, as in peft.
    """

    kind: ClassVar[str] = "ia3"
    roles: ClassVar[tuple[str, ...]] = LINEAR_ROLES
    default_roles: ClassVar[tuple[str, ...]] = ("attn.k", "attn.v", "attn.qkv", "mlp.down")
    mergeable: ClassVar[bool] = True
    source: ClassVar[str] = "Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning, section 3.3"
    summary: ClassVar[str] = "scales of keys, values and inner activations"

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        if site.role == "mlp.down":
            return {"input": Parameter(shape=(site.in_features,), init="ones", decay=False)}
        return {"output": Parameter(shape=(site.out_features,), init="ones", decay=False)}

    @override
    def flops_per_token(self, site: Site) -> int:
        return 0

    @override
    def implements(self, method: str, site: Site) -> bool:
        return method in (("apply_input",) if site.role == "mlp.down" else ("apply", "mix"))

    @override
    def apply_input(self, p: Values, x: Tensor, call: Call) -> Tensor:
        return x * p["input"][:, None, :] if "input" in p else x

    @override
    def apply(self, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        return y * p["output"][:, None, :] if "output" in p else y

    @override
    def mix(self, p: Values, gates: Tensor, x: Tensor, y: Tensor, call: Call) -> Tensor:
        return y * (gates @ (p["output"] - 1.0))

    @override
    def merge(self, p: Values, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if "input" in p:
            return weight * p["input"], bias
        return weight * p["output"][:, None], None if bias is None else bias * p["output"]
