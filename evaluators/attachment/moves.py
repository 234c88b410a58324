"""Adapters that move between training steps: types with `AdapterSpec.after_step`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.attachment.routers import banks_of
from autopeft.search_space.runtime.bank import Bank

#: The first and second moments of a trained parameter, each in its shape.
Moments = Callable[[nn.Parameter], tuple[Tensor, Tensor]]


def moving(attachment: Attachment, k: int) -> Iterator[tuple[str, Bank, int]]:
    """Yield the banks of slot k that move, as `banks_of`."""
    return (found for found in banks_of(attachment.banks, k) if found[1].specs[0].moves)


class Moves:
    """Calls `after_step` for each adapter of each slot. `full`: the steps of the slots' whole trainings."""

    def __init__(self, attachment: Attachment, full: Sequence[int], moments: Moments) -> None:
        self._moments = moments
        self._here = [(bank, j, full[k]) for k in range(len(full)) for _, bank, j in moving(attachment, k)]

    def watching(self, numbers: Iterable[int]) -> Iterator[int]:
        """Yield the numbers of steps, and watch the gradients of each step that an adapter wants to know."""
        for number in numbers:
            for bank in {bank for bank, *_ in self._here}:
                bank.watch.on = any(spec.watches(number) for spec in bank.specs)
            yield number

    @torch.no_grad()
    def make(self, number: int) -> None:
        """Let the adapters move after the update of step `number`."""
        for bank, j, full in self._here:
            moments = {name: self._moments(value) for name, value, _ in bank.trained()}
            first, second = (bank.of_slot(j, {name: pair[n] for name, pair in moments.items()}) for n in (0, 1))
            gradient = None if bank.watch.gradient is None else bank.watch.gradient[j]
            bank.specs[j].after_step(bank.of_slot(j), (first, second), gradient, bank.watch.notes[j], number, full)
        for bank, *_ in self._here:
            bank.watch.gradient = None
