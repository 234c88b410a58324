"""The plans of an evaluator for its packs: made once per kind of candidate, and made smaller after a lack of memory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import compress

from autopeft.evaluators.base import Attaching, Request
from autopeft.evaluators.costs.pack_sizing import (
    ENOUGH_TOKENS,
    WITHOUT_LEVERS,
    Levers,
    PackPlan,
    note_of,
    order_of_levers,
    plan_pack,
)
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.training import Training

#: Factors of the memory of a pack: rows per step, layers below all adapters, experts per row, and whether minibatches
#: can be divided.
Kind = tuple[int, int, int, bool]


def divisible(architecture: Architecture, unpackable: Collection[str] = ()) -> bool:
    """Return whether the gradients of a minibatch are sums of those of its parts.

    A router's balance loss is no mean over examples: fractions of a minibatch are multiplied by its mean probabilities.
    Its noise is one draw for the minibatch. A backbone that is trained itself draws dropout for the examples at hand,
    and dropout at the sites `unpackable` is for more than the examples, such as their relative positions.
    """
    if "full" in architecture.kinds or any(site in unpackable for site, _ in architecture):
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
    longest training row. `unpackable`: see `divisible`.
    """

    def __init__(
        self,
        evaluator: Attaching,
        tokens: int,
        unpackable: Collection[str],
        pack: int | None,
        micro_batch: int | None,
        checkpointing: bool | None,
    ) -> None:
        self._evaluator = evaluator
        self._tokens = tokens
        self._unpackable = unpackable
        self._pack = pack
        self._given = micro_batch, checkpointing
        self._plans: dict[Kind, PackPlan] = {}

    def plan(self, requests: Sequence[Request], depth: int) -> PackPlan:
        """Return the plan for packs of candidates like `requests`, with `depth` layers below all their adapters."""
        kind = self._kind(requests, depth)
        if kind not in self._plans:
            self._plans[kind] = self.of(requests)
        return self._plans[kind]

    def of(self, requests: Sequence[Request], max_slots: int | None = None) -> PackPlan:
        """Return the plan for packs of the largest of `requests`, by its size alone."""
        order = self.order(requests)
        if self._pack:
            return PackPlan(self._pack, order[0])
        return plan_pack(self._evaluator, requests, order, max_slots)

    def levers_of(self, request: Request) -> Levers:
        """Return how the training of such a candidate saves memory: to say so does not take the size of its packs."""
        return self.of([request], max_slots=1).levers

    def choose(self, requests: Sequence[Request], depth: int) -> tuple[PackPlan, list[bool]]:
        """Return the plan for a pack with the first of `requests`, and which of them can be in that pack.

        All can, unless steps save memory: minibatches that cannot be divided would keep the others whole.
        """
        planned = self.plan(requests, depth)
        if planned.levers == WITHOUT_LEVERS and self._given[0] is None:
            return planned, [True] * len(requests)
        divided = [divisible(request.candidate.architecture, self._unpackable) for request in requests]
        able = [each == divided[0] for each in divided]
        return self.plan([*compress(requests, able)], depth), able

    def after_lack(self, requests: Sequence[Request], depth: int, levers: Levers) -> PackPlan | None:
        """Return the plan after a pack of `requests` with these levers did not fit, None if there is no other.

        First there are fewer slots, then other levers.
        """
        order, slots = self.order(requests), len(requests) // 2
        if not slots:
            if levers == order[-1]:
                return None
            levers = order[order.index(levers) + 1]
        self._plans[self._kind(requests, depth)] = found = PackPlan(max(1, slots), levers)
        return found

    def note(self, request: Request) -> str | None:
        """Return what is done to save memory for such a candidate, as a sentence for the user; None: nothing."""
        order = self.order([request])
        try:
            return None if self.levers_of(request) == order[0] else note_of(self.of([request]), order)
        except Exception:  # its own evaluation reports the reason
            return None

    def order(self, requests: Sequence[Request]) -> list[Levers]:
        """Return the levers for these candidates, in the order in which they are tried."""
        rows, _, _, parts = self._kind(requests, 0)
        enough = ENOUGH_TOKENS[self._evaluator.device.type]
        return order_of_levers(rows if parts else 1, self._tokens, enough, *self._given)

    def _kind(self, requests: Sequence[Request], depth: int) -> Kind:
        architectures = [request.candidate.architecture for request in requests]
        experts = max((spec.num_experts_total for architecture in architectures for _, spec in architecture), default=1)
        rows = Training(**requests[0].candidate.training).batch_size
        return rows, depth, experts, all(divisible(architecture, self._unpackable) for architecture in architectures)
