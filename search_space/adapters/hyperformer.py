"""HyperFormer++: bottlenecks whose weights one network, which all sites share, makes of an embedding of each site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import check_at_least
from autopeft.search_space.adapters.bottlenecks import BottleneckForm, Layers
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperformer(BottleneckForm):
    """y + scale * (gain * normalised(W_up act(W_down z + b_down) + b_up) + shift): every weight is linear in I.

    I: [t] = normalised(V relu(U e + b) + c), where e: [t] belongs to the site and is trained. The model has one network
    for all sites: U: [2 t, t], V: [t, 2 t] and a tensor for each weight, such as [R, D, t] for W_down = [R, D, t] I.
    Those for gain and shift start at zero, so the adapter starts as the identity (in the paper they are small).

    The paper concatenates the embeddings of a task, a layer and a position, and trains several tasks at once. Here is
    one task: an embedding of each site stands for all three. "Normalised" is to mean 0 and variance 1.
    """

    kind: ClassVar[str] = "hyperformer"
    default_roles: ClassVar[tuple[str, ...]] = ("attn", "mlp")
    can_be_expert: ClassVar[bool] = False  # experts would share the network
    source: ClassVar[str] = "Karimi Mahabadi et al. 2021, Parameter-efficient Multi-task Fine-tuning, section 2.3"
    summary: ClassVar[str] = "bottleneck whose weights a network makes, which all sites share"

    activation: str = "gelu"
    embedding: int = 64

    def __post_init__(self) -> None:
        BottleneckForm.__post_init__(self)
        check_at_least("embedding", self.embedding, 2)

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        t, out = self.embedding, site.out_features

        def shared(*shape: int, init: str = "zeros") -> Parameter:
            return Parameter(shape=shape, init=init, scope="model", decay=len(shape) > 1)

        return {
            "e": Parameter(shape=(t,), init="normal", decay=False),
            "U": shared(2 * t, t, init="kaiming"),
            "b": shared(2 * t),
            "V": shared(t, 2 * t, init="kaiming"),
            "c": shared(t),
            "down": shared(self.size, self.width(site), t, init="houlsby"),
            "down_bias": shared(self.size, t, init="houlsby"),
            "up": shared(out, self.size, t, init="houlsby"),
            "up_bias": shared(out, t, init="houlsby"),
            "gain": shared(out, t),
            "shift": shared(out, t),
        }

    @override
    def layers(self, p: Values) -> Layers:
        made = _input(p)
        return Layers(*(_times(p[name], made) for name in ("down", "down_bias", "up", "up_bias")))

    @override
    def apply(self, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        import torch.nn.functional as F

        made = _input(p)
        gain, shift = (_times(p[name], made)[:, None] for name in ("gain", "shift"))
        change = F.layer_norm(self.run(p, x, y, None, call, scaled=False), (y.shape[-1],)) * gain + shift
        return y + call.dropout(call.constants["scale"][:, None, None] * change)


def _input(p: Values) -> Tensor:
    """Return I: [K, t], the input of the linear maps to the weights."""
    import torch.nn.functional as F

    hidden = (_times(p["U"], p["e"]) + p["b"]).relu()
    made = _times(p["V"], hidden) + p["c"]
    return F.layer_norm(made, made.shape[1:])


def _times(tensor: Tensor, vector: Tensor) -> Tensor:
    """Return the product of [K, ..., t] and [K, t] over t: [K, ...]."""
    return (tensor.flatten(1, -2) @ vector[..., None]).view(tensor.shape[:-1])
