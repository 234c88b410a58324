"""The arithmetic that routers share: who is chosen, with which gates, and what the experts add together.

Notation: K slots, N texts of T tokens, M = N * T, E experts that a router chooses from, S shared ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from autopeft.search_space.call import Call

Values = Mapping[str, Tensor]


class RoutedSpec(Protocol):
    """What routers read of a mixture."""

    @property
    def expert(self) -> Any:
        """The adapter that each expert is; where ranks differ, the one of the largest rank."""

    @property
    def gated(self) -> Any:
        """The adapter that has a gate: an expert or, where ranks differ, one rank of it."""

    @property
    def experts(self) -> int:
        """Number of experts that the router chooses from."""

    @property
    def shared_experts(self) -> int:
        """Number of experts that always have the gate 1."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each expert where they differ, the shared ones first."""

    @property
    def num_active(self) -> int:
        """Number of gates of a token that are not 0, at most."""

    @property
    def top_k(self) -> int:
        """Number of experts that a token is sent to, at most."""

    @property
    def tasks(self) -> int:
        """Number of domains of the data."""

    @property
    def heads(self) -> int:
        """Number of blocks of the features that are mixed apart."""


@dataclass(slots=True)
class Routing:
    """What a router did in one forward pass.

    `penalty`: [K], to be added to the slots' losses. Without gradients: `load`: [K, E] shares of what was sent out,
    `entropy`: [K] mean entropy of the probabilities as a share of the largest that there is (where the bank is
    watched), `active`: [K] experts that a token met, `count`: tokens (or texts) that were routed.
    """

    penalty: Tensor
    load: Tensor
    entropy: Tensor
    active: Tensor
    count: Tensor


@dataclass(slots=True)
class Decision:
    """A router's choice in one forward pass.

    `logits`, `probabilities`: [K, E, M]. `sent`: [K, E, M] bool, the experts that each token goes to. `owned`: [K, E]
    with 1 for the experts that a slot has, `count`: [K] how many. `weights`: [M] with 0 for padding, None: all tokens
    count; `total`: number of tokens that count. `arrived`: [K, 1] number of pairs of a token and an expert, `load`:
    [K, E] shares of them.
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
        """Return the decision with its counts. counted: [M] with 0 for padding, and the number of tokens."""
        count = owned.sum(-1)
        weights, total = (None, count.new_tensor(logits.shape[2])) if counted is None else counted
        found = _summed(sent.to(logits), weights)
        arrived = found.sum(-1, keepdim=True)
        return cls(logits, probabilities, sent, owned, count, weights, total, arrived, found / arrived)

    def over_tokens(self, values: Tensor) -> Tensor:
        """Return the sum over the tokens that count: [K, E, M] to [K, E]."""
        return _summed(values, self.weights)

    @torch.no_grad()
    def routing(self, penalty: Tensor, shared_experts: int, watched: bool) -> Routing:
        """Return what is reported of the pass; without the entropy, which takes time, where nobody looks at it."""
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
    """Return 1/E for each of the experts that a slot has: [K, tokens, E]."""
    owned = call.router.owned_experts
    gates: Tensor = (owned / owned.sum(-1, keepdim=True))[:, None].expand(-1, tokens, -1)
    return gates


def with_shared(gates: Tensor, shared_experts: int) -> Tensor:
    """Return gates [K, M, E] with those of the shared experts before them: [K, M, S + E]."""
    if not shared_experts:
        return gates
    return torch.cat([gates.new_ones(*gates.shape[:2], shared_experts), gates], -1)


def owned_only(values: Tensor, call: Call) -> Tensor:
    """Return values [K, E, M], minus infinity for experts that a slot does not have."""
    if call.min_over_slots("experts") == call.max_over_slots("experts"):
        return values
    return values.masked_fill(call.router.owned_experts[..., None] == 0, float("-inf"))


def exact(x: Tensor) -> Tensor:
    """Return x in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def product(w: Tensor, x: Tensor) -> Tensor:
    """Return w x^T: [K, E, D] and [K, M, D] to [K, E, M]."""
    found: Tensor = _Product.apply(w, x)  # type: ignore[no-untyped-call]
    return found


class _Product(torch.autograd.Function):
    """w x^T with gradients in the layouts of w and x.

    A product of torch hands transposed gradients on, and what is added to these takes longer than the product.
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
    """Return [K, E, M] bool: the `top_k` first in `order`, of these as few as reach `top_p` together."""
    most = min(order.shape[1], int(call.max_over_slots("top_k")))
    _, places = order.topk(most, 1)
    found = torch.zeros_like(order, dtype=torch.bool)
    if call.min_over_slots("top_k") >= most and call.min_over_slots("top_p") == 1.0:
        return found.scatter_(1, places, True)
    rank = torch.arange(most, device=order.device)[:, None]
    keep = (rank < call.constants["top_k"][:, None, None]).expand_as(places)
    if call.min_over_slots("top_p") < 1.0:
        ahead, top_p = probabilities.gather(1, places), call.constants["top_p"][:, None, None]
        # 1 is no limit: a sum of float32 reaches it ahead of what is improbable.
        keep = keep & ((ahead.cumsum(1) - ahead < top_p) | (top_p == 1.0))
    return found.scatter_(1, places, keep)


# Experts


def weighted(spec: RoutedSpec, p: Values, gates: Tensor, x: Tensor, y: Tensor | None, call: Call) -> Tensor:
    """Return what experts, weighted by gates [K, M, S + E], add to y: [K, M, D_out], or to x: [K, M, D_in] without y.

    p: values of the experts, [K, S + E, ...] each.
    """
    if y is None:
        return one_by_one(spec.expert.apply_input, p, gates, (x,), call)
    p, gates = rank_by_rank(spec, p, gates, call)
    if spec.expert.implements("mix", call.bank.site):
        mixed: Tensor = spec.expert.mix(p, gates, x, y, call)
        return mixed
    return one_by_one(spec.expert.apply, p, gates, (x, y), call)


def one_by_one(act: Callable[..., Tensor], p: Values, gates: Tensor, tensors: tuple[Tensor, ...], call: Call) -> Tensor:
    """Return the weighted sum of what each expert changes, from every expert on every token: slow, but for every type.

    `act` changes the last of `tensors`, each [K, M, ...]. p: [K, S + E, ...], gates: [K, M, S + E].
    """
    count = gates.shape[-1]
    wide = [tensor.repeat_interleave(count, 0) for tensor in tensors]
    change = act(flat(p), *wide, call.of_experts(count)) - wide[-1]
    return torch.einsum("kmde,kme->kmd", torch.unflatten(change, 0, (-1, count)).movedim(1, -1), gates)


def rank_by_rank(spec: RoutedSpec, p: Values, gates: Tensor, call: Call) -> tuple[Values, Tensor]:
    """Return LoRAs of different ranks and their gates [K, M, S + E] as LoRAs of rank 1, one for each of the ranks.

    Each has its expert's gate, with the scale in it. Mixtures without `ranks` stay as they are.
    """
    if not spec.ranks:
        return p, gates
    columns = torch.split(gates * call.constants["scales"][:, None], 1, -1)
    gates = torch.cat([gate.expand(-1, -1, rank) for gate, rank in zip(columns, spec.ranks, strict=True)], -1)
    return {"A": p["A"][:, :, None], "B": p["B"].mT[..., None]}, gates


def expert_values(p: Values) -> dict[str, Tensor]:
    """Return the values of the experts alone."""
    return {name: value for name, value in p.items() if not name.startswith("router")}


def flat(p: Values) -> dict[str, Tensor]:
    """Return values [K, S + E, ...] as [K * (S + E), ...]."""
    return {name: value.flatten(0, 1) for name, value in p.items()}
