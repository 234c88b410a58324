"""The additive cost model: costs of many candidates from a few measurements, as sums over their adapters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

from autopeft.evaluators.base import AttachingEvaluator
from autopeft.search_space.adapters import AdapterSpec
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.spaces.space import SearchSpace

#: Additive metrics. Time and memory of a step are not: they depend on the depth of the lowest adapter.
ADDITIVE = ("latency_s",)
#: Role of the site and adapter: the key of the added cost, equal for adapters of equal cost.
CostKey = tuple[str, AdapterSpec]
#: Measured costs by metric, by the key of an architecture.
MeasuredCosts = Mapping[str, Mapping[str, float]]


class CostTable:
    """Predicts costs as the cost of the bare model plus the added cost of each adapter.

    Wang et al. 2020, HAT, section 3.2, also predict the latency of candidates from measurements on the device.

    An adapter is measured at all sites of its role where the space allows it, and the difference to the bare model is
    divided by their number: the difference of one site would be lost in the noise of the clock. Measurements are lazy
    and cached: `measured` has earlier ones by the keys of their architectures, and `save` gets all of them after each
    new one. A first pass costs as much as a pass of the bare model, however many adapters read it; a mixture that
    follows the router of another counts as if it had its own.
    """

    def __init__(
        self,
        evaluator: AttachingEvaluator,
        space: SearchSpace,
        metrics: Collection[str],
        training: Mapping[str, Any],
        measured: MeasuredCosts = MappingProxyType({}),
        save: Callable[[MeasuredCosts], None] = lambda measured: None,
    ) -> None:
        self.evaluator = evaluator
        self.metrics = frozenset(metrics)
        self.training = training
        self.measured = dict(measured)
        self.save = save
        self._sites: dict[tuple[str, str], list[str]] = {}
        for place in space.placements:
            names = self._sites.setdefault((place.kind, place.site.role), [])
            if place.site.name not in names:
                names.append(place.site.name)
        self._bare = self._costs_of(Architecture())
        self._added: dict[CostKey, dict[str, float]] = {}

    def costs(self, architecture: Architecture) -> dict[str, float]:
        """Return the predicted costs by metric. Raises OutOfMemoryError if a measurement does not fit."""
        found = self._passes(architecture)
        for name, spec in architecture:
            key = (self.evaluator.backbone.site(name).role, spec.standalone)
            for metric, value in self._added_costs(key).items():
                found[metric] += value
        return found

    def _added_costs(self, key: CostKey) -> Mapping[str, float]:
        if key not in self._added:
            role, spec = key
            sites = self._sites[spec.plain.kind, role]
            architecture = Architecture.of({name: [spec] for name in sites})
            total, passes = self._costs_of(architecture), self._passes(architecture)
            self._added[key] = {
                metric: max(0.0, total[metric] - passes[metric]) / len(sites) for metric in self.metrics
            }
        return self._added[key]

    def _passes(self, architecture: Architecture) -> dict[str, float]:
        """Return the costs of the passes of the bare model: one, or two with a first pass."""
        return {metric: (1 + architecture.first_pass) * value for metric, value in self._bare.items()}

    @property
    def num_measured(self) -> int:
        """Number of measured architectures in use, with the bare model."""
        return 1 + len(self._added)

    def _costs_of(self, architecture: Architecture) -> Mapping[str, float]:
        found = self.measured.get(architecture.key)
        if found is None or not found.keys() >= self.metrics:
            found = self.measured[architecture.key] = self.measure(architecture)
            self.save(self.measured)
        return found

    def measure(self, architecture: Architecture) -> dict[str, float]:
        """Measure an architecture as a whole; return its costs by metric."""
        values = self.evaluator.costs(Candidate(architecture=architecture, training=self.training), self.metrics).values
        return {metric: values[metric] for metric in self.metrics}
