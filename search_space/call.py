"""Protocols of the run-time context that a forward function receives beside parameters and activations.

`runtime/bank.py` and `runtime/router_state.py` implement them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Tensors by name: the parameters of an adapter and, for a mixture, of its router.
Values: TypeAlias = Mapping[str, "Tensor"]


class RouterState(Protocol):
    """State of a router between and during forward passes. Notation: K slots, E experts."""

    #: [K, E] with 1 for the experts that a slot's router chooses from.
    owned_experts: Tensor
    #: The minibatch and the gates of leaders (`runtime/tokens.py`).
    tokens: Any
    #: Whether all experts get equal gates and the router is not evaluated.
    averaged: bool
    #: `Routing` of the last forward pass; None: the router reported none.
    last: Any
    #: `Routing` of every forward pass in evaluation mode; None: recording is off.
    seen: list[Any] | None
    #: Values that a router computes once from frozen parameters, by names that it chooses.
    cached: dict[str, Tensor]


class Call(Protocol):
    """Context of one forward call. Notation: K slots, M tokens per slot, E experts, R the size of the largest slot."""

    #: Per-slot numbers of `AdapterSpec.constants`, each [K, ...].
    constants: dict[str, Tensor]
    #: [K, R] with 1 for the part of the size that a slot owns; None: every slot owns all of it.
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
        """Whether any slot applies dropout in this pass."""

    def max_over_slots(self, name: str) -> float:
        """Return the largest value of a field over the slots."""

    def min_over_slots(self, name: str) -> float:
        """Return the smallest value of a field over the slots."""

    def dropout(self, x: Tensor) -> Tensor:
        """Return x: [K, ...] after dropout, with the probability and the random stream of each slot."""

    def noisy(self, x: Tensor, name: str) -> Tensor:
        """Return x: [K, ..., E]; in training, add normal noise with the standard deviation in the field `name`."""

    def of_experts(self, count: int) -> Call:
        """Return the call for a batch of K * count rows, in which the `count` experts of a slot are consecutive."""
