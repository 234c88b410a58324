"""What an adapter's forward function sees beside its parameters and the activations.

A protocol: `runtime/bank.py` has what stands behind it at run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn


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
    def tokens(self) -> Any:
        """What routers want to know of the minibatch."""

    @property
    def owned_experts(self) -> Tensor:
        """[K, E] with 1 for the experts that a slot's router chooses from."""

    @property
    def drops(self) -> bool:
        """Whether some slot has dropout in this pass."""

    def max_over_slots(self, name: str) -> float:
        """The largest value of a field over the slots."""

    def min_over_slots(self, name: str) -> float:
        """The smallest value of a field over the slots."""

    def dropout(self, x: Tensor) -> Tensor:
        """Dropout with each slot's own probability, drawn from each slot's own stream. x: [K, ...]."""

    def noisy(self, x: Tensor, name: str) -> Tensor:
        """In training, x: [K, ..., E] with normal noise of the standard deviation in the field `name`."""

    def of_experts(self, count: int) -> Call:
        """The same for `count` experts of each slot, one after the other."""
