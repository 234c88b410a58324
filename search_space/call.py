"""What an adapter's forward function sees beside its parameters and the activations.

A protocol: `runtime/bank.py` has what stands behind it at run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn


class RouterState(Protocol):
    """What a router reads beside the activations, and what it leaves. Notation: K slots, E experts."""

    #: [K, E] with 1 for the experts that a slot's router chooses from.
    owned_experts: Tensor
    #: The minibatch and the gates of leaders, as `runtime/tokens.py` has them.
    tokens: Any
    #: Whether the router is not asked, and all experts are weighted alike.
    averaged: bool
    #: What the router did in the last forward pass (a `Routing`); None: nothing to report.
    last: Any
    #: The same of every forward pass; None: nobody watches.
    seen: list[Any] | None
    #: Values that a router computes once, by names of its own, from parameters that are not trained.
    cached: dict[str, Tensor]


class Call(Protocol):
    """Notation: K slots, M tokens of one slot, E experts, R the size of the largest slot."""

    #: Per-slot numbers of `AdapterSpec.constants`, each [K, ...].
    constants: dict[str, Tensor]
    #: [K, R] with 1 where a slot owns that part of the size, or None if all slots own all of it.
    mask: Tensor | None

    @property
    def bank(self) -> Any:
        """The module that holds the parameters."""

    @property
    def base(self) -> nn.Module:
        """The backbone's module at the site."""

    @property
    def router(self) -> RouterState:
        """The state of the bank's router. Raises AssertionError for a bank of plain adapters."""

    @property
    def drops(self) -> bool:
        """Whether some slot has dropout in this pass."""

    def max_over_slots(self, name: str) -> float:
        """Return the largest value of a field over the slots."""

    def min_over_slots(self, name: str) -> float:
        """Return the smallest value of a field over the slots."""

    def dropout(self, x: Tensor) -> Tensor:
        """Apply dropout with each slot's own probability, drawn from each slot's own stream. x: [K, ...]."""

    def noisy(self, x: Tensor, name: str) -> Tensor:
        """Return x: [K, ..., E], in training with normal noise of the standard deviation in the field `name`."""

    def of_experts(self, count: int) -> Call:
        """Return the same call for `count` experts of each slot, one after the other."""
