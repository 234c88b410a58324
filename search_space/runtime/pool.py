"""Tensors that the adapters of several sites share, for all slots of an attachment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from autopeft.search_space.adapters.base import AdapterSpec
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter
from autopeft.search_space.runtime.init import initialise, stream
from autopeft.search_space.sharing import SharedKey, largest, shared_tensors


class Pool:
    """One shared tensor: `value`: [U, ...], of which each slot reads one row.

    `declared`: the tensor in the size of each slot that has it, by slot; `seeds`: one per slot. Slots whose values are
    drawn from a key in the same size have equal values and read the same row, so U may be smaller than the number of
    slots. `draw`: also draw values that depend on the seeds of the slots; otherwise these are zero.
    """

    def __init__(
        self,
        key: SharedKey,
        declared: Mapping[int, Parameter],
        seeds: Sequence[int | str],
        device: torch.device,
        draw: bool = True,
    ) -> None:
        first = next(iter(declared.values()))
        self.key = key
        self.trainable, self.decay, self.stored = first.trainable, first.decay, first.stored
        rows: dict[object, int] = {}
        #: Row of `value` by slot.
        self.row_of = {
            slot: rows.setdefault(slot if key.key is None else parameter.shape, len(rows))
            for slot, parameter in declared.items()
        }
        #: Slots that have the tensor.
        self.slots = list(declared)
        value = torch.zeros(len(rows), *largest([parameter.shape for parameter in declared.values()]))
        for slot, parameter in declared.items():
            if draw or key.key is not None:
                seed = seeds[slot] if key.key is None else key.key
                own = initialise(parameter, stream(seed, key.scope, key.kind, key.name), None)
                value[self.row_of[slot]][tuple(slice(n) for n in parameter.shape)] = own
        self.value = nn.Parameter(value.to(device), requires_grad=first.trainable)

    def part(self, slot: int, shape: tuple[int, ...], value: Tensor | None = None) -> Tensor:
        """Return a view of the prefix of this shape in the slot's row of `value` (default: the pool's own)."""
        whole = self.value if value is None else value
        return whole[self.row_of[slot]][tuple(slice(n) for n in shape)]


Pools = Mapping[SharedKey, Pool]


def pools_of(
    slots: Sequence[Iterable[tuple[Site, AdapterSpec]]],
    seeds: Sequence[int | str],
    device: torch.device,
    draw: bool = True,
) -> Pools:
    """Return the shared tensors of the adapters of all slots. `slots`: sites and adapters of each slot."""
    declared: dict[SharedKey, dict[int, Parameter]] = {}
    for slot, placed in enumerate(slots):
        for key, parameter in shared_tensors(placed).items():
            declared.setdefault(key, {})[slot] = parameter
    return {key: Pool(key, own, seeds, device, draw) for key, own in declared.items()}
