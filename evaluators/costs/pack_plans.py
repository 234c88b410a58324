"""The plans of an evaluator for its packs: made once per kind of candidate, and made smaller after a lack of memory."""

from __future__ import annotations

from collections.abc import Sequence

from autopeft.evaluators.base import Attaching, Request
from autopeft.evaluators.costs.pack_sizing import ENOUGH_TOKENS, Levers, PackPlan, note_of, order_of_levers, plan_pack
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.training import Training

#: Factors of the memory of a pack: rows per step, layers below all adapters, experts per row, and whether minibatches
#: can be divided.
Kind = tuple[int, int, int, bool]


def divisible(architecture: Architecture) -> bool:
    """Return whether the gradients of a minibatch are sums of those of its parts.

    A router's balance loss is no mean over examples: fractions of a minibatch are multiplied by its mean probabilities.
    Its noise is one draw for the minibatch. A backbone that is trained itself draws dropout for the examples at hand.
    """
    if "full" in architecture.kinds:
        return False
    return not any(
        getattr(spec, name)
        for _, spec in architecture
        if spec.routed_by is not None
        for name in ("balance", "z_loss", "router_noise")
        if name in spec.routed_by.uses
    )


class PackPlans:
    """The plans of one evaluator.

    `pack`: slots, None for as many as fit. `micro_batch`, `checkpointing`: see `order_of_levers`. `tokens`: of the
    longest training row.
    """

    def __init__(
        self, evaluator: Attaching, tokens: int, pack: int | None, micro_batch: int | None, checkpointing: bool | None
    ) -> None:
        self._evaluator = evaluator
        self._tokens = tokens
        self._pack = pack
        self._given = micro_batch, checkpointing
        self._plans: dict[Kind, PackPlan] = {}

    def plan(self, requests: Sequence[Request], depth: int) -> PackPlan:
        """Return the plan for packs of candidates like `requests`, with `depth` layers below all their adapters."""
        kind = _kind(requests, depth)
        if kind not in self._plans:
            order = self.order(requests)
            planned = PackPlan(self._pack, order[0]) if self._pack else plan_pack(self._evaluator, requests, order)
            self._plans[kind] = planned
        return self._plans[kind]

    def after_lack(self, requests: Sequence[Request], depth: int, levers: Levers) -> PackPlan | None:
        """Return the plan after a pack of `requests` with these levers did not fit, None if there is no other.

        First there are fewer slots, then other levers.
        """
        order, slots = self.order(requests), len(requests) // 2
        if not slots:
            if levers == order[-1]:
                return None
            levers = order[order.index(levers) + 1]
        self._plans[_kind(requests, depth)] = found = PackPlan(max(1, slots), levers)
        return found

    def note(self, request: Request) -> str | None:
        """Return what is done to save memory for such a candidate, as a sentence for the user; None: nothing."""
        if self._pack:
            return None
        order = self.order([request])
        try:
            return note_of(plan_pack(self._evaluator, [request], order), order)
        except Exception:  # its own evaluation reports the reason
            return None

    def order(self, requests: Sequence[Request]) -> list[Levers]:
        """Return the levers for these candidates, in the order in which they are tried."""
        rows, _, _, parts = _kind(requests, 0)
        enough = ENOUGH_TOKENS[self._evaluator.device.type]
        return order_of_levers(rows if parts else 1, self._tokens, enough, *self._given)


def _kind(requests: Sequence[Request], depth: int) -> Kind:
    architectures = [request.candidate.architecture for request in requests]
    experts = max((spec.num_experts_total for architecture in architectures for _, spec in architecture), default=1)
    rows = Training(**requests[0].candidate.training).batch_size
    return rows, depth, experts, all(map(divisible, architectures))
