"""Placements: where an adapter may sit, and what the genes put there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autopeft.search_space.adapters import ADAPTERS, AdapterSpec, Mixture
from autopeft.search_space.adapters.mixture import MIXTURE_FIELDS
from autopeft.search_space.backbone import Site
from autopeft.search_space.domains import Value
from autopeft.search_space.genes import Gate


@dataclass(frozen=True, slots=True)
class Placement:
    """An adapter that may sit at a site. `gates` decide whether it does, `genes` name the gene of each field that is
    searched, `fixed` has the values of the others. Where there may be several experts of it, `experts` decides whether
    there are (None: always, if their number is a field); `leader`: the site of the layer whose gates they have, if not
    their own. `given`: folders that they come from.
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

    def is_on(self, assignment: Mapping[str, Value]) -> bool:
        return all(assignment.get(gate.gene) == gate.value for gate in self.gates)

    @property
    def decided_by(self) -> tuple[str, ...]:
        """The genes that `spec` reads."""
        return (*self.genes.values(), *([self.experts.gene] if self.experts else []))

    def is_mixture(self, assignment: Mapping[str, Value]) -> bool:
        if self.experts is not None:
            return assignment.get(self.experts.gene) == self.experts.value
        return "experts" in self.genes or bool(self.fixed.get("experts"))

    def spec(self, assignment: Mapping[str, Value]) -> AdapterSpec:
        mixture = self.is_mixture(assignment)
        values = {
            **self.fixed,
            **{key: assignment[gene] for key, gene in self.genes.items() if mixture or key not in MIXTURE_FIELDS},
        }
        own = {key: value for key, value in values.items() if key not in MIXTURE_FIELDS}
        expert = ADAPTERS[self.kind](**own)
        if not mixture:
            return expert
        fields_: dict[str, Any] = {key: value for key, value in values.items() if key in MIXTURE_FIELDS}
        if self.leader:
            fields_ |= {"router": "follow", "leader": self.leader}
        return Mixture(expert=expert, given=self.given, **fields_).canonical()
