"""Placements: where an adapter may sit, and what the genes put there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autopeft.search_space.adapters import ADAPTERS, AdapterSpec, Mixture
from autopeft.search_space.adapters.mixture import MIXTURE_FIELDS
from autopeft.search_space.architecture import site_sort_key
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.domains import Value
from autopeft.search_space.spaces.genes import Gate


@dataclass(frozen=True, slots=True)
class Placement:
    """An adapter that may sit at a site. `gates` decide whether it does, `genes` name the gene of each field that is
    searched, `fixed` has the values of the others. Where there may be several experts of it, `experts` decides whether
    there are (None: always, if their number is a field); `leader`: the site of the layer whose gates they have, if not
    their own. `given`: folders that they come from. `shared_ranks`, `ranks`: the genes of the shared and the other
    experts' ranks, if each has its own.
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
        return all(assignment.get(gate.gene) == gate.value for gate in self.gates)

    @property
    def decided_by(self) -> tuple[str, ...]:
        """The genes that `spec` reads."""
        experts = [self.experts.gene] if self.experts else []
        return (*self.genes.values(), *experts, *self.shared_ranks, *self.ranks)

    def is_mixture(self, assignment: Mapping[str, Value]) -> bool:
        if self.experts is not None:
            return assignment.get(self.experts.gene) == self.experts.value
        return "experts" in self.genes or bool(self.fixed.get("experts"))

    def rank_genes(self, shared_experts: int, experts: int) -> tuple[str, ...]:
        """Of those that each have their own rank; 0 experts: of a plain adapter, which has that of the first."""
        if not experts:
            return (*self.shared_ranks, *self.ranks)[:1]
        return (*self.shared_ranks[:shared_experts], *self.ranks[:experts])

    def spec(self, assignment: Mapping[str, Value]) -> AdapterSpec:
        mixture = self.is_mixture(assignment)
        values = {
            **self.fixed,
            **{key: assignment[gene] for key, gene in self.genes.items() if mixture or key not in MIXTURE_FIELDS},
        }
        own = {key: value for key, value in values.items() if key not in MIXTURE_FIELDS}
        fields_: dict[str, Any] = {key: value for key, value in values.items() if key in MIXTURE_FIELDS and mixture}
        if self.ranks:
            genes = self.rank_genes(fields_.get("shared_experts", 0), fields_.get("experts", 0))
            fields_["ranks"] = tuple(assignment[gene] for gene in genes)
            own["rank"] = max(fields_["ranks"])
        expert = ADAPTERS[self.kind](**own)
        if not mixture:
            return expert
        mixture_ = Mixture(expert=expert, given=self.given, **fields_)
        if leader := self.leader_of(mixture_):
            mixture_ = replace(mixture_, router="follow", leader=leader)
        return mixture_.canonical()

    def leader_of(self, spec: Mixture) -> str:
        """The site whose gates a mixture has at this place: where all gates are alike, it needs none."""
        return "" if spec.router == "uniform" else self.leader


def numbered(placed: Sequence[tuple[Placement, AdapterSpec]]) -> Iterator[tuple[str, AdapterSpec]]:
    """All adapters of an architecture with their sites. Those that follow a site of several mixtures say which of them,
    that of the same declaration.
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
