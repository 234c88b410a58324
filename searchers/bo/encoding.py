"""Encoding of many points of a space: rows of positions, their active genes, costs and features.

Notation: n points, G genes, D features. A row [G] holds a position on the unit interval for every gene. The values of
discrete genes are where `Domain.to_unit` puts them; an inactive gene has a position that counts once it is active.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopeft.search_space.architecture import Candidate
from autopeft.search_space.domains import BOOLEAN, Choice, Domain, Float, Int
from autopeft.search_space.problem import DECLARED
from autopeft.search_space.sharing import Shared, merged, shared_tensors
from autopeft.search_space.spaces.genes import TRAINING, Assignment
from autopeft.search_space.spaces.placement import Placement
from autopeft.search_space.spaces.space import SearchSpace

Rows = NDArray[np.float64]
Mask = NDArray[np.bool_]

RATE = f"{TRAINING}learning_rate"
#: Integer ranges of more values than this are searched in steps, like real ones.
MOST_LEVELS = 64


class Encoding:
    """The genes of a space as columns.

    A kernel measures distances between `features`, which needs a rule for conditional genes (Hutter and Osborne 2013,
    "A kernel for hierarchical parameter spaces"). A gene that is inactive in two points adds no distance between them:
    its feature is the same constant in all such points. The distance from "off" to "on" comes from the gates, which
    are features themselves and off where they are inactive. A size whose gate is closed is one step below its smallest
    value, because an adapter of rank 0 is next to one of rank 1; any other inactive gene is in the middle of its range,
    as near as possible to all values. An unordered choice has a column per value (all zero where it is inactive).
    """

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.genes = space.genes
        self._column = {gene.name: g for g, gene in enumerate(space.genes)}
        #: Positions of a gene's values in ascending order; None for ranges.
        self.levels: list[Rows | None] = [_levels(gene.domain) for gene in space.genes]
        self.ordered = np.array([_is_ordered(gene.domain) for gene in space.genes], dtype=bool)
        #: Other genes with the same domain, with which a gene can exchange its value.
        self.alike = [
            np.array([h for h, other in enumerate(space.genes) if h != g and other.domain == gene.domain], dtype=int)
            for g, gene in enumerate(space.genes)
        ]
        self._conditions = [
            [[(self._column[name], self.position(name, value)) for name, value in condition] for condition in
             gene.conditions] for gene in space.genes
        ]  # fmt: skip
        #: Positions [G] in the middle of each domain, for inactive genes.
        self.middle = np.array([gene.domain.to_unit(gene.domain.from_unit(0.5)) for gene in space.genes])
        #: Genes [G] of the architecture, not of the training: declared costs depend on these.
        self.shape_genes = np.array([not gene.name.startswith(TRAINING) for gene in space.genes], dtype=bool)
        self._sizes = {self._column[gene.size] for gene in space.genes if gene.size is not None}
        #: The gene of each feature.
        self.gene_of_feature: list[str] = []
        #: The feature of a learning rate on a logarithmic scale, and the range of its logarithm; None without one.
        self.rate: tuple[int, float] | None = None
        for gene in space.genes:
            if gene.name == RATE and isinstance(gene.domain, Float) and gene.domain.log:
                self.rate = len(self.gene_of_feature), math.log(gene.domain.high / gene.domain.low)
            self.gene_of_feature += [gene.name] * _num_columns(gene.domain)
        groups: dict[Any, list[Placement]] = {}
        for place in space.placements:
            groups.setdefault((place.adapter, place.gates, *place.genes.values()), []).append(place)
        self._groups = [_Group(self, places) for places in groups.values()]

    def position(self, gene: str, value: Any) -> float:
        """Return the position of a gene's value on the unit interval."""
        return self.genes[self._column[gene]].domain.to_unit(value)

    def value(self, gene: str, position: float) -> Any:
        """Return the gene's value at a position on the unit interval."""
        return self.genes[self._column[gene]].domain.from_unit(position)

    # Rows

    def rows(self, assignments: Iterable[Mapping[str, Any]]) -> Rows:
        """Return the rows [n, G] of assignments; inactive genes are at 0.5 or the level nearest to it."""
        rows = [
            [
                gene.domain.to_unit(assignment[gene.name]) if gene.name in assignment else centre
                for gene, centre in zip(self.genes, self.middle, strict=True)
            ]
            for assignment in assignments
        ]
        return np.array(rows, dtype=float).reshape(len(rows), len(self.genes))

    def assignment(self, row: Rows) -> Assignment:
        """Return the assignment of a row [G], without inactive genes."""
        return self.space.from_unit(row.tolist())

    def draw(self, count: int, rng: np.random.Generator) -> Rows:
        """Draw points [count, G], each with its own share of open gates and its own mean of sizes.

        Independent draws of genes would have half of the gates open and middle sizes on average: with many genes they
        never come near the ends, where fronts lie.
        """
        rows = rng.random((count, len(self.genes)))
        share, middle = rng.random((2, count))
        for g, gene in enumerate(self.genes):
            if gene.domain == BOOLEAN:
                rows[:, g] = np.where(rows[:, g] < share, 0.75, 0.25)
            elif not gene.name.startswith(TRAINING) and self.ordered[g]:
                rows[:, g] = np.clip(rng.normal(middle, 0.25), 0.0, 1.0)
        return self.snapped(rows)

    def smallest(self) -> Rows:
        """Return one row for each adapter in each of its scopes: it alone, at its smallest, where the space allows.

        The part of a space within its limits may be too small for draws to find.
        """
        rows = np.tile(self.middle, (len(self._groups), 1))
        for g, gene in enumerate(self.genes):
            if gene.domain == BOOLEAN:
                rows[:, g] = gene.domain.to_unit(False)
            elif self.shape_genes[g] and self.ordered[g]:
                rows[:, g] = gene.domain.to_unit(gene.domain.from_unit(0.0))
        for row, group in zip(rows, self._groups, strict=True):
            for name, position in group.gates:
                row[self._column[name]] = position
        return rows

    def snapped(self, rows: Rows) -> Rows:
        """Return rows [n, G] with positions moved to the nearest values."""
        rows = rows.copy()
        for g, (gene, levels) in enumerate(zip(self.genes, self.levels, strict=True)):
            if levels is None:
                rows[:, g] = [gene.domain.to_unit(gene.domain.from_unit(u)) for u in rows[:, g]]
            else:
                rows[:, g] = levels[np.abs(rows[:, g, None] - levels).argmin(1)]
        return rows

    def active(self, rows: Rows) -> Mask:
        """Return which genes of rows [n, G] are active, [n, G]."""
        active = np.zeros(rows.shape, dtype=bool)
        for g, conditions in enumerate(self._conditions):
            for condition in conditions:
                holds = np.ones(len(rows), dtype=bool)
                for column, position in condition:
                    holds &= active[:, column] & (np.abs(rows[:, column] - position) < 1e-9)
                active[:, g] |= holds
        return active

    # The inputs of a model

    def features(self, rows: Rows, active: Mask) -> Rows:
        """Return the features [n, D] of rows [n, G], each in [0, 1]; see the class."""
        columns: list[Rows] = []
        for g, gene in enumerate(self.genes):
            on, u = active[:, g], rows[:, g]
            domain = gene.domain
            if domain == BOOLEAN:
                columns.append((on & (u > 0.5)).astype(float))
            elif isinstance(domain, Choice) and not domain.ordered:
                # Scaled so that two values are at distance 1, as the ends of a range are.
                columns += [(on & (np.abs(u - (i + 0.5) / len(domain.choices)) < 1e-9)) * 0.5**0.5
                            for i in range(len(domain.choices))]  # fmt: skip
            elif g in self._sizes:
                step = 1.0 / min(domain.cardinality or MOST_LEVELS, MOST_LEVELS)
                columns.append(np.where(on, (u + 0.5 * step) / (1.0 + 0.5 * step), 0.0))
            else:
                columns.append(np.where(on, u, 0.5))
        return np.column_stack(columns).astype(float) if columns else np.zeros((len(rows), 0))

    def inputs(self, rows: Rows, active: Mask, num_params: Rows) -> Rows:
        """Return the features and, with a learning rate to search, the size [n, D + 1] that `surrogate.Tilted` needs.

        The size is the logarithm of the parameters, in the unit of the rate's feature.
        """
        features = self.features(rows, active)
        if self.rate is None:
            return features
        return np.column_stack([features, np.log(np.maximum(num_params, 1.0)) / self.rate[1]])

    def is_empty(self, rows: Rows, active: Mask) -> Mask:
        """Return for which rows no adapter is on, [n]."""
        empty = np.ones(len(rows), dtype=bool)
        for group in self._groups:
            empty &= ~self._is_on(group, rows, active)
        return empty

    def costs(self, rows: Rows, active: Mask) -> dict[str, Rows]:
        """Return declared metrics of the architectures, [n] each: equal to `declared_costs` of each one."""
        total, first_pass = np.zeros((len(rows), len(DECLARED))), np.zeros(len(rows), dtype=bool)
        shared: dict[int, list[Shared]] = {}  # by row
        for group in self._groups:
            where = np.flatnonzero(self._is_on(group, rows, active))
            if len(where):
                columns = [self._column[gene] for gene in group.genes]
                positions = rows[where][:, columns]
                # With an axis, np.unique sorts rows as structures, which is slow.
                if positions.shape[1] == 1:
                    values, inverse = np.unique(positions[:, 0], return_inverse=True)
                    values = values[:, None]
                else:
                    values, inverse = np.unique(positions, axis=0, return_inverse=True)
                costs = np.array([group.cost(self, tuple(v)) for v in values.tolist()])[inverse.reshape(-1)]
                total[where] += costs[:, :-1]
                first_pass[where] |= costs[:, -1] > 0
                parts = [group.shared(self, tuple(v)) for v in values.tolist()]
                if any(parts):
                    for row, value in zip(where.tolist(), inverse.reshape(-1).tolist(), strict=True):
                        shared.setdefault(row, []).append(parts[value])
        for row, own in shared.items():
            total[row, : len(_OF_SHARED)] += _costs_of_shared(merged(own))
        found = dict(zip(DECLARED, np.floor(total.T), strict=True))
        found["flops_per_token"] += first_pass * self.space.backbone.flops_per_token
        return found

    def _is_on(self, group: _Group, rows: Rows, active: Mask) -> Mask:
        on = np.ones(len(rows), dtype=bool)
        for name, position in group.gates:
            column = self._column[name]
            on &= active[:, column] & (np.abs(rows[:, column] - position) < 1e-9)
        return on


def smallest(space: SearchSpace) -> list[Candidate]:
    """Return small candidates with an adapter: each adapter alone, and `SearchSpace.smallest` if it has one."""
    encoding = Encoding(space)
    points = [*(encoding.assignment(row) for row in encoding.smallest()), space.smallest()]
    return [candidate for candidate in map(space.decode, points) if candidate.architecture]


class _Group:
    """Placements that depend on the same genes: an adapter at all sites of its scope.

    Costs in the order of `DECLARED`, the need of a first pass, and the tensors that its sites share with others are
    cached by the positions of its genes.
    """

    def __init__(self, encoding: Encoding, places: Sequence[Placement]) -> None:
        self.places = places
        #: The specs at its places differ only in the leader that they follow.
        self._by_leader = {place.leader: place for place in places}
        self.genes = places[0].decided_by
        self.gates = [(gate.gene, encoding.position(gate.gene, gate.value)) for gate in places[0].gates]
        self._cache: dict[tuple[float, ...], tuple[tuple[float, ...], Shared]] = {}

    def cost(self, encoding: Encoding, positions: tuple[float, ...]) -> tuple[float, ...]:
        """Return the costs without shared tensors, and whether a first pass is needed."""
        return self._at(encoding, positions)[0]

    def shared(self, encoding: Encoding, positions: tuple[float, ...]) -> Shared:
        """Return the shared tensors that count in any of the costs."""
        return self._at(encoding, positions)[1]

    def _at(self, encoding: Encoding, positions: tuple[float, ...]) -> tuple[tuple[float, ...], Shared]:
        if positions not in self._cache:
            values = {gene: encoding.value(gene, u) for gene, u in zip(self.genes, positions, strict=True)}
            by_leader = {leader: place.spec(values) for leader, place in self._by_leader.items()}
            specs = [(by_leader[place.leader], place.site) for place in self.places]
            params = sum(spec.num_params(site) for spec, site in specs)
            stored = sum(spec.stored_bits(site) for spec, site in specs) / 8
            flops = sum(spec.flops_per_token(site) for spec, site in specs)
            costs = params, stored, flops, any(spec.first_pass for spec, _ in specs)
            tensors = shared_tensors((site, spec) for spec, site in specs).items()
            self._cache[positions] = costs, {key: p for key, p in tensors if p.trainable or p.stored}
        return self._cache[positions]


#: The first of `DECLARED`, to which tensors that sites share add.
_OF_SHARED = ("num_params", "stored_bytes")
assert DECLARED[: len(_OF_SHARED)] == _OF_SHARED


def _costs_of_shared(shared: Shared) -> tuple[float, float]:
    params = sum(parameter.count for parameter in shared.values() if parameter.trainable)
    return params, sum(parameter.stored_bits for parameter in shared.values()) / 8


def _levels(domain: Domain) -> Rows | None:
    if isinstance(domain, Choice):
        return np.array([domain.to_unit(value) for value in domain.choices])
    if isinstance(domain, Int) and domain.cardinality <= MOST_LEVELS:
        return np.array([domain.to_unit(value) for value in range(domain.low, domain.high + 1, domain.step)])
    return None


def _is_ordered(domain: Domain) -> bool:
    return isinstance(domain, (Float, Int)) or domain.ordered


def _num_columns(domain: Domain) -> int:
    return len(domain.choices) if isinstance(domain, Choice) and not domain.ordered and domain != BOOLEAN else 1
