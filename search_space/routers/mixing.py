"""Arithmetic that routers share: the choice of experts, the gates and the weighted sum of the experts.

Notation: K slots, N texts of T tokens, M = N * T, E routed experts, S shared experts, C decisions (one per token, C =
M, or one per text, C = N).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from autopeft.search_space.call import Call, Values


class RoutedSpec(Protocol):
    """Fields of a mixture that routers read."""

    @property
    def expert(self) -> Any:
        """The adapter of each expert; with `ranks`, the one of the largest rank."""

    @property
    def gated(self) -> Any:
        """The adapter that one gate weights: an expert or, with `ranks`, a LoRA of rank 1."""

    @property
    def experts(self) -> int:
        """Number of routed experts."""

    @property
    def shared_experts(self) -> int:
        """Number of experts with the gate 1 for every token."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each expert, shared experts first; empty if the ranks are equal."""

    @property
    def num_active(self) -> int:
        """Largest number of nonzero gates per token."""

    @property
    def top_k(self) -> int:
        """Largest number of routed experts per token."""

    @property
    def tasks(self) -> int:
        """Number of domains of the data."""

    @property
    def heads(self) -> int:
        """Number of blocks of the features that are mixed with separate weights."""


@dataclass(slots=True)
class Routing:
    """Summary of the decisions of a router in one forward pass.

    `penalty`: [K], terms that are added to the losses of the slots. Without gradients: `load`: [K, E] fractions of the
    assignments per expert, `entropy`: [K] mean entropy of the probabilities relative to its maximum (0 unless recording
    is on), `active`: [K] mean number of experts per token, `count`: number of routed tokens (or texts).
    """

    penalty: Tensor
    load: Tensor
    entropy: Tensor
    active: Tensor
    count: Tensor


@dataclass(slots=True)
class Decision:
    """Decisions of a router in one forward pass.

    `logits`, `probabilities`: [K, E, C]. `sent`: [K, E, C] bool, the experts that each token (or text) is sent to.
    `owned`: [K, E] with 1 for the experts that a slot has; `count`: [K], their number. `weights`: [C] with 0 for
    padding, None: all tokens count; `total`: number of tokens that count. `arrived`: [K, 1], number of pairs of a token
    and an expert; `load`: [K, E], fractions of these pairs per expert.
    """

    logits: Tensor
    probabilities: Tensor
    sent: Tensor
    owned: Tensor
    count: Tensor
    weights: Tensor | None
    total: Tensor
    arrived: Tensor
    load: Tensor

    @classmethod
    def of(
        cls, logits: Tensor, probabilities: Tensor, sent: Tensor, owned: Tensor, counted: tuple[Tensor, Tensor] | None
    ) -> Decision:
        """Return the decision with its counts.

        logits, probabilities, sent: [K, E, C], owned: [K, E]. counted: [C] with 0 for padding, and the number of
        tokens.
        """
        count = owned.sum(-1)
        weights, total = (None, count.new_tensor(logits.shape[2])) if counted is None else counted
        found = _summed(sent.to(logits), weights)
        arrived = found.sum(-1, keepdim=True)
        return cls(logits, probabilities, sent, owned, count, weights, total, arrived, found / arrived)

    def over_tokens(self, values: Tensor) -> Tensor:
        """Return the sum over the tokens that count. values: [K, E, C]. Returns [K, E]."""
        return _summed(values, self.weights)

    @torch.no_grad()
    def routing(self, penalty: Tensor, shared_experts: int, watched: bool) -> Routing:
        """Return the summary of the pass; the entropy, which takes time, is computed only if `watched`."""
        entropy = torch.zeros_like(self.count)
        if watched:
            surprise = self.probabilities * self.probabilities.clamp(min=1e-9).log()
            entropy = -self.over_tokens(surprise).sum(-1) / self.total
            entropy = entropy / self.count.log().clamp(min=1e-9) * (self.count > 1)
        active = self.arrived[:, 0] / self.total + shared_experts
        return Routing(penalty=penalty, load=self.load, entropy=entropy, active=active, count=self.total)


def _summed(values: Tensor, weights: Tensor | None) -> Tensor:
    return (values if weights is None else values * weights).sum(2)


# Gates


def equal_gates(tokens: int, call: Call) -> Tensor:
    """Return equal gates [K, tokens, E] for the experts that a slot has, and 0 for the others."""
    owned = call.router.owned_experts
    gates: Tensor = (owned / owned.sum(-1, keepdim=True))[:, None].expand(-1, tokens, -1)
    return gates


def with_shared(gates: Tensor, shared_experts: int) -> Tensor:
    """Return gates [K, M, S + E]: 1 for each shared expert, followed by gates: [K, M, E]."""
    if not shared_experts:
        return gates
    return torch.cat([gates.new_ones(*gates.shape[:2], shared_experts), gates], -1)


def owned_only(values: Tensor, call: Call) -> Tensor:
    """Return values: [K, E, C], with minus infinity for experts that a slot does not have."""
    if call.min_over_slots("experts") == call.max_over_slots("experts"):
        return values
    return values.masked_fill(call.router.owned_experts[..., None] == 0, float("-inf"))


def exact(x: Tensor) -> Tensor:
    """Return x in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def product(w: Tensor, x: Tensor) -> Tensor:
    """Return w x^T. w: [K, E, D], x: [K, M, D]. Returns [K, E, M]."""
    found: Tensor = _Product.apply(w, x)  # type: ignore[no-untyped-call]
    return found


class _Product(torch.autograd.Function):
    """w x^T with gradients in the layouts of w and x.

    A product of torch returns transposed gradients, and adding other gradients to them takes longer than the product.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(w, x)
        return torch.bmm(w, x.mT)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None]:
        w, x = ctx.saved_tensors
        return torch.bmm(g, x), torch.bmm(g.mT, w) if ctx.needs_input_grad[1] else None


def chosen(order: Tensor, probabilities: Tensor, call: Call) -> Tensor:
    """Return the experts that each token is sent to: [K, E, C] bool.

    These are the `top_k` experts that are largest in order: [K, E, C] and, of these, the smallest number whose
    probabilities: [K, E, C] sum to `top_p`.
    """
    most = min(order.shape[1], int(call.max_over_slots("top_k")))
    _, places = order.topk(most, 1)
    found = torch.zeros_like(order, dtype=torch.bool)
    if call.min_over_slots("top_k") >= most and call.min_over_slots("top_p") == 1.0:
        return found.scatter_(1, places, True)
    rank = torch.arange(most, device=order.device)[:, None]
    keep = (rank < call.constants["top_k"][:, None, None]).expand_as(places)
    if call.min_over_slots("top_p") < 1.0:
        ahead, top_p = probabilities.gather(1, places), call.constants["top_p"][:, None, None]
        # 1 means no limit: a sum in float32 can reach 1 before the improbable experts.
        keep = keep & ((ahead.cumsum(1) - ahead < top_p) | (top_p == 1.0))
    return found.scatter_(1, places, keep)


# Experts


def weighted(spec: RoutedSpec, p: Values, gates: Tensor, x: Tensor, y: Tensor | None, call: Call) -> Tensor:
    """Return the sum, weighted by the gates, of the experts' changes to y or, if y is None, to x.

    p: values of the experts, each [K, S + E, ...]. gates: [K, M, S + E], x: [K, M, D_in], y: [K, M, D_out]. Returns
    [K, M, D_out], where D_out = D_in if y is None.
    """
    if y is None:
        return one_by_one(spec.expert.apply_input, p, gates, (x,), call)
    p, gates = rank_by_rank(spec, p, gates, call)
    if spec.expert.implements("mix", call.bank.site):
        mixed: Tensor = spec.expert.mix(p, gates, x, y, call)
        return mixed
    return one_by_one(spec.expert.apply, p, gates, (x, y), call)


def one_by_one(act: Callable[..., Tensor], p: Values, gates: Tensor, tensors: tuple[Tensor, ...], call: Call) -> Tensor:
    """Return the weighted sum of the experts' changes by running every expert on every token.

    This is slow, but works for every adapter type. `act` changes the last of `tensors`, each [K, M, ...]. p: [K, S + E,
    ...], gates: [K, M, S + E].
    """
    count = gates.shape[-1]
    wide = [tensor.repeat_interleave(count, 0) for tensor in tensors]
    change = act(flat(p), *wide, call.of_experts(count)) - wide[-1]
    return torch.einsum("kmde,kme->kmd", torch.unflatten(change, 0, (-1, count)).movedim(1, -1), gates)


def rank_by_rank(spec: RoutedSpec, p: Values, gates: Tensor, call: Call) -> tuple[Values, Tensor]:
    """Return LoRAs of different ranks as LoRAs of rank 1, one for each rank of each expert, with their gates.

    gates: [K, M, S + E]. The gate of each LoRA of rank 1 is the gate of its expert times the expert's scale. For
    mixtures without `ranks`, p and gates are returned unchanged.
    """
    if not spec.ranks:
        return p, gates
    columns = torch.split(gates * call.constants["scales"][:, None], 1, -1)
    gates = torch.cat([gate.expand(-1, -1, rank) for gate, rank in zip(columns, spec.ranks, strict=True)], -1)
    return {"A": p["A"][:, :, None], "B": p["B"].mT[..., None]}, gates


def expert_values(p: Values) -> dict[str, Tensor]:
    """Return the tensors of `p` that belong to experts, not to the router."""
    return {name: value for name, value in p.items() if not name.startswith("router")}


def flat(p: Values) -> dict[str, Tensor]:
    """Return values [K, S + E, ...] in the shape [K * (S + E), ...]."""
    return {name: value.flatten(0, 1) for name, value in p.items()}
