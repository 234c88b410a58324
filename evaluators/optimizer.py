"""AdamW of all slots of a pack in one pass, each slot with its own rate, decay and clipping.

Notation: K slots, P elements (of all trained tensors of all slots). Values, gradients and moments lie in four flat
buffers [P], and the parameters are views of them: a step is a handful of operations however many adapters there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autopeft.evaluators.host import Attachment
from autopeft.search_space.training import Training

BETAS = (0.9, 0.999)
EPSILON = 1e-8
#: Elements; views that start at a multiple of it are aligned for vector instructions.
ALIGNMENT = 16


class PackedAdamW:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) over the banks of an attachment; the numbers are torch's AdamW's.

    Takes the parameters' storage over: they and their gradients become views of the buffers.
    """

    def __init__(self, attachment: Attachment, trainings: Sequence[Training]) -> None:
        self._attachment = attachment
        rows = list(attachment.slots_of_rows())
        device = rows[0][0].device
        sizes = [-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter, _, _ in rows]
        self._values, self._gradients, self._first, self._second = torch.zeros(4, sum(sizes), device=device)
        self._first_of: dict[nn.Parameter, Tensor] = {}
        self._second_of: dict[nn.Parameter, Tensor] = {}
        self._parameters = [parameter for parameter, _, _ in rows]
        self._slot_of_row = torch.tensor([slot for _, _, slots in rows for slot in slots], device=device)
        # Element to line of the tables [2 K] of rates and decays: a slot's decayed elements, then those without decay.
        lines = []
        for (parameter, decay, slots), size, start in zip(rows, sizes, _starts(sizes), strict=True):
            own = slice(start, start + parameter.numel())
            views = [buffer[own].view_as(parameter) for buffer in (self._values, self._gradients)]
            views[0].copy_(parameter.data)
            parameter.data, parameter.grad = views
            self._first_of[parameter] = self._first[own].view_as(parameter)
            self._second_of[parameter] = self._second[own].view_as(parameter)
            line = torch.tensor([2 * slot + (not decay) for slot in slots])
            lines.append(line.repeat_interleave(parameter[0].numel()))
            lines.append(torch.zeros(size - parameter.numel(), dtype=line.dtype))
        self._line_of = torch.cat(lines).to(device)
        self._decay = torch.tensor([w for t in trainings for w in (t.weight_decay, 0.0)], device=device)
        # No clipping is a bound that nothing reaches.
        self._max_norm = torch.tensor([t.max_grad_norm or float("inf") for t in trainings], device=device)

    def step(self, number: int, rates: Tensor) -> None:
        """Update all slots by their gradients and forget these. `number` counts from 1; `rates`: [K] learning rates."""
        gradients = self._gradients
        coefficients = (self._max_norm / (self._norms() + 1e-6)).clamp(max=1.0)
        gradients.mul_(self._spread(coefficients.repeat_interleave(2)))
        self._first.lerp_(gradients, 1.0 - BETAS[0])
        self._second.mul_(BETAS[1]).addcmul_(gradients, gradients, value=1.0 - BETAS[1])
        rates = rates.repeat_interleave(2)
        self._values.mul_(self._spread(1.0 - rates * self._decay))
        root = self._second.sqrt().div_((1.0 - BETAS[1] ** number) ** 0.5).add_(EPSILON)
        update = self._first.div(root).mul_(self._spread(rates / (1.0 - BETAS[0] ** number)))
        self._values.sub_(update)
        gradients.zero_()

    def _norms(self) -> Tensor:
        """The norm of each slot's gradient: [K]."""
        squares = torch.cat([p.grad.flatten(1).square().sum(1) for p in self._parameters if p.grad is not None])
        return squares.new_zeros(len(self._max_norm)).index_add_(0, self._slot_of_row, squares).sqrt()

    def _spread(self, table: Tensor) -> Tensor:
        """[2 K] to the elements: [P]."""
        return table.index_select(0, self._line_of)

    def parts(self, k: int) -> dict[str, dict[str, Tensor]]:
        """All there is of slot k, views of values and moments by the names of `Attachment.state`."""
        values = {parameter: parameter.data for parameter in self._parameters}
        kept = {"values": values, "first": self._first_of, "second": self._second_of}
        return {name: self._attachment.parts(k, tensors) for name, tensors in kept.items()}


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]
