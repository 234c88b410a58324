"""Routing: which experts of a mixture act on a token, how much, and what they add together.

Notation: K slots, N texts of T tokens, M = N * T, E experts that a router chooses from, S shared ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from autopeft.search_space.routers import BALANCED, CHOOSING, DECIDING_BY_TEXT

if TYPE_CHECKING:
    from autopeft.search_space.call import Call

Values = Mapping[str, Tensor]


class RoutedSpec(Protocol):
    """What routing reads of a mixture."""

    @property
    def expert(self) -> Any: ...
    @property
    def router(self) -> str: ...
    @property
    def shared_experts(self) -> int: ...
    @property
    def ranks(self) -> tuple[int, ...]: ...
    @property
    def tasks(self) -> int: ...
    @property
    def heads(self) -> int: ...


@dataclass(slots=True)
class Routing:
    """What a router did in one forward pass. `penalty`: [K], to be added to the slots' losses. Without gradients:
    `load`: [K, E] shares of what was sent out, `entropy`: [K] mean entropy of the probabilities as a share of the
    largest that there is (where the bank is watched), `active`: [K] experts that a token met, `count`: tokens (or
    texts) that were routed.
    """

    penalty: Tensor
    load: Tensor
    entropy: Tensor
    active: Tensor
    count: Tensor


def mixed(spec: RoutedSpec, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
    """y: [K, M, D_out] with what the experts add to it. x: [K, M, D_in]."""
    own = _of_experts(p)
    if spec.router == "soft" and not call.bank.averaged:
        return y + _soft(spec, p, own, x, y, call)
    if spec.router == "poly":
        return y + _poly(spec, p, x, call)
    return y + _weighted(spec, own, routed(spec, p, x, call), x, y, call)


def mixed_linear(
    spec: RoutedSpec, p: Values, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call, slots: Tensor | None
) -> Tensor:
    """A frozen linear with the experts of `slots`; see `AdapterSpec.apply_linear`."""
    gates = routed(spec, p, x if slots is None else x.index_select(0, slots), call)
    own, gates = _rank_by_rank(spec, _of_experts(p), gates, call)
    return spec.expert.mix_linear(own, gates, x, weight, bias, call, slots)


def mixed_input(spec: RoutedSpec, p: Values, x: Tensor, call: Call) -> Tensor:
    """x: [K, M, D_in] as the experts change it, for types that act on the input of a site."""
    own = _of_experts(p)
    if spec.router == "soft" and not call.bank.averaged:
        return x + _soft(spec, p, own, x, None, call)
    return x + one_by_one(spec.expert.apply_input, own, routed(spec, p, x, call), (x,), call)


def _weighted(spec: RoutedSpec, p: Values, gates: Tensor, x: Tensor, y: Tensor, call: Call) -> Tensor:
    """What experts, weighted by gates [K, M, S + E], add to y: [K, M, D_out]. x: [K, M, D_in]."""
    p, gates = _rank_by_rank(spec, p, gates, call)
    if spec.expert.implements("mix", call.bank.site):
        return spec.expert.mix(p, gates, x, y, call)
    return one_by_one(spec.expert.apply, p, gates, (x, y), call)


def one_by_one(act: Callable[..., Tensor], p: Values, gates: Tensor, tensors: tuple[Tensor, ...], call: Call) -> Tensor:
    """Every expert on every token, and the sum of what they change, weighted: the slow way, for every type.

    `act` changes the last of `tensors`, each [K, M, ...]. p: [K, S + E, ...], gates: [K, M, S + E].
    """
    count = gates.shape[-1]
    wide = [tensor.repeat_interleave(count, 0) for tensor in tensors]
    change = act(_flat(p), *wide, call.of_experts(count)) - wide[-1]
    return torch.einsum("kmde,kme->kmd", change.unflatten(0, (-1, count)).movedim(1, -1), gates)


def _rank_by_rank(spec: RoutedSpec, p: Values, gates: Tensor, call: Call) -> tuple[Values, Tensor]:
    """LoRAs of different ranks and their gates [K, M, S + E] as that many LoRAs of rank 1 as they have ranks: each has
    its expert's gate, with the scale in it.
    """
    if not spec.ranks:
        return p, gates
    columns = (gates * call.constants["scales"][:, None]).split(1, -1)
    gates = torch.cat([gate.expand(-1, -1, rank) for gate, rank in zip(columns, spec.ranks, strict=True)], -1)
    return {"A": p["A"][:, :, None], "B": p["B"].mT[..., None]}, gates


def _of_experts(p: Values) -> dict[str, Tensor]:
    return {name: value for name, value in p.items() if not name.startswith("router")}


def _flat(p: Values) -> dict[str, Tensor]:
    """[K, S + E, ...] to [K * (S + E), ...]."""
    return {name: value.flatten(0, 1) for name, value in p.items()}


def _exact(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


# Routers


def routed(spec: RoutedSpec, p: Values, x: Tensor, call: Call) -> Tensor:
    """Gates [K, M, S + E] in the bank's type, and `Routing` for the bank. x: [K, M, D_in], maybe in the backbone's."""
    tokens, owned = x.shape[1], call.owned_experts
    call.bank.routing = None
    if spec.router == "uniform" or call.bank.averaged:
        gates = (owned / owned.sum(-1, keepdim=True))[:, None].expand(-1, tokens, -1)
        return _with_shared(spec, gates.to(call.bank.dtype))
    if spec.router == "follow":
        leaders = [own.leader for own in call.bank.specs]
        gates = call.tokens.gates_of(leaders, call.bank, owned.shape[-1])
        return _with_shared(spec, gates.to(call.bank.dtype))
    # At least float32, as all routers are: a gate that is rounded sends a token elsewhere. Experts come before tokens
    # until the gates are ready: over a last axis as short as theirs a softmax takes ten times as long.
    logits = _logits(spec, p, _exact(x), call)
    if call.max_over_slots("router_noise"):
        logits = call.noisy(logits.mT, "router_noise").mT
    logits = _among(owned, logits, call)
    if spec.router == "sigmoid":
        weights = logits.sigmoid()
        probabilities = weights / weights.sum(1, keepdim=True)
        order = _among(owned, weights.detach() + p["router_bias"].detach()[..., None], call)
    else:
        probabilities = weights = logits.softmax(1)
        order = probabilities.detach()
    if spec.router in CHOOSING:
        chosen = _chosen(order, probabilities.detach(), call)
    else:
        chosen = owned.bool()[..., None].expand_as(probabilities)
    if spec.router == "sigmoid":
        gates = weights * chosen
        gates = gates / gates.sum(1, keepdim=True)
    else:
        gates = logits.masked_fill(~chosen, float("-inf")).softmax(1)
    if min(call.min_over_slots("top_k"), call.min_over_slots("experts")) < 2 or call.min_over_slots("top_p") < 1.0:
        gates = torch.where(chosen.sum(1, keepdim=True) == 1, weights * chosen, gates)
    call.bank.routing = _routing(spec, p, logits, probabilities, chosen, call)
    gates = gates.mT
    if gates.shape[1] != tokens:  # one decision for a text
        gates = gates.repeat_interleave(tokens // gates.shape[1], 1)
    call.tokens.lead(call.bank, gates)
    return _with_shared(spec, gates.to(call.bank.dtype))


def _among(owned: Tensor, values: Tensor, call: Call) -> Tensor:
    """Values [K, E, M], minus infinity for experts that a slot does not have."""
    if call.min_over_slots("experts") == call.max_over_slots("experts"):
        return values
    return values.masked_fill(owned[..., None] == 0, float("-inf"))


def _with_shared(spec: RoutedSpec, gates: Tensor) -> Tensor:
    """[K, M, E] to [K, M, S + E]."""
    if not spec.shared_experts:
        return gates
    return torch.cat([gates.new_ones(*gates.shape[:2], spec.shared_experts), gates], -1)


def _logits(spec: RoutedSpec, p: Values, x: Tensor, call: Call) -> Tensor:
    """[K, E, M], or [K, E, N] for routers that decide about texts."""
    if spec.router == "arrow":
        return (call.bank.arrows.to(x.dtype) @ x.mT).abs()
    weight = p["router"].to(x.dtype)
    if spec.router == "xlora":
        states = call.tokens.hidden_states().to(x.dtype).flatten(0, 1)
        return weight @ states.mT + p["router_bias"].to(x.dtype)[..., None]
    if spec.router == "task":
        return weight[..., call.tokens.domains_of(spec.tasks)]
    if spec.router == "sequence":
        texts, mask = call.tokens.by_text(x), call.tokens.mask
        if mask is None:
            x = texts.mean(2)
        else:
            counted = mask.to(x)
            x = (texts * counted[..., None]).sum(2) / counted.sum(-1, keepdim=True).clamp(min=1)
    return _Product.apply(weight, x)


class _Product(torch.autograd.Function):
    """w x^T, [K, E, D] and [K, M, D] to [K, E, M], with gradients in the layouts of w and x. A product of torch hands
    transposed ones on, and what is added to these takes longer than the product.
    """

    @staticmethod
    def forward(ctx, w, x):
        ctx.save_for_backward(w, x)
        return torch.bmm(w, x.mT)

    @staticmethod
    def backward(ctx, g):
        w, x = ctx.saved_tensors
        return torch.bmm(g, x), torch.bmm(g.mT, w) if ctx.needs_input_grad[1] else None


def _chosen(order: Tensor, probabilities: Tensor, call: Call) -> Tensor:
    """[K, E, M] bool: the `top_k` first in `order`, of these as few as reach `top_p` together."""
    most = min(order.shape[1], int(call.max_over_slots("top_k")))
    _, places = order.topk(most, 1)
    chosen = torch.zeros_like(order, dtype=torch.bool)
    if call.min_over_slots("top_k") >= most and call.min_over_slots("top_p") == 1.0:
        return chosen.scatter_(1, places, True)
    rank = torch.arange(most, device=order.device)[:, None]
    keep = (rank < call.constants["top_k"][:, None, None]).expand_as(places)
    if call.min_over_slots("top_p") < 1.0:
        ahead, top_p = probabilities.gather(1, places), call.constants["top_p"][:, None, None]
        # 1 is no limit: a sum of float32 reaches it ahead of what is improbable.
        keep = keep & ((ahead.cumsum(1) - ahead < top_p) | (top_p == 1.0))
    return chosen.scatter_(1, places, keep)


def _routing(spec: RoutedSpec, p: Values, logits: Tensor, probabilities: Tensor, chosen: Tensor, call: Call) -> Routing:
    owned = call.owned_experts
    count = owned.sum(-1)
    # Texts count all alike, and so do tokens, but for padding.
    padded = None if spec.router in DECIDING_BY_TEXT else call.tokens.counted()
    counted, total = (None, count.new_tensor(logits.shape[2])) if padded is None else padded

    def over_tokens(values: Tensor) -> Tensor:
        """[K, E, M] to [K, E]."""
        return (values if counted is None else values * counted).sum(2)

    sent = over_tokens(chosen.to(logits))
    arrived = sent.sum(-1, keepdim=True)
    load = sent / arrived
    penalty = torch.zeros_like(count)
    if spec.router in BALANCED and call.max_over_slots("balance") > 0:
        if spec.router == "sigmoid":
            # Its gradient with respect to b is load - 1/E: the optimiser lowers b where too much arrives.
            term = ((load - owned / count[:, None]) * p["router_bias"].to(load) * owned).sum(-1)
        else:
            term = (load * over_tokens(probabilities)).sum(-1) * (count / total)
        penalty = call.constants["balance"] * term
    if spec.router in BALANCED and call.max_over_slots("z_loss") > 0:
        square = over_tokens(logits.logsumexp(1, keepdim=True).square())[:, 0]
        penalty = penalty + call.constants["z_loss"] * square / total
    with torch.no_grad():
        # What nobody looks at is not worth its time.
        entropy = torch.zeros_like(count)
        if call.bank.seen is not None:
            entropy = -over_tokens(probabilities * probabilities.clamp(min=1e-9).log()).sum(-1) / total
            entropy = entropy / count.log().clamp(min=1e-9) * (count > 1)
        active = arrived[:, 0] / total + spec.shared_experts
        return Routing(penalty=penalty, load=load, entropy=entropy, active=active, count=total)


def _poly(spec: RoutedSpec, p: Values, x: Tensor, call: Call) -> Tensor:
    """What LoRAs add whose A and B are mixed for every task: [K, M, D_out]. Tasks are experts then, one for a token."""
    from autopeft.kernels.mixture_lora import mixture_lora

    owned = call.owned_experts[:, :, None, None]
    share = owned.expand_as(p["router"]) if call.bank.averaged else p["router"].sigmoid() * owned
    share = share / share.sum(1, keepdim=True)

    def blended(w: Tensor) -> Tensor:
        """[K, E, R, D] to [K, tasks, R, D], each block of D with the shares of its head."""
        return torch.einsum("keth,kerhd->ktrhd", share, w.unflatten(-1, (spec.heads, -1))).flatten(-2)

    a, b = blended(p["A"]), blended(p["B"].mT).mT
    texts = torch.nn.functional.one_hot(call.tokens.domains_of(spec.tasks), spec.tasks).to(x)
    gates = texts.repeat_interleave(call.tokens.length, 0).expand(len(x), -1, -1)
    mask = None if call.mask is None else call.mask[:, None].expand(-1, spec.tasks, -1)
    return mixture_lora(call.dropout(x), a, b, gates, call.constants["scale"], mask, 1)


def _soft(spec: RoutedSpec, p: Values, own: Values, x: Tensor, y: Tensor | None, call: Call) -> Tensor:
    """What a soft dispatch adds to the last of x and y: [K, M, D]."""
    texts = call.tokens.by_text(x)
    logits = torch.einsum("kntd,ked->knte", _exact(texts), _exact(p["router"]))
    logits = call.noisy(logits, "router_noise")
    owned = call.owned_experts
    mask = call.tokens.mask
    dispatch = logits if mask is None else logits.masked_fill(~mask[None, :, :, None], float("-inf"))
    dispatch = dispatch.softmax(2).to(x.dtype)
    combine = logits.masked_fill(owned[:, None, None] == 0, float("-inf")).softmax(-1).to(x.dtype)
    seen = [torch.einsum("knte,kntd->kend", dispatch, call.tokens.by_text(t)) for t in (x, y) if t is not None]
    act: Callable[..., Tensor] = spec.expert.apply_input if y is None else spec.expert.apply
    count = owned.shape[-1]
    if spec.ranks:  # of LoRAs, which are no tensor [K, E, ...]: what an expert sees is sent to it alone
        alone = torch.eye(count).to(x).repeat_interleave(texts.shape[1], 0).expand(len(x), -1, -1)
        added = _weighted(spec, own, alone, seen[0].flatten(1, 2), seen[-1].flatten(1, 2), call)
        change = added.unflatten(1, (count, -1))
    else:
        wide = [tensor.flatten(0, 1) for tensor in seen]
        change = (act(_flat(own), *wide, call.of_experts(count)) - wide[-1]).unflatten(0, (-1, count))
    return torch.einsum("knte,kend->kntd", combine, change).flatten(1, 2)
