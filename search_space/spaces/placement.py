"""Placements: an adapter at a site where it may sit, and the genes that determine it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autopeft.search_space.adapters import ADAPTERS, AdapterSpec, Mixture
from autopeft.search_space.adapters.mixture import MIXTURE_FIELDS
from autopeft.search_space.architecture import site_sort_key
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.declaration import DeclarationProblem
from autopeft.search_space.domains import Value
from autopeft.search_space.routers import Follow
from autopeft.search_space.spaces.genes import Gate


@dataclass(frozen=True, slots=True)
class Placement:
    """An adapter that may sit at a site.

    `gates`: conditions for it to be on, all of them. `genes`: gene of each searched field. `fixed`: values of the other
    fields. `experts`: the gate that makes it a mixture (None: it always is one if it has the field `experts`).
    `leader`: site whose router a mixture follows, empty for its own. `given`: folders of its pretrained LoRAs.
    `shared_ranks`, `ranks`: genes of the ranks of shared and routed experts, if the rank varies by expert.
    """

    adapter: str
    kind: str
    site: Site
    gates: tuple[Gate, ...]
    genes: Mapping[str, str]
    fixed: Mapping[str, Value]
    experts: Gate | None = None
    leader: str = ""
    given: tuple[str, ...] = ()
    shared_ranks: tuple[str, ...] = ()
    ranks: tuple[str, ...] = ()

    def is_on(self, assignment: Mapping[str, Value]) -> bool:
        """Return whether the adapter is at the site."""
        return all(assignment.get(gate.gene) == gate.value for gate in self.gates)

    def excludes(self, other: Placement) -> bool:
        """Return whether no assignment has both on, because they need other values of one gene."""
        gates = {gate.gene: gate.value for gate in self.gates}
        return any(gates.get(gate.gene, gate.value) != gate.value for gate in other.gates)

    @property
    def decided_by(self) -> tuple[str, ...]:
        """Names of the genes that `spec` reads."""
        experts = [self.experts.gene] if self.experts else []
        return (*self.genes.values(), *experts, *self.shared_ranks, *self.ranks)

    def is_mixture(self, assignment: Mapping[str, Value]) -> bool:
        """Return whether the adapter is a mixture of experts."""
        if self.experts is not None:
            return assignment.get(self.experts.gene) == self.experts.value
        return "experts" in self.genes or bool(self.fixed.get("experts"))

    def rank_genes(self, shared_experts: int, experts: int) -> tuple[str, ...]:
        """Return the genes of the ranks of so many experts, shared ones first; the first gene for a plain adapter."""
        if not experts:
            return (*self.shared_ranks, *self.ranks)[:1]
        return (*self.shared_ranks[:shared_experts], *self.ranks[:experts])

    def spec(self, assignment: Mapping[str, Value]) -> AdapterSpec:
        """Return the adapter that an assignment of the active genes puts here."""
        mixture = self.is_mixture(assignment)
        values = {
            **self.fixed,
            **{key: assignment[gene] for key, gene in self.genes.items() if mixture or key not in MIXTURE_FIELDS},
        }
        expert_fields: dict[str, Any] = {key: value for key, value in values.items() if key not in MIXTURE_FIELDS}
        mixture_fields: dict[str, Any] = {
            key: value for key, value in values.items() if key in MIXTURE_FIELDS and mixture
        }
        if self.ranks:
            genes = self.rank_genes(mixture_fields.get("shared_experts", 0), mixture_fields.get("experts", 0))
            mixture_fields["ranks"] = tuple(assignment[gene] for gene in genes)
            expert_fields["rank"] = max(mixture_fields["ranks"])
        expert = ADAPTERS[self.kind](**expert_fields)
        if not mixture:
            return expert.canonical()
        mixed = Mixture(expert=expert, given=self.given, **mixture_fields)
        if leader := self.leader_of(mixed):
            mixed = replace(mixed, router=Follow.name, leader=leader)
        return mixed.canonical()

    def leader_of(self, spec: Mixture) -> str:
        """Return the site whose router a mixture follows here; empty for its own router or constant gates."""
        return "" if spec.routed_by.constant else self.leader


def conflicts(placements: Sequence[Placement]) -> Iterator[DeclarationProblem]:
    """Yield the adapters that may be on together at a site, but compute with its weight, which only one can do.

    Experts of a mixture may.
    """
    readers: dict[str, list[Placement]] = {}
    found: set[tuple[str, str]] = set()
    for place in placements:
        if ADAPTERS[place.kind].reads_weight and not place.is_mixture({}):
            here = readers.setdefault(place.site.name, [])
            for other in here:
                names = (place.adapter, other.adapter)
                if names not in found and not place.excludes(other):
                    found.add(names)
                    yield (
                        ("adapters", place.adapter),
                        f"may be on at {place.site.name} together with {other.adapter!r}, and only one of them may"
                        " compute with the layer's weight: put both into a group of one_of, or set `at` or `layers`",
                    )
            here.append(place)


def numbered(placed: Sequence[tuple[Placement, AdapterSpec]]) -> Iterator[tuple[str, AdapterSpec]]:
    """Yield the adapters of an architecture with the names of their sites.

    Where a mixture follows a site that has several, its leader gets the number of the one of the same declaration.
    """
    mixtures: dict[str, list[tuple[Placement, AdapterSpec]]] = {}
    for place, spec in placed:
        if isinstance(spec, Mixture):
            mixtures.setdefault(place.site.name, []).append((place, spec))
    for place, spec in placed:
        if isinstance(spec, Mixture) and len(mixtures.get(spec.leader, ())) > 1:
            there = sorted(mixtures[spec.leader], key=lambda pair: site_sort_key(pair[1]))
            number = 1 + [other.adapter for other, _ in there].index(place.adapter)
            spec = replace(spec, leader=f"{spec.leader}#{number}")
        yield place.site.name, spec
