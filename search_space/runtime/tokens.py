"""The minibatch that routers read, and the gates that leaders pass to their followers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(slots=True)
class Tokens:
    """The minibatch that routers read, the same for all slots: N texts of T tokens (`length`).

    `mask`: [N, T], False for padding; None: no padding. `domains`: [N], the domain of each text; None: unknown.
    """

    length: int = 1
    mask: Tensor | None = None
    domains: Tensor | None = None
    #: Returns the last hidden states [N, T, H] of the model without adapters on the minibatch; None: not available.
    first_pass: Callable[[], Tensor] | None = None
    #: Gates of this forward pass by leader and slot, each [M, E].
    _gates: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    _counted: tuple[Tensor, Tensor] | None = None

    def begin(self, length: int, mask: Tensor | None, first_pass: Callable[[], Tensor] | None = None) -> None:
        """Begin a forward pass. `first_pass` runs at most once, for any number of routers that read it."""
        self.length, self.mask = length, mask
        self.first_pass = first_pass and cache(first_pass)
        self._counted = None
        self._gates.clear()

    def end(self) -> None:
        """End a step and release tensors that refer to its autograd graph."""
        self.first_pass = None
        self._gates.clear()

    def snapshot(self) -> Tokens:
        """Return a copy of this state; the gates and the first pass in it are the same ones."""
        return replace(self, _gates=dict(self._gates))

    def restore(self, other: Tokens) -> None:
        """Take over the state of a snapshot."""
        for each in fields(self):
            setattr(self, each.name, getattr(other.snapshot(), each.name))

    def hidden_states(self) -> Tensor:
        """Return the last hidden states of the model without adapters: [N, T, H]."""
        assert self.first_pass is not None
        return self.first_pass()

    def lead(self, bank: Any, gates: Tensor) -> None:
        """Store gates: [K, M, E] for followers."""
        for slot, number, own in zip(bank.slots_served, bank.router.numbers, gates, strict=True):
            self._gates[bank.site.name, slot] = self._gates[f"{bank.site.name}#{number}", slot] = own

    def gates_of(self, leaders: Sequence[str], bank: Any, experts: int) -> Tensor:
        """Return the gates [K, M, experts] of each slot's leader. Raises ValueError for a leader that has not run."""
        try:
            found = [self._gates[key][:, :experts] for key in zip(leaders, bank.slots_served, strict=True)]
        except KeyError as error:
            raise ValueError(
                f"{bank.site.name}: uses the gates of the mixture at {error.args[0][0]!r}, which has not run before it"
            ) from None
        return torch.stack([F.pad(gates, (0, experts - gates.shape[1])) for gates in found])

    def counted(self) -> tuple[Tensor, Tensor] | None:
        """Return [N * T] with 0 for padding and 1 for tokens, and the number of tokens; None: no padding."""
        if self._counted is None and self.mask is not None:
            own = self.mask.flatten().float()
            self._counted = own, own.sum().clamp(min=1)
        return self._counted

    def by_text(self, x: Tensor) -> Tensor:
        """Return x: [K, N * T, D] in the shape [K, N, T, D]."""
        return torch.unflatten(x, 1, (-1, self.length))

    def domains_of(self, tasks: int) -> Tensor:
        """Return the domain of each text, [N]. Raises ValueError if they are unknown or not below `tasks`."""
        if self.domains is None:
            raise ValueError("a router by task needs the domain of each row: set data.domain to the column that has it")
        if int(self.domains.max()) >= tasks:
            raise ValueError(
                f"a router for {tasks} tasks cannot route a row of the domain with index {int(self.domains.max())}"
            )
        return self.domains
