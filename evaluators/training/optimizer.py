"""AdamW over all slots of a pack in one pass, each slot with its own learning rate, weight decay and clipping.

Notation: K slots. Values, gradients and moments are stored in four buffers [L, W] of L lines of W elements, and the
parameters are views of them: a step takes a few operations, whatever the number of adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.search_space.training import Training

BETAS = (0.9, 0.999)
EPSILON = 1e-8
#: Elements per line for parameters whose parts per slot consist of whole lines: spreading settings over lines takes a
#: fifth of the time of spreading them over elements.
WIDTH = 64


class PackedAdamW:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) over the banks of an attachment, with the numbers of torch's AdamW.

    It takes over the parameters' storage: they and their gradients become views of the buffers.
    """

    def __init__(self, attachment: Attachment, trainings: Sequence[Training]) -> None:
        self._attachment = attachment
        by_width: dict[int, list[tuple[nn.Parameter, bool, list[int]]]] = {}
        for row in attachment.slots_of_rows():
            by_width.setdefault(WIDTH if row[0][0].numel() % WIDTH == 0 else 1, []).append(row)
        self._buffers = [_Buffers(rows, width) for width, rows in by_width.items()]
        device = next(attachment.model[0].parameters()).device
        self._decay = torch.tensor([w for t in trainings for w in (t.weight_decay, 0.0)], device=device)
        # An infinite norm means no clipping.
        self._max_norm = torch.tensor([t.max_grad_norm or float("inf") for t in trainings], device=device)

    @property
    def idle(self) -> bool:
        """Whether there are no trained parameters, so that steps have no effect."""
        return not self._buffers

    def step(self, number: int, rates: Tensor) -> None:
        """Update all slots and reset their gradients. `number` counts steps from 1; `rates`: [K] learning rates."""
        squares = torch.stack([buffers.squares(len(rates)) for buffers in self._buffers]).sum(0)
        clipping = (self._max_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        for buffers in self._buffers:
            buffers.step(number, rates.repeat_interleave(2), clipping.repeat_interleave(2), self._decay)

    def parts(self, k: int) -> dict[str, dict[str, Tensor]]:
        """Return views of slot k's values and moments, by group and by the names of `Attachment.state`."""
        groups = {
            name: {parameter: views[name] for buffers in self._buffers for parameter, views in buffers.views.items()}
            for name in ("values", "first", "second")
        }
        return {name: self._attachment.parts(k, tensors) for name, tensors in groups.items()}


class _Buffers:
    """Buffers of parameters whose rows consist of whole lines of `width`. `rows`: from `Attachment.slots_of_rows`."""

    def __init__(self, rows: Sequence[tuple[nn.Parameter, bool, list[int]]], width: int) -> None:
        sizes = [parameter.numel() // width for parameter, _, _ in rows]
        device = rows[0][0].device
        self.values, self.gradients, self.first, self.second = torch.zeros(4, sum(sizes), width, device=device)
        self.views: dict[nn.Parameter, dict[str, Tensor]] = {}
        # For each line, its entry in the tables [2 K] of rates and decays: per slot, an entry with decay, one without.
        entries = []
        buffers = {name: getattr(self, name).split(sizes) for name in ("values", "gradients", "first", "second")}
        for i, (parameter, decay, slots) in enumerate(rows):
            views = {name: parts[i].view_as(parameter) for name, parts in buffers.items()}
            views["values"].copy_(parameter.data)
            parameter.data, parameter.grad = views["values"], views["gradients"]
            self.views[parameter] = views
            own = torch.tensor([2 * slot + (not decay) for slot in slots])
            entries.append(own.repeat_interleave(sizes[i] // len(slots)))
        self.entry_of = torch.cat(entries).to(device)

    def squares(self, slots: int) -> Tensor:
        """Return the squared norm [K] of each slot's gradients in these buffers."""
        squares: Tensor = torch.linalg.vector_norm(self.gradients, dim=1).square()
        return squares.new_zeros(slots).index_add_(0, self.entry_of // 2, squares)

    def step(self, number: int, rates: Tensor, clipping: Tensor, decay: Tensor) -> None:
        """Make one step. `clipping` and `decay`: tables [2 K]."""
        self.gradients.mul_(self._spread(clipping))
        self.first.lerp_(self.gradients, 1.0 - BETAS[0])
        self.second.mul_(BETAS[1]).addcmul_(self.gradients, self.gradients, value=1.0 - BETAS[1])
        self.values.mul_(self._spread(1.0 - rates * decay))
        # rate * m / (sqrt(v) + epsilon) with both moments bias-corrected and all factors except m in the divisor. A
        # rate of 0 makes the divisor infinite and the update 0.
        correction = (1.0 - BETAS[1] ** number) ** 0.5
        divisor = self.second.sqrt().add_(EPSILON * correction)
        divisor.mul_(self._spread((1.0 - BETAS[0] ** number) / (correction * rates)))
        self.values.addcdiv_(self.first, divisor, value=-1.0)
        self.gradients.zero_()

    def _spread(self, table: Tensor) -> Tensor:
        """Return the entries of a table [2 K] for each line: [L, 1]."""
        return table.index_select(0, self.entry_of)[:, None]


def decay_groups(parameters: Sequence[tuple[nn.Parameter, bool]], training: Training) -> list[dict[str, Any]]:
    """Return the non-empty parameter groups of AdamW: with and without weight decay."""
    groups = [
        {"params": [p for p, decay in parameters if decay], "weight_decay": training.weight_decay},
        {"params": [p for p, decay in parameters if not decay], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
