"""What an adapter that moves between training steps knows of the steps before."""

from __future__ import annotations

from torch import Tensor


class Watch:
    """The gradient of a tensor of the forward pass, and notes of each slot of a bank from step to step.

    `gradient`: [K, ...], the sum over the backward passes since it was None; `on`: whether gradients are added.
    """

    def __init__(self, slots: int) -> None:
        self.on = False
        self.gradient: Tensor | None = None
        self.notes: list[dict[str, Tensor]] = [{} for _ in range(slots)]

    def see(self, value: Tensor) -> Tensor:
        """Return `value`: [K, ...], whose gradient is added in the backward pass."""
        if self.on and value.requires_grad:
            value.register_hook(self._add)
        return value

    def _add(self, gradient: Tensor) -> None:
        self.gradient = gradient if self.gradient is None else self.gradient + gradient
