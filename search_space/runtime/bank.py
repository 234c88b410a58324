"""The module that holds the parameters of adapters of every type: banks, slots and size masks.

Notation: N banks, K slots (each reads one bank), M tokens per slot, R the size of the largest slot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from autopeft.search_space.adapters.base import AdapterSpec
from autopeft.search_space.adapters.given import principal, stacked
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Factor, Kept, Parameter, Places
from autopeft.search_space.runtime.factors import Starts
from autopeft.search_space.runtime.init import initialise, kept, stream
from autopeft.search_space.runtime.pool import Pools, pools_of
from autopeft.search_space.runtime.router_state import RouterState
from autopeft.search_space.runtime.watch import Watch
from autopeft.search_space.sharing import key_of, largest


@dataclass(slots=True)
class Call:
    """Run-time context of the forward functions of a bank; see `call.Call`."""

    bank: Bank
    #: Per-slot numbers of `AdapterSpec.constants`, each [K, ...].
    constants: dict[str, Tensor]
    #: [K, R] with 1 for the part of the size that a slot owns; None: every slot owns all of it.
    mask: Tensor | None
    #: Number of consecutive rows of the batch per slot: the experts of a mixture.
    experts: int = 1

    @property
    def base(self) -> nn.Module:
        """The backbone's module at the site."""
        return self.bank.base[0]

    @property
    def router(self) -> RouterState:
        """The state of the bank's router. Raises AssertionError for a bank of plain adapters."""
        assert self.bank.router is not None
        return self.bank.router

    def max_over_slots(self, name: str) -> float:
        """Return the largest value of a field over the slots."""
        return float(max(getattr(spec, name) for spec in self.bank.specs))

    def min_over_slots(self, name: str) -> float:
        """Return the smallest value of a field over the slots."""
        return float(min(getattr(spec, name) for spec in self.bank.specs))

    def of_experts(self, count: int) -> Call:
        """Return the call for a batch of K * count rows, in which the `count` experts of a slot are consecutive."""
        constants = {name: value.repeat_interleave(count) for name, value in self.constants.items()}
        mask = None if self.mask is None else self.mask.repeat_interleave(count, 0)
        return Call(bank=self.bank, constants=constants, mask=mask, experts=count)

    def noisy(self, x: Tensor, name: str) -> Tensor:
        """Return x: [K, ..., E]; in training, add normal noise with the standard deviation in the field `name`.

        The noise of each slot comes from the slot's own random stream and covers only the experts of the slot.
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
        """Dropout probability of each slot."""
        return [getattr(spec.plain, "dropout", 0.0) for spec in self.bank.specs]

    @property
    def drops(self) -> bool:
        """Whether any slot applies dropout in this pass."""
        return self.bank.training and any(self.rates)

    def dropout(self, x: Tensor) -> Tensor:
        """Return x: [K, ...] after dropout, with the probability and the random stream of each slot."""
        if not self.drops:
            return x
        keep = torch.unflatten(torch.ones_like(x), 0, (-1, self.experts))
        for k, rate in enumerate(self.rates):
            if rate > 0.0:
                own = keep[k, : self.bank.specs[k].num_experts_total if self.experts > 1 else 1]
                own.copy_((self._uniform(own.shape, k) >= rate).to(x) / (1.0 - rate))
        dropped: Tensor = x * keep.flatten(0, 1)
        return dropped

    def _uniform(self, shape: torch.Size, k: int) -> Tensor:
        """Draw numbers in [0, 1) for the rows [E, M, ...] of slot k, of which the minibatch may have more."""
        stream = self.bank.dropout_streams[k]
        part = self.bank.part
        if part is None:
            return torch.rand(shape, generator=stream, device=stream.device)
        each = shape[1] // part.examples
        whole = torch.rand(shape[0], each * part.of, *shape[2:], generator=stream, device=stream.device)
        return whole[:, each * part.first : each * (part.first + part.examples)]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a minibatch of `of` examples: `examples` of them, from number `first` on."""

    first: int
    examples: int
    of: int


class Bank(nn.Module):
    """Parameters of one adapter type at one site for K slots, and their forward pass.

    - `specs`: one per slot, all of the same structure (`AdapterSpec.structure`); sizes and per-slot fields may differ.
    - `seeds`: one per slot. The initial values and the dropout of a slot depend only on its seed and the site, so a
      slot trained alone equals the slot in a pack.
    - `bank_of_slot`: the bank that each slot reads (default: its own). Slots that share a bank read nested prefixes of
      it, which is a weight-sharing supernet.
    - `of`: another bank of the same structure, at least as large, whose parameters this bank reads instead of its own.
    - `draw`: draw initial values; without them, `load_slot` must follow.
    - `starts`: the initial values of factors that follow from the site (default: those that need its weight alone).
    - `pools`: the tensors that the site shares with other sites; bank n reads the row of slot `pool_slots[n]` (default:
      n). Without pools, the bank shares nothing with other sites.

    Raises ValueError if the structures differ, and for an adapter that cannot sit at `site`.
    """

    #: [K], the bank that each slot reads; None: each reads its own.
    bank_index: Tensor | None
    #: See `Call.mask`.
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
        starts: Starts | None = None,
    ) -> None:
        super().__init__()
        if len({spec.structure() for spec in specs}) != 1:
            raise ValueError(f"slots of one bank must have the same structure, not {[s.structure() for s in specs]}")
        for spec in specs:
            if site.role not in spec.roles or not spec.fits(site):
                raise ValueError(f"an adapter of kind {spec.kind!r} cannot be attached at {site.name!r}")
        self.site = site
        self.specs = tuple(specs)
        self.base = (base,)  # in a tuple: the backbone's module must not become a child of the adapter
        self.bank_of_slot = list(bank_of_slot if bank_of_slot is not None else range(len(specs)))
        own_banks = of is None and self.bank_of_slot == list(range(len(specs)))
        self.register_buffer("bank_index", None if own_banks else torch.tensor(self.bank_of_slot))
        device = next(base.parameters()).device
        self.dropout_streams = [stream(seed, site.name, specs[0].kind, "dropout", device=device) for seed in seeds]

        declared = [spec.parameters(site) for spec in self.specs]
        #: Shape of each tensor in the largest slot, by name.
        self.shapes = {name: largest([own[name].shape for own in declared]) for name in declared[0]}
        self._declared = declared[0]
        shared = {n: key_of(p, n, site, specs[0].kind) for n, p in declared[0].items() if p.scope != "site"}
        #: Row of each bank in each shared tensor, by name.
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
        self._starts = starts or Starts()
        if of is None:
            self._draw(seeds, draw)
        for name, rows in self.rows.items():
            read = [rows[bank] for bank in self.bank_of_slot]
            whole = read == list(range(len(self.values[name])))
            self.register_buffer(f"rows_{name}", None if whole else torch.tensor(read))
        #: The examples at hand, if they are a part of the minibatch; dropout then draws for the whole of it, so that an
        #: example has the same mask whatever the parts are.
        self.part: Part | None = None
        #: What types that move know of the steps before.
        self.watch = Watch(len(self.specs))
        #: Numbers of the bank's slots in the attachment.
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
        """Allocate tensors of zeros, each [N, ...], before values are drawn or loaded."""
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
        """Draw initial values; without `every`, only the values that are drawn from a key."""
        tensors = self.tensors()
        # The largest slot of a bank is drawn last and overwrites all of it; smaller slots read prefixes of its values.
        for k in sorted(range(len(self.specs)), key=lambda k: self.specs[k].num_params(self.site)):
            for name, declared in self.specs[k].own_parameters(self.site).items():
                if every or declared.key is not None:
                    seed = seeds[k] if declared.key is None else declared.key
                    own = self._initial(declared, name, (seed, self.site.name, self.specs[k].kind, name))
                    tensors[name][self.bank_of_slot[k]][tuple(slice(n) for n in own.shape)] = own

    def tensors(self) -> dict[str, Tensor]:
        """Return values and indices by name, each [N, ...], in the declared order.

        A shared tensor has the rows of all slots that share it.
        """
        indices = {name: getattr(self, f"indices_{name}") for name, p in self._declared.items() if p.indices}
        return {name: indices[name] if name in indices else self.values[name] for name in self.shapes}

    def _initial(self, declared: Parameter, name: str, words: tuple[object, ...]) -> Tensor:
        if isinstance(declared.init, Factor):
            return self._starts.value(declared.init, self.site, self.base[0], declared.shape)
        if declared.given and declared.given_side:
            rest = initialise(declared, stream(*words), None)
            return principal(declared.given, self.site, declared.given_side, rest)
        if isinstance(declared.init, Kept):
            base, seed = self.base[0], str(words[0])
            values = Bank(self.site, [declared.init.of], base, [seed]).of_slot(0)[declared.init.tensor]
            scores = self._starts.scores(declared.init, self.site, base, values, seed)
            return kept(values, scores, declared)
        if isinstance(declared.init, Places):
            return self._starts.places(declared.init.rule, self.site, self.base[0], declared.count)
        if declared.given:
            return stacked(declared.given, self.site, name, self.specs[0].size or 0)
        # The values of an expert do not depend on the number of experts or on the ranks of the others.
        if declared.rows:
            parts = [replace(declared, shape=(rows, *declared.shape[1:])) for rows in declared.rows]
            return torch.cat([initialise(part, stream(*words, e), self.base[0]) for e, part in enumerate(parts)])
        if not declared.per_expert:
            return initialise(declared, stream(*words), self.base[0])
        one = replace(declared, shape=declared.shape[1:])
        return torch.stack([initialise(one, stream(*words, e), self.base[0]) for e in range(declared.shape[0])])

    def slots(self) -> dict[str, Tensor]:
        """Return the parameters that the slots read, by name, each [K, ...] in the size of the largest slot."""
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
            elif len(value) == 1:  # avoids a copy per slot
                read[name] = value.expand(len(self.specs), *shape)
            else:
                read[name] = value.index_select(0, index)
        return read

    def of_slot(self, k: int, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return views of the parameters of slot k in its own size, without the slot dimension.

        With `values`, the views are of other tensors in the shapes of the parameters, such as an optimiser's moments.
        """
        own: Mapping[str, Tensor] = self.tensors() if values is None else values
        shapes = {name: parameter.shape for name, parameter in self.specs[k].parameters(self.site).items()}
        bank = self.bank_of_slot[k]
        rows = {name: self.rows[name][bank] if name in self.rows else bank for name in shapes}
        return {name: own[name][rows[name]][tuple(slice(n) for n in shapes[name])] for name in shapes if name in own}

    @property
    def stored(self) -> list[str]:
        """Names of the tensors of scope "site" that a stored state contains."""
        return [name for name in self.shapes if self._declared[name].stored and name not in self.rows]

    @property
    def untrained(self) -> list[str]:
        """Names of the tensors of scope "site" that keep their values, unless the type moves them."""
        return [name for name in self.shapes if not self._declared[name].trainable and name not in self.rows]

    def trained(self) -> Iterator[tuple[str, nn.Parameter, bool]]:
        """Yield name, values [N, ...] and whether weight decay applies, for each trained tensor of scope "site"."""
        for name, value in self.values.items():
            if self._declared[name].trainable and name not in self.rows:
                yield name, value, self._declared[name].decay

    @torch.no_grad()
    def load_slot(self, k: int, values: dict[str, Tensor]) -> None:
        """Load the values of slot k, in the form that `of_slot` returns.

        Raises KeyError if a name of `stored` is missing, and ValueError for a tensor of another shape.
        """
        stored = self.stored
        for name, own in self.of_slot(k).items():
            if name not in values and name not in stored:
                continue
            if own.shape != values[name].shape:
                shapes = f"{tuple(values[name].shape)}, expected {tuple(own.shape)}"
                raise ValueError(f"{self.site.name} {name}: has shape {shapes}")
            own.copy_(values[name])

    @property
    def draws(self) -> bool:
        """Whether the forward pass takes numbers from the random streams."""
        rates = [(getattr(spec.plain, "dropout", 0.0), getattr(spec, "router_noise", 0.0)) for spec in self.specs]
        return self.training and any(map(any, rates))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters, in which the adapters compute."""
        first: Tensor = next(iter(self.values.values()))
        return first.dtype

    @property
    def call(self) -> Call:
        """Context that the forward functions receive."""
        constants = {name: getattr(self, f"constant_{name}") for name in self.constant_names}
        return Call(bank=self, constants=constants, mask=self.mask)

    # Adapters compute in their own dtype, also on a backbone of lower precision.

    def apply_input(self, x: Tensor) -> Tensor:
        """Return the site's input with the change by the adapters. x: [K, M, D_in]. Returns [K, M, D_in]."""
        changed = self.specs[0].apply_input(self.slots(), x.to(self.dtype), self.call).to(x.dtype)
        self._note()
        return changed

    def apply_linear(self, x: Tensor, slots: Tensor | None) -> Tensor | None:
        """Return the output of the site's linear with the adapters on it; see `AdapterSpec.apply_linear`.

        x: [K, M, D_in] of all slots of a pack, of which the bank serves slots: [S]. Returns [K, M, D_out].
        """
        base: Any = self.base[0]
        changed = self.specs[0].apply_linear(self.slots(), x, base.weight, base.bias, self.call, slots)
        if changed is not None:
            self._note()
        return changed

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the site's output with the change by the adapters.

        x: [K, M, D_in], y: [K, M, D_out]. Returns [K, M, D_out].
        """
        changed = self.specs[0].apply(self.slots(), x.to(self.dtype), y.to(self.dtype), self.call).to(y.dtype)
        self._note()
        return changed

    def _note(self) -> None:
        if self.router is not None:
            self.router.note()
