"""AdamW over all slots of a pack in one pass, each slot with its own learning rates, weight decay and clipping.

Notation: K slots. Values, gradients and moments are stored in four buffers [L, W] of L lines of W elements, and the
parameters are views of them: a step takes a few operations, whatever the number of adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.attachment.learning_rates import slots_of_rows
from autopeft.search_space.training import Training

BETAS = (0.9, 0.999)
EPSILON = 1e-8
#: Key of the factor of the learning rate in the parameter groups of torch's optimisers.
FACTOR = "rate_factor"
#: Elements per line for parameters whose parts per slot consist of whole lines: spreading settings over lines takes a
#: fifth of the time of spreading them over elements.
WIDTH = 64


class PackedAdamW:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) over the banks of an attachment, with the numbers of torch's AdamW.

    It takes over the parameters' storage: they and their gradients become views of the buffers.
    """

    def __init__(self, attachment: Attachment, trainings: Sequence[Training]) -> None:
        self._attachment = attachment
        by_width: dict[int, list[_Row]] = {}
        for row in slots_of_rows(attachment):
            by_width.setdefault(WIDTH if row[0][0].numel() % WIDTH == 0 else 1, []).append(row)
        decays = [training.weight_decay for training in trainings]
        self._buffers = [_Buffers(rows, width, decays) for width, rows in by_width.items()]
        device = next(attachment.model[0].parameters()).device
        # An infinite norm means no clipping.
        self._max_norm = torch.tensor([t.max_grad_norm or float("inf") for t in trainings], device=device)

    @property
    def idle(self) -> bool:
        """Whether there are no trained parameters, so that steps have no effect."""
        return not self._buffers

    def step(self, number: int, rates: Tensor) -> None:
        """Update all slots and reset their gradients. `number` counts steps from 1; `rates`: [K] learning rates.

        A tensor with a factor of its learning rate (`AdapterSpec.rate_of`) moves by the slot's rate times that factor.
        """
        squares = torch.stack([buffers.squares(len(rates)) for buffers in self._buffers]).sum(0)
        clipping = (self._max_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        for buffers in self._buffers:
            buffers.step(number, rates, clipping)

    def moments(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
        """Return the first and second moments of a parameter, as views in its shape."""
        views = next(buffers.views[parameter] for buffers in self._buffers if parameter in buffers.views)
        return views["first"], views["second"]

    def parts(self, k: int) -> dict[str, dict[str, Tensor]]:
        """Return views of slot k's values and moments, by group and by the names of `Attachment.state`."""
        groups = {
            name: {parameter: views[name] for buffers in self._buffers for parameter, views in buffers.views.items()}
            for name in ("values", "first", "second")
        }
        return {name: self._attachment.parts(k, tensors) for name, tensors in groups.items()}


#: A tensor as `slots_of_rows` yields it.
_Row = tuple[nn.Parameter, bool, list[int], list[float]]


class _Buffers:
    """Buffers of parameters whose rows consist of whole lines of `width`. `decays`: weight decay of each slot.

    Lines with the same slot, weight decay and factor of the learning rate share an entry of tables [E].
    """

    def __init__(self, rows: Sequence[_Row], width: int, decays: Sequence[float]) -> None:
        sizes = [parameter.numel() // width for parameter, *_ in rows]
        device = rows[0][0].device
        self.values, self.gradients, self.first, self.second = torch.zeros(4, sum(sizes), width, device=device)
        self.views: dict[nn.Parameter, dict[str, Tensor]] = {}
        numbers: dict[tuple[int, float, float], int] = {}
        entries = []
        buffers = {name: getattr(self, name).split(sizes) for name in ("values", "gradients", "first", "second")}
        for i, (parameter, decay, slots, factors) in enumerate(rows):
            views = {name: parts[i].view_as(parameter) for name, parts in buffers.items()}
            views["values"].copy_(parameter.data)
            parameter.data, parameter.grad = views["values"], views["gradients"]
            self.views[parameter] = views
            kinds = [(k, decays[k] * decay, factor) for k, factor in zip(slots, factors, strict=True)]
            own = torch.tensor([numbers.setdefault(kind, len(numbers)) for kind in kinds])
            entries.append(own.repeat_interleave(sizes[i] // len(slots)))
        #: The entry of each line, and the slot, weight decay and factor of each entry.
        self.entry_of = torch.cat(entries).to(device)
        of_entries = [torch.tensor(column, device=device) for column in zip(*numbers, strict=True)]
        self.slot_of, self.decay, self.factor = of_entries

    def squares(self, slots: int) -> Tensor:
        """Return the squared norm [K] of each slot's gradients in these buffers."""
        squares: Tensor = torch.linalg.vector_norm(self.gradients, dim=1).square()
        return squares.new_zeros(slots).index_add_(0, self.slot_of.index_select(0, self.entry_of), squares)

    def step(self, number: int, rates: Tensor, clipping: Tensor) -> None:
        """Make one step. `rates`: [K] learning rates, `clipping`: [K] factors of the gradients."""
        rates = rates.index_select(0, self.slot_of) * self.factor
        self.gradients.mul_(self._spread(clipping.index_select(0, self.slot_of)))
        self.first.lerp_(self.gradients, 1.0 - BETAS[0])
        self.second.mul_(BETAS[1]).addcmul_(self.gradients, self.gradients, value=1.0 - BETAS[1])
        self.values.mul_(self._spread(1.0 - rates * self.decay))
        # rate * m / (sqrt(v) + epsilon) with both moments bias-corrected and all factors except m in the divisor. A
        # rate of 0 makes the divisor infinite and the update 0.
        correction = (1.0 - BETAS[1] ** number) ** 0.5
        divisor = self.second.sqrt().add_(EPSILON * correction)
        divisor.mul_(self._spread((1.0 - BETAS[0] ** number) / (correction * rates)))
        self.values.addcdiv_(self.first, divisor, value=-1.0)
        self.gradients.zero_()

    def _spread(self, table: Tensor) -> Tensor:
        """Return the entries of a table [E] for each line: [L, 1]."""
        return table.index_select(0, self.entry_of)[:, None]


def parameter_groups(
    parameters: Sequence[tuple[nn.Parameter, bool]], training: Training, factors: Mapping[nn.Parameter, float]
) -> list[dict[str, Any]]:
    """Return the parameter groups of AdamW: with and without weight decay, for each factor of the learning rate.

    `factors`: 1 for parameters that it lacks. `set_rate` sets the learning rates.
    """
    members: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for parameter, decay in sorted(parameters, key=lambda pair: not pair[1]):
        members.setdefault((decay, factors.get(parameter, 1.0)), []).append(parameter)
    return [
        {"params": own, "weight_decay": training.weight_decay * decay, **({} if factor == 1.0 else {FACTOR: factor})}
        for (decay, factor), own in members.items()
    ]


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of each group: `rate`, times the factor of the group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(FACTOR, 1.0)


def moments(optimizer: Optimizer | None, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
    """Return the first and second moments that torch's AdamW keeps of a parameter that it has updated."""
    assert optimizer is not None
    state = optimizer.state[parameter]
    return state["exp_avg"], state["exp_avg_sq"]
