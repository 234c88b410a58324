"""Measured costs of many candidates from a few measurements: what each adapter adds, added up."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

from autopeft.evaluators.base import Attaching
from autopeft.search_space.adapters import AdapterSpec
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.spaces.space import SearchSpace

#: Metrics that add up. Steps and their memory do not: they depend on how low in the model the lowest adapter sits.
ADDITIVE = ("latency_s",)
#: What two adapters must have in common to cost the same.
Kind = tuple[str, AdapterSpec]
Known = Mapping[str, Mapping[str, float]]


class CostTable:
    """Costs by metric of an architecture: those of the bare model, and for each adapter what its like adds (Wang et al.
    2020, HAT, section 3.2, foretell the latency of what they search too, from measurements on the device).

    An adapter is measured at all sites of its role that the space has for it, and the difference is shared out among
    them: one alone would drown in the noise of the clock. Measured as soon as an architecture asks for it, and kept:
    `known` has measurements of before by the keys of their architectures, and `keep` is given all of them after each
    new one. A first pass is the bare model's once more, however many adapters read it; a mixture that reads another's
    router counts as if it had its own.
    """

    def __init__(
        self,
        evaluator: Attaching,
        space: SearchSpace,
        metrics: Collection[str],
        training: Mapping[str, Any],
        known: Known = MappingProxyType({}),
        keep: Callable[[Known], None] = lambda known: None,
    ) -> None:
        self.evaluator = evaluator
        self.metrics = frozenset(metrics)
        self.training = training
        self.known = dict(known)
        self.keep = keep
        self._sites: dict[tuple[str, str], list[str]] = {}
        for place in space.placements:
            names = self._sites.setdefault((place.kind, place.site.role), [])
            if place.site.name not in names:
                names.append(place.site.name)
        self._bare = self._part(Architecture())
        self._added: dict[Kind, dict[str, float]] = {}

    def costs(self, architecture: Architecture) -> dict[str, float]:
        found = self._passes(architecture)
        for name, spec in architecture:
            for metric, value in self._adds((self.evaluator.backbone.site(name).role, spec.standalone)).items():
                found[metric] += value
        return found

    def _adds(self, kind: Kind) -> Mapping[str, float]:
        if kind not in self._added:
            role, spec = kind
            sites = self._sites[spec.plain.kind, role]
            architecture = Architecture.of({name: [spec] for name in sites})
            whole, passes = self._part(architecture), self._passes(architecture)
            self._added[kind] = {
                metric: max(0.0, whole[metric] - passes[metric]) / len(sites) for metric in self.metrics
            }
        return self._added[kind]

    def _passes(self, architecture: Architecture) -> dict[str, float]:
        """Of the bare model's passes alone."""
        return {metric: (1 + architecture.first_pass) * value for metric, value in self._bare.items()}

    @property
    def num_measured(self) -> int:
        return 1 + len(self._added)

    def _part(self, architecture: Architecture) -> Mapping[str, float]:
        found = self.known.get(architecture.key)
        if found is None or not found.keys() >= self.metrics:
            found = self.known[architecture.key] = self.measured(architecture)
            self.keep(self.known)
        return found

    def measured(self, architecture: Architecture) -> dict[str, float]:
        values = self.evaluator.costs(Candidate(architecture=architecture, training=self.training), self.metrics).values
        return {metric: values[metric] for metric in self.metrics}
