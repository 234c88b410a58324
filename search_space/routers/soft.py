"""Experts that act on weighted means of the tokens of a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter
from autopeft.search_space.routers.base import Router, one_row_each

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values
    from autopeft.search_space.routers.mixing import RoutedSpec


class Soft(Router):
    """Each expert acts on one mean of the tokens, weighted by a softmax of its z = W_r x over the text.

    Each token receives the outputs of all experts, weighted by a softmax of z over the experts.
    """

    name: ClassVar[str] = "soft"
    source: ClassVar[str] = "Puigcerver et al. 2023, Soft MoE, section 2.1"
    summary: ClassVar[str] = "experts on weighted means of the tokens of a text"
    uses: ClassVar[tuple[str, ...]] = ("router_noise",)
    reads_ahead: ClassVar[bool] = True
    has_gates: ClassVar[bool] = False
    can_lead: ClassVar[bool] = False

    @override
    def parameters(self, mixture: RoutedSpec, site: Site) -> dict[str, Parameter]:
        return {"router": one_row_each(mixture, site.in_features)}

    @override
    def flops_per_token(self, mixture: RoutedSpec, site: Site) -> int:
        # z, the means and their redistribution to the tokens; an expert runs once per text, which counts as zero.
        return 2 * mixture.experts * (2 * site.in_features + site.out_features)

    @override
    def mix(self, mixture: RoutedSpec, p: Values, x: Tensor, y: Tensor | None, call: Call) -> Tensor:
        if call.router.averaged:
            return super().mix(mixture, p, x, y, call)
        import torch

        from autopeft.search_space.routers.mixing import exact, expert_values, flat, weighted

        own, tokens, owned = expert_values(p), call.router.tokens, call.router.owned_experts
        texts, mask = tokens.by_text(x), tokens.mask
        logits = torch.einsum("kntd,ked->knte", exact(texts), exact(p["router"]))
        logits = call.noisy(logits, "router_noise")
        dispatch = logits if mask is None else logits.masked_fill(~mask[None, :, :, None], float("-inf"))
        dispatch = dispatch.softmax(2).to(x.dtype)
        combine = logits.masked_fill(owned[:, None, None] == 0, float("-inf")).softmax(-1).to(x.dtype)
        seen = [torch.einsum("knte,kntd->kend", dispatch, tokens.by_text(t)) for t in (x, y) if t is not None]
        act = mixture.expert.apply_input if y is None else mixture.expert.apply
        count = owned.shape[-1]
        if mixture.ranks:  # the LoRAs are no tensor [K, E, ...]: gates send each mean to its expert alone
            alone = torch.eye(count).to(x).repeat_interleave(texts.shape[1], 0).expand(len(x), -1, -1)
            added = weighted(mixture, own, alone, seen[0].flatten(1, 2), seen[-1].flatten(1, 2), call)
            change = torch.unflatten(added, 1, (count, -1))
        else:
            wide = [tensor.flatten(0, 1) for tensor in seen]
            change = act(flat(own), *wide, call.of_experts(count)) - wide[-1]
            change = torch.unflatten(change, 0, (-1, count))
        return torch.einsum("knte,kend->kntd", combine, change).flatten(1, 2)
