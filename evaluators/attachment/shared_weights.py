"""The weights of a supernet: one set of adapters of maximal size, from which all architectures of a space read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, product
from typing import Any

from torch import nn

from autopeft.evaluators.attachment.heads import head_bank, head_sites
from autopeft.search_space.adapters import ADAPTERS, AdapterSpec, Mixture
from autopeft.search_space.adapters.base import RATE
from autopeft.search_space.adapters.mixture import MIXTURE_FIELDS
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.domains import Choice, Domain, Float
from autopeft.search_space.runtime.bank import Bank
from autopeft.search_space.runtime.factors import Starts
from autopeft.search_space.runtime.pool import pools_of
from autopeft.search_space.spaces.placement import Placement
from autopeft.search_space.spaces.space import SearchSpace


class SharedWeights(nn.Module):
    """M sets of banks: for every site, structure and repetition (see `Attachment`), a bank of M slots of maximal size.

    An architecture reads the leading part of each bank that has its own size. Settings that are not part of a structure
    (alpha, dropout) belong to each slot. Raises ValueError for a space with an adapter that cannot be shared.
    """

    def __init__(
        self,
        model: nn.Module,
        space: SearchSpace,
        *,
        seed: int,
        num_banks: int = 1,
        pretrained_head: bool = False,
        starts: Starts | None = None,
    ) -> None:
        super().__init__()
        self.num_banks = num_banks
        self._banks: dict[tuple[Any, ...], Bank] = {}
        self._order = nn.ModuleList()
        domains = {gene.name: gene.domain for gene in space.genes}
        seeds = [seed if m == 0 else f"{seed}/{m}" for m in range(num_banks)]
        largest: dict[tuple[Any, ...], list[AdapterSpec]] = {}
        sites = {place.site.name: place.site for place in space.placements}
        mixed: dict[str, set[str]] = {}  # adapters with experts, by site
        for place in space.placements:
            if place.site.role == "backbone":
                raise ValueError(f"a supernet cannot share {place.adapter!r}: it trains the backbone itself")
            if place.ranks:
                raise ValueError(f"a supernet cannot share {place.adapter!r}: its experts have different ranks")
            for spec in _largest(place, domains):
                largest.setdefault((place.site.name, spec.structure()), []).append(spec)
                if spec.routed_by:
                    mixed.setdefault(place.site.name, set()).add(place.adapter)
        several = {name: count() for name, adapters in mixed.items() if len(adapters) > 1}
        placed = [(sites[name], _enveloping(specs)) for (name, _), specs in largest.items()]
        #: Tensors that sites share, with a slot per set.
        self.pools = pools_of([placed] * num_banks, seeds, next(model.parameters()).device)
        for (name, structure), specs in largest.items():
            spec, site = _enveloping(specs), sites[name]
            for nth in range(len(specs)):  # each may be the n-th of its structure at the site
                # Without numbers, mixtures at one site would start with the same values, whatever their structures.
                number = next(several[name]) if spec.routed_by and name in several else nth
                named = [f"{word}#{number}" if number else word for word in seeds]
                bank = Bank(
                    site, [spec] * num_banks, model.get_submodule(site.module), named, pools=self.pools, starts=starts
                )
                self._add((name, structure, nth), bank)
        for site in head_sites(model, space.backbone):
            bank = head_bank(site, model, seeds, pretrained_head)
            self._add((site.name, bank.specs[0].structure(), 0), bank)
        self.to(next(model.parameters()).device)

    def _add(self, key: tuple[Any, ...], bank: Bank) -> None:
        self._banks[key] = bank
        self._order.append(bank)

    def bank(self, site: Site, structure: tuple[Any, ...], nth: int = 0) -> Bank:
        """Return the bank of a site and structure. Raises ValueError for an adapter that is not in the space."""
        try:
            return self._banks[site.name, structure, nth]
        except KeyError:
            raise ValueError(f"the supernet has no {structure[0]!r} of this structure at {site.name!r}") from None

    def trainable(self) -> Iterator[tuple[nn.Parameter, bool]]:
        """Yield every tensor [M, ...] and whether weight decay applies to it."""
        yield from ((value, decay) for bank in self._banks.values() for _, value, decay in bank.trained())
        yield from ((pool.value, pool.decay) for pool in self.pools.values() if pool.trainable)

    def rate_factors(self) -> dict[nn.Parameter, float]:
        """Return the factors of the learning rate of the tensors of `trainable`, those of the enveloping adapters."""
        return {v: bank.specs[0].rate_of(name) for bank in self._banks.values() for name, v, _ in bank.trained()}


def _largest(place: Placement, domains: Mapping[str, Domain]) -> Iterator[AdapterSpec]:
    """Yield the largest adapter at a place, once for each structure that it may have there. Raises ValueError."""
    names: list[str] = []
    choices: list[Sequence[Any]] = []
    if place.experts is not None:
        names.append(place.experts.gene)
        choices.append([True, False])
    for key, gene in place.genes.items():
        names.append(gene)
        owner = Mixture if key in MIXTURE_FIELDS else ADAPTERS[place.kind]
        choices.append(_values(owner, key, domains[gene]))
    found = [place.spec(dict(zip(names, values, strict=True))) for values in product(*choices)]
    if not all(spec.nested for spec in found):
        raise ValueError(
            f"a supernet cannot share {place.adapter!r}: with its init, a smaller adapter is no part of a larger one"
        )
    yield from {spec.structure(): spec for spec in found}.values()


def _enveloping(specs: Sequence[AdapterSpec]) -> AdapterSpec:
    """Return the adapter of this structure with the largest size and number of experts among `specs`."""
    largest = max((spec.plain for spec in specs), key=lambda spec: spec.size or 0)
    mixtures = [spec for spec in specs if isinstance(spec, Mixture)]
    if not mixtures:
        return largest
    return replace(mixtures[0], expert=largest, experts=max(spec.experts for spec in mixtures))


def _values(kind: type[AdapterSpec], field: str, domain: Domain) -> Sequence[Any]:
    if field in (kind.size_field, "experts"):
        return [max(domain.choices) if isinstance(domain, Choice) else domain.high]
    if field in (RATE, *kind.per_slot_fields):
        middle = domain.from_unit(0.5)
        # Words may change the tensors (an init with an offset). The middle comes last: of one structure, it is taken.
        words = domain.choices if isinstance(domain, Choice) and isinstance(middle, str) else ()
        return [*(word for word in words if word != middle), middle]
    if isinstance(domain, Choice):
        return domain.choices
    if isinstance(domain, Float):
        raise ValueError(
            f"a supernet needs a list of values for {field} of {kind.kind}: each value has separate weights"
        )
    return range(domain.low, domain.high + 1, domain.step)
