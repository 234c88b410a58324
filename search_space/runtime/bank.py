"""The one module that holds the parameters of every adapter type: banks, slots and size masks.

Notation: N banks, K slots (each reads one bank), M tokens per slot, R the size of the largest slot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from autopeft.search_space.adapters.base import AdapterSpec
from autopeft.search_space.adapters.given import stacked
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter
from autopeft.search_space.runtime.init import initialise, stream
from autopeft.search_space.runtime.pool import Pools, pools_of
from autopeft.search_space.runtime.router_state import RouterState
from autopeft.search_space.sharing import key_of, largest


@dataclass(slots=True)
class Call:
    """What an adapter's forward function sees beside its parameters and the activations."""

    bank: Bank
    #: Per-slot numbers of `AdapterSpec.constants`, each [K, ...].
    constants: dict[str, Tensor]
    #: [K, R] with 1 where a slot owns that part of the size, or None if all slots own all of it.
    mask: Tensor | None
    #: Rows of the batch that belong to one slot: the experts of a mixture that run side by side.
    experts: int = 1

    @property
    def base(self) -> nn.Module:
        """The backbone's module at the site."""
        return self.bank.base[0]

    @property
    def router(self) -> RouterState:
        """The state of the bank's router."""
        assert self.bank.router is not None
        return self.bank.router

    def max_over_slots(self, name: str) -> float:
        """Return the largest value of a field over the slots."""
        return float(max(getattr(spec, name) for spec in self.bank.specs))

    def min_over_slots(self, name: str) -> float:
        """Return the smallest value of a field over the slots."""
        return float(min(getattr(spec, name) for spec in self.bank.specs))

    def of_experts(self, count: int) -> Call:
        """Return the same call for `count` experts of each slot, one after the other."""
        constants = {name: value.repeat_interleave(count) for name, value in self.constants.items()}
        mask = None if self.mask is None else self.mask.repeat_interleave(count, 0)
        return Call(bank=self.bank, constants=constants, mask=mask, experts=count)

    def noisy(self, x: Tensor, name: str) -> Tensor:
        """Return x: [K, ..., E], in training with normal noise of the standard deviation in the field `name`.

        The noise comes from each slot's own stream; a slot reads its own experts of x.
        """
        if not self.bank.training or not self.max_over_slots(name):
            return x
        noise = torch.zeros_like(x)
        for k, spec in enumerate(self.bank.specs):
            if deviation := getattr(spec, name):
                own = noise[k, ..., : spec.num_experts]
                own.copy_(torch.randn(own.shape, generator=self.bank.dropout_streams[k], device=x.device))
                own.mul_(deviation)
        return x + noise

    @property
    def rates(self) -> list[float]:
        """Each slot's probability of dropout."""
        return [getattr(spec.plain, "dropout", 0.0) for spec in self.bank.specs]

    @property
    def drops(self) -> bool:
        """Whether some slot has dropout in this pass."""
        return self.bank.training and any(self.rates)

    def dropout(self, x: Tensor) -> Tensor:
        """Apply dropout with each slot's own probability, drawn from each slot's own stream. x: [K, ...]."""
        if not self.drops:
            return x
        keep = torch.unflatten(torch.ones_like(x), 0, (-1, self.experts))
        for k, rate in enumerate(self.rates):
            if rate > 0.0:
                own = keep[k, : self.bank.specs[k].num_experts_total if self.experts > 1 else 1]
                drawn = torch.rand(own.shape, generator=self.bank.dropout_streams[k], device=x.device)
                own.copy_((drawn >= rate).to(x) / (1.0 - rate))
        dropped: Tensor = x * keep.flatten(0, 1)
        return dropped


class Bank(nn.Module):
    """Parameters of one adapter type at one site for K slots, and their forward pass.

    `specs`: one per slot, of one structure (`AdapterSpec.structure`); sizes and per-slot fields may differ.
    `seeds`: one per slot; a slot's initial values and dropout depend on its seed and the site alone, so a
    slot alone equals the slot in a pack. `bank_of_slot`: which bank a slot reads (default: its own); slots
    that share a bank read nested prefixes of it, which is a weight-sharing supernet. `of`: another bank of the
    same structure, at least as large, whose parameters are read in place of own ones. `draw`: have initial values;
    without them `load_slot` has to follow. `pools`: the tensors that its site shares with others, of which the bank of
    slot k reads the row of `pool_slots[k]` (default: k); without them the bank shares with none. Raises ValueError when
    structures differ, and for a type that cannot sit at `site`.
    """

    #: Which bank each slot reads [K], or None if each reads its own.
    bank_index: Tensor | None
    #: See `Call`.
    mask: Tensor | None
    values: nn.ParameterDict

    def __init__(
        self,
        site: Site,
        specs: Sequence[AdapterSpec],
        base: nn.Module,
        seeds: Sequence[int | str],
        bank_of_slot: Sequence[int] | None = None,
        of: Bank | None = None,
        draw: bool = True,
        pools: Pools | None = None,
        pool_slots: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if len({spec.structure() for spec in specs}) != 1:
            raise ValueError(f"slots of one bank agree in structure, not {[s.structure() for s in specs]}")
        for spec in specs:
            if site.role not in spec.roles or not spec.fits(site):
                raise ValueError(f"an adapter of kind {spec.kind!r} cannot sit at {site.name!r}")
        self.site = site
        self.specs = tuple(specs)
        self.base = (base,)  # in a tuple: the backbone's module must not become a child of the adapter
        self.bank_of_slot = list(bank_of_slot if bank_of_slot is not None else range(len(specs)))
        own_banks = of is None and self.bank_of_slot == list(range(len(specs)))
        self.register_buffer("bank_index", None if own_banks else torch.tensor(self.bank_of_slot))
        device = next(base.parameters()).device
        self.dropout_streams = [stream(seed, site.name, specs[0].kind, "dropout", device=device) for seed in seeds]

        declared = [spec.parameters(site) for spec in self.specs]
        #: Of the largest slot, by name.
        self.shapes = {name: largest([own[name].shape for own in declared]) for name in declared[0]}
        self._declared = declared[0]
        shared = {n: key_of(p, n, site, specs[0].kind) for n, p in declared[0].items() if p.scope != "site"}
        #: Of each bank the row of a tensor that is shared, by name.
        self.rows: Mapping[str, Sequence[int]] = {} if of is None else of.rows
        if of is None and shared:
            banks = range(max(self.bank_of_slot) + 1)
            if pools is None:
                readers = [[k for k, bank in enumerate(self.bank_of_slot) if bank == n] for n in banks]
                placed = [[(site, specs[k]) for k in own] for own in readers]
                pools, pool_slots = pools_of(placed, [seeds[own[0]] for own in readers], device, draw), None
            numbers = banks if pool_slots is None else pool_slots
            self.rows = {name: [pools[key].row_of[n] for n in numbers] for name, key in shared.items()}
        self.values = nn.ParameterDict() if of is None else of.values
        for name, key in shared.items():
            if of is None:
                assert pools is not None
                self.values[name] = pools[key].value
        self._make_room(of)
        if of is None:
            self._draw(seeds, draw)
        for name, rows in self.rows.items():
            read = [rows[bank] for bank in self.bank_of_slot]
            whole = read == list(range(len(self.values[name])))
            self.register_buffer(f"rows_{name}", None if whole else torch.tensor(read))
        #: Numbers of its slots in the attachment.
        self.slots_served = list(range(len(self.specs)))
        #: The state of the router; None for a bank of plain adapters.
        self.router = None if self.specs[0].routed_by is None else RouterState(self.specs)

        sizes = [spec.size or 0 for spec in self.specs]  # types without a size need no mask
        owned = torch.arange(max(sizes))[None, :] < torch.tensor(sizes)[:, None]
        self.register_buffer("mask", None if owned.all() else owned.float())
        constants = [spec.constants(site) for spec in self.specs]
        for name in constants[0]:
            self.register_buffer(f"constant_{name}", torch.tensor([c[name] for c in constants]))
        self.constant_names = tuple(constants[0])

    def _make_room(self, of: Bank | None) -> None:
        """Zeros before values are drawn or loaded, each [N, ...]."""
        for name, shape in self.shapes.items():
            declared = self._declared[name]
            if declared.indices:
                room = torch.zeros(max(self.bank_of_slot) + 1, *shape, dtype=torch.int32)
                self.register_buffer(f"indices_{name}", room if of is None else of.tensors()[name])
            elif of is None and name not in self.rows:
                room = torch.zeros(max(self.bank_of_slot) + 1, *shape)
                self.values[name] = nn.Parameter(room, requires_grad=declared.trainable)

    @torch.no_grad()
    def _draw(self, seeds: Sequence[int | str], every: bool) -> None:
        """`every`: also what follows from the seeds."""
        tensors = self.tensors()
        # The largest slot of a bank fills it; the smaller ones read prefixes of what it has drawn.
        for k in sorted(range(len(self.specs)), key=lambda k: self.specs[k].num_params(self.site)):
            for name, declared in self.specs[k].own_parameters(self.site).items():
                if every or declared.key is not None:
                    seed = seeds[k] if declared.key is None else declared.key
                    own = self._initial(declared, name, (seed, self.site.name, self.specs[k].kind, name))
                    tensors[name][self.bank_of_slot[k]][tuple(slice(n) for n in own.shape)] = own

    def tensors(self) -> dict[str, Tensor]:
        """Values and indices, each [N, ...] (what is shared: the rows of all who share it), in the declared order."""
        indices = {name: getattr(self, f"indices_{name}") for name, p in self._declared.items() if p.indices}
        return {name: indices[name] if name in indices else self.values[name] for name in self.shapes}

    def _initial(self, declared: Parameter, name: str, words: tuple[object, ...]) -> Tensor:
        if declared.given:
            return stacked(declared.given, self.site, name, self.specs[0].size or 0)
        # An expert's values do not depend on how many there are, or on the others' ranks.
        if declared.rows:
            parts = [replace(declared, shape=(rows, *declared.shape[1:])) for rows in declared.rows]
            return torch.cat([initialise(part, stream(*words, e), self.base[0]) for e, part in enumerate(parts)])
        if not declared.per_expert:
            return initialise(declared, stream(*words), self.base[0])
        one = replace(declared, shape=declared.shape[1:])
        return torch.stack([initialise(one, stream(*words, e), self.base[0]) for e in range(declared.shape[0])])

    def slots(self) -> dict[str, Tensor]:
        """Parameters as the slots read them, each [K, ...], in the size of the largest slot."""
        read = self.tensors()
        if self.bank_index is None and not self.rows:
            return read
        for name, shape in self.shapes.items():
            index = getattr(self, f"rows_{name}") if name in self.rows else self.bank_index
            if index is None and name not in self.rows:
                continue
            value = read[name][(slice(None), *(slice(n) for n in shape))]
            if index is None:
                read[name] = value
            elif len(value) == 1:  # no copy for each slot
                read[name] = value.expand(len(self.specs), *shape)
            else:
                read[name] = value.index_select(0, index)
        return read

    def of_slot(self, k: int, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the parameters of slot k in its own size, without the slot dimension; views of the bank's.

        With `values`: the same parts of other tensors in the shape of the parameters, such as an optimiser's moments.
        """
        own: Mapping[str, Tensor] = self.tensors() if values is None else values
        shapes = {name: parameter.shape for name, parameter in self.specs[k].parameters(self.site).items()}
        bank = self.bank_of_slot[k]
        rows = {name: self.rows[name][bank] if name in self.rows else bank for name in shapes}
        return {name: own[name][rows[name]][tuple(slice(n) for n in shapes[name])] for name in shapes if name in own}

    @property
    def stored(self) -> list[str]:
        """What of the site's own belongs to a state."""
        return [name for name in self.shapes if self._declared[name].stored and name not in self.rows]

    def trained(self) -> Iterator[tuple[str, nn.Parameter, bool]]:
        """Yield names and values [N, ...] of what is trained of the site's own, and whether weight decay applies."""
        for name, value in self.values.items():
            if self._declared[name].trainable and name not in self.rows:
                yield name, value, self._declared[name].decay

    @torch.no_grad()
    def load_slot(self, k: int, values: dict[str, Tensor]) -> None:
        """Load what `of_slot` returns. Raises KeyError for a missing name of `stored`, ValueError for another shape."""
        stored = self.stored
        for name, own in self.of_slot(k).items():
            if name not in values and name not in stored:
                continue
            if own.shape != values[name].shape:
                shapes = f"{tuple(values[name].shape)}, not {tuple(own.shape)}"
                raise ValueError(f"{self.site.name} {name}: shape {shapes}")
            own.copy_(values[name])

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters, in which the adapters compute."""
        first: Tensor = next(iter(self.values.values()))
        return first.dtype

    @property
    def call(self) -> Call:
        """What the forward functions see of the bank."""
        constants = {name: getattr(self, f"constant_{name}") for name in self.constant_names}
        return Call(bank=self, constants=constants, mask=self.mask)

    # The adapters keep their own precision on a backbone of a lower one.

    def apply_input(self, x: Tensor) -> Tensor:
        """x: [K, M, D_in] to the same shape."""
        changed = self.specs[0].apply_input(self.slots(), x.to(self.dtype), self.call).to(x.dtype)
        self._note()
        return changed

    def apply_linear(self, x: Tensor, slots: Tensor | None) -> Tensor | None:
        """x: [K, M, D_in] of all slots of a pack, of which the bank serves `slots`; see `AdapterSpec.apply_linear`."""
        base: Any = self.base[0]
        changed = self.specs[0].apply_linear(self.slots(), x, base.weight, base.bias, self.call, slots)
        if changed is not None:
            self._note()
        return changed

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x: [K, M, D_in], y: [K, M, D_out]; returns the adapted y."""
        changed = self.specs[0].apply(self.slots(), x.to(self.dtype), y.to(self.dtype), self.call).to(y.dtype)
        self._note()
        return changed

    def _note(self) -> None:
        if self.router is not None:
            self.router.note()
