"""The declarative search space: which adapters, of what size, where, and how they are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from random import Random
from typing import Any

from autopeft.search_space.adapters import ADAPTERS, AdapterSpec
from autopeft.search_space.adapters.mixture import MIXTURE_FIELDS
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.backbones.backbone import Backbone, Site
from autopeft.search_space.declaration import (
    OFF,
    STAGES,
    AdapterChoice,
    OneOf,
    SpaceError,
    leaders_of,
    problems_of,
    sites_of,
)
from autopeft.search_space.domains import BOOLEAN, Choice, Domain, Int, Value, without_zero
from autopeft.search_space.spaces.genes import TRAINING, Assignment, Condition, Gate, Gene
from autopeft.search_space.spaces.placement import Placement, conflicts, numbered

#: Places for adapters, each a site and an adapter that may sit there: a hundred layers with ten adapters have 7000.
MOST_PLACES = 50_000


class SearchSpace:
    """Genes compiled from a declaration over one backbone.

    `adapters`: choices by name. `one_of`: exclusive groups. `layer_gate`: adds one on/off gene per layer for all its
    adapters. `stages`: number of equal groups of layers for the granularity "stage" (default: 4, or the number of
    layers if that is less). `training`: value or domain per field of `Training`. Raises SpaceError with every problem.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        adapters: Mapping[str, AdapterChoice],
        one_of: Sequence[OneOf] = (),
        layer_gate: bool = False,
        stages: int | None = None,
        training: Mapping[str, Domain | Value] | None = None,
    ) -> None:
        self.backbone = backbone
        self.adapters = dict(adapters)
        self.one_of = tuple(one_of)
        self.layer_gate = layer_gate
        self.stages = min(STAGES, backbone.num_layers) if stages is None else stages
        self.training = dict(training or {})
        problems = list(problems_of(backbone, self.adapters, self.one_of, self.stages, self.training))
        if problems:
            raise SpaceError(problems)
        self._sites = {name: sites_of(choice, backbone) for name, choice in self.adapters.items()}
        places = sum(len(sites) * self._weight(name) for name, sites in self._sites.items())
        if places > MOST_PLACES:
            what = f"has {places:,} places for adapters and experts; a space may have {MOST_PLACES:,}: shorten `at`"
            raise SpaceError([(("adapters",), f"{what}, `layers` or `experts`")])
        self._gates = {
            (name, site.name): self._gates_of(name, site) for name, sites in self._sites.items() for site in sites
        }
        #: The gate that makes an adapter at a site a mixture, where `experts` can be 0 (a plain adapter).
        self._experts = {
            (name, site.name): self._zero_gate(name, "experts", site)
            for name, sites in self._sites.items()
            for site in sites
        }
        self.genes: tuple[Gene, ...] = tuple(self._compile())
        #: Every adapter at every site where it may sit.
        self.placements: tuple[Placement, ...] = tuple(self._place())
        if problems := list(conflicts(self.placements)):
            raise SpaceError(problems)
        self._by_name = {gene.name: gene for gene in self.genes}

    def _weight(self, name: str) -> int:
        """Return how many places an adapter at a site counts for: more if each expert has a rank, a tenth for each."""
        if "expert" not in self.adapters[name].vary.values():
            return 1
        experts = [self._counts(name, key) for key in ("shared_experts", "experts")]
        return 1 + sum(max(counts) * len(counts) for counts in experts) // 10

    # Declaration -> genes

    def _scope(self, granularity: str, site: Site) -> str:
        """Return the suffix of the gene that governs `site`; a site without a layer has its own gene."""
        if granularity == "model":
            return ""
        if granularity == "site" or site.layer is None:
            return f".{site.name}"
        if granularity == "layer":
            return f".layers.{site.layer}"
        return f".stages.{site.layer * self.stages // self.backbone.num_layers}"

    def _group_of(self, name: str) -> OneOf | None:
        return next((group for group in self.one_of if name in group.members), None)

    def _zero_gate(self, name: str, key: str | None, site: Site) -> Gate | None:
        """Return the gate that makes a field nonzero, if its domain contains 0; it is a separate gene."""
        choice = self.adapters[name]
        domain = None if key is None else choice.fields.get(key)
        if not (isinstance(domain, (Int, Choice)) and domain.contains(0)):
            return None
        scope = self._scope(choice.vary.get(str(key), "model"), site)
        return Gate(f"{name}.{key}.on{scope}", True, name, f"{name}.{key}{scope}")

    def _gates_of(self, name: str, site: Site) -> tuple[Gate, ...]:
        """Return the gates of an adapter at `site`, highest order first."""
        choice = self.adapters[name]
        gates: list[Gate] = []
        if self.layer_gate and site.layer is not None:
            gates.append(Gate(f"layers.{site.layer}.on", True))
        group = self._group_of(name)
        if group is not None:
            gates.append(Gate(f"{group.name}{self._scope(group.per, site)}", name))
        if choice.placement is not None:
            gates.append(Gate(f"{name}.on{self._scope(choice.placement, site)}", True, name))
        size = self._zero_gate(name, ADAPTERS[choice.kind].size_field, site)
        return (*gates, size) if size else tuple(gates)

    def _conditions_of(self, name: str, site: Site, key: str) -> Condition:
        """Return the condition under which a field at `site` is active."""
        experts = self._experts[name, site.name] if key in MIXTURE_FIELDS else None
        return _all((*self._gates[name, site.name], *([experts] if experts else [])))

    def _compile(self) -> Iterator[Gene]:
        gates: dict[str, list[Gate]] = {}
        conditions: dict[str, set[Condition]] = {}
        order: dict[str, int] = {}
        for place, outer in self._gates.items():
            experts = self._experts[place]
            chain = (*outer, experts) if experts else outer
            for position, gate in enumerate(chain):
                gates.setdefault(gate.gene, []).append(gate)
                conditions.setdefault(gate.gene, set()).add(_all(chain[:position]))
                order[gate.gene] = max(order.get(gate.gene, 0), position)
        for gene in sorted(gates, key=lambda gene: order[gene]):
            gate = gates[gene][0]
            yield Gene(
                name=gene,
                domain=BOOLEAN if gate.value is True else self._types(gates[gene]),
                conditions=_absorb(conditions[gene]),
                adapter=gate.adapter,
                size=gate.size,
            )
        for name, choice in self.adapters.items():
            # The genes that determine whether an expert exists come before the genes of its rank.
            for key, domain in sorted(choice.fields.items(), key=lambda field: choice.vary.get(field[0]) == "expert"):
                if isinstance(domain, Domain):
                    per_expert = choice.vary.get(key) == "expert"
                    yield from self._rank_genes(name, domain) if per_expert else self._field_genes(name, key, domain)
        for key, domain in self.training.items():
            if isinstance(domain, Domain):
                yield Gene(name=TRAINING + key, domain=domain)

    def _types(self, gates: Sequence[Gate]) -> Choice:
        """Return the domain of a group's gene: the members with a site in the scope of these gates."""
        here = [gate.value for gate in gates]
        group = self._group_of(str(here[0]))
        assert group is not None
        members = tuple(member for member in dict.fromkeys(group.members) if member in here)
        return Choice(choices=((OFF,) if group.optional else ()) + members)

    def _scopes(self, name: str, key: str) -> dict[str, list[Site]]:
        scopes: dict[str, list[Site]] = {}
        for site in self._sites[name]:
            scopes.setdefault(self._scope(self.adapters[name].vary.get(key, "model"), site), []).append(site)
        return scopes

    def _field_genes(self, name: str, key: str, domain: Domain) -> Iterator[Gene]:
        if key in (ADAPTERS[self.adapters[name].kind].size_field, "experts"):
            domain = without_zero(domain)
        for scope, sites in self._scopes(name, key).items():
            conditions = {self._conditions_of(name, site, key) for site in sites}
            yield Gene(name=f"{name}.{key}{scope}", domain=domain, conditions=_absorb(conditions), adapter=name)

    def _rank_names(self, name: str) -> dict[str, tuple[str, ...]]:
        """Return the genes of ranks that vary by expert, by the field that counts these experts."""
        if "expert" not in self.adapters[name].vary.values():
            return {"shared_experts": (), "experts": ()}
        shared, routed = (max(self._counts(name, key)) for key in ("shared_experts", "experts"))
        genes = tuple(f"{name}.rank.experts.{e}" for e in range(shared + routed))
        return {"shared_experts": genes[:shared], "experts": genes[shared:]}

    def _counts(self, name: str, key: str) -> Sequence[int]:
        """Return the possible values of a field that counts experts, without 0 for `experts`."""
        domain: Any = self.adapters[name].fields.get(key, 0)
        if isinstance(domain, Int):
            domain = Choice(choices=tuple(range(domain.low, domain.high + 1, domain.step)))
        counts: Sequence[Any] = domain.choices if isinstance(domain, Choice) else [domain]
        return [count for count in counts if count or key != "experts"]

    def _rank_genes(self, name: str, domain: Domain) -> Iterator[Gene]:
        """Yield one gene per possible expert, first the shared ones, then the routed ones.

        The first is also the gene of a plain adapter's rank, at sites without experts.
        """
        names = self._rank_names(name)
        first = [*names["shared_experts"], *names["experts"]][0]
        for key, genes in names.items():
            for e, gene in enumerate(genes):
                conditions: set[Condition] = set()
                for site in self._sites[name]:
                    within = self._conditions_of(name, site, key)
                    here = {within | more for more in self._more_than(e, name, key, site)}
                    plain = self._experts[name, site.name]
                    if gene == first and plain is not None:
                        outer = _all(self._gates[name, site.name])
                        here = {outer} if within in here else {*here, outer | {(plain.gene, False)}}
                    conditions |= here
                yield Gene(name=gene, domain=domain, conditions=_absorb(conditions), adapter=name)

    def _more_than(self, number: int, name: str, key: str, site: Site) -> Iterator[Condition]:
        """Yield the conditions under which a field counts more than `number` experts at `site`."""
        counts = self._counts(name, key)
        if min(counts) > number:
            yield frozenset()
            return
        gene = f"{name}.{key}{self._scope(self.adapters[name].vary.get(key, 'model'), site)}"
        yield from (frozenset({(gene, count)}) for count in counts if count > number)

    def _place(self) -> Iterator[Placement]:
        for name, choice in self.adapters.items():
            ranks = self._rank_names(name)
            leaders = leaders_of(choice, self._sites[name])
            for site in self._sites[name]:
                genes = {
                    key: f"{name}.{key}{self._scope(choice.vary.get(key, 'model'), site)}"
                    for key, domain in choice.fields.items()
                    if isinstance(domain, Domain) and choice.vary.get(key) != "expert"
                }
                fixed: dict[str, Any] = {k: v for k, v in choice.fields.items() if not isinstance(v, Domain)}
                if ADAPTERS[choice.kind].takes_given:
                    fixed["given"] = choice.given
                gates, experts = self._gates[name, site.name], self._experts[name, site.name]
                leader = leaders.get(site.layer) or site
                yield Placement(
                    name,
                    choice.kind,
                    site,
                    gates,
                    genes,
                    fixed,
                    experts,
                    "" if leader == site else leader.name,
                    choice.given,
                    shared_ranks=ranks["shared_experts"],
                    ranks=ranks["experts"],
                )

    # Assignments

    def complete(self, partial: Mapping[str, Value], fill: Callable[[Gene], Value]) -> Assignment:
        """Return the active genes in order, with values from `partial` or else from `fill`; drop inactive genes."""
        assignment: Assignment = {}
        for gene in self.genes:
            if gene.is_active(assignment):
                value = partial.get(gene.name)
                assignment[gene.name] = value if value is not None else fill(gene)
        return assignment

    def completed(self, partial: Mapping[str, Value]) -> Assignment:
        """Return the active genes, with values from `partial` or else the middle of the domain."""
        return self.complete(partial, lambda gene: gene.domain.from_unit(0.5))

    @property
    def middle(self) -> Candidate:
        """The candidate with every gene at the middle of its domain."""
        return self.decode(self.completed({}))

    def sample(self, rng: Random) -> Assignment:
        """Draw the active genes independently and uniformly over their domains."""
        return self.complete({}, lambda gene: gene.domain.sample(rng))

    def contains(self, assignment: Mapping[str, Value]) -> bool:
        """Return whether exactly the active genes are set, each to a value of its domain."""
        active = {gene.name: gene for gene in self.genes if gene.is_active(assignment)}
        return active.keys() == assignment.keys() and all(
            gene.domain.contains(assignment[name]) for name, gene in active.items()
        )

    def decode(self, assignment: Mapping[str, Value]) -> Candidate:
        """Return the candidate of an assignment of the active genes."""
        placed: dict[str, list[AdapterSpec]] = {}
        on = [(place, place.spec(assignment)) for place in self.placements if place.is_on(assignment)]
        for site, spec in numbered(on):
            placed.setdefault(site, []).append(spec)
        training = {
            key: assignment[TRAINING + key] if isinstance(domain, Domain) else domain
            for key, domain in self.training.items()
        }
        return Candidate(architecture=Architecture.of(placed), training=training)

    def encode(self, assignment: Mapping[str, Value]) -> tuple[list[float], list[bool]]:
        """Return two lists over the genes: position in [0, 1] (0.5 if inactive), and whether it is active."""
        mask = [gene.name in assignment for gene in self.genes]
        unit = [
            gene.domain.to_unit(assignment[gene.name]) if active else 0.5
            for gene, active in zip(self.genes, mask, strict=True)
        ]
        return unit, mask

    def from_unit(self, unit: Sequence[float]) -> Assignment:
        """Return the assignment at a point of the unit cube; coordinates of inactive genes are ignored."""
        positions = {gene.name: u for gene, u in zip(self.genes, unit, strict=True)}
        return self.complete({}, lambda gene: gene.domain.from_unit(positions[gene.name]))

    def neighbours(self, assignment: Mapping[str, Value]) -> Iterator[Assignment]:
        """Yield the assignments that differ in one active gene; newly active genes take the middle of their domain."""
        for name, value in assignment.items():
            for other in self._by_name[name].domain.neighbours(value):
                yield self.completed({**assignment, name: other})

    def smallest(self) -> Assignment:
        """Return an assignment with the fewest trainable parameters, without adapters where the space allows that."""
        return self._extreme(-1)

    def largest(self) -> Assignment:
        """Return an assignment with the most trainable parameters."""
        return self._extreme(+1)

    def _extreme(self, sign: int) -> Assignment:
        def cost(assignment: Assignment) -> int:
            return sign * self.decode(assignment).architecture.num_params(self.backbone)

        def fill(gene: Gene) -> Value:
            return gene.domain.from_unit(1.0 if sign > 0 else 0.0)

        best = self.complete({}, fill)
        # Sizes and gates are at their extremes already. One greedy pass chooses the types, with disjoint sites, and
        # the unordered fields.
        for gene in self.genes:
            if isinstance(gene.domain, Choice) and not gene.domain.ordered and gene.domain != BOOLEAN:
                for value in gene.domain.choices:
                    trial = self.complete({**best, gene.name: value}, fill)
                    if cost(trial) > cost(best):
                        best = trial
        return best

    @property
    def cardinality(self) -> int | None:
        """Number of settings of the architecture's genes, without training fields; None if a gene is continuous.

        As in the literature, it is a product over all genes, active or not; an on/off gene and its size count as one
        choice. Only types that are chosen once for the model are summed, each with its own genes. The number of
        distinct networks is smaller: a layer that is off is the same for every type.
        """
        total, own = 1, dict.fromkeys(self.adapters, 1)
        types: list[Choice] = []
        sizes = {gate.size for gate in self.genes}
        for gene in self.genes:
            count = gene.domain.cardinality
            if gene.name.startswith(TRAINING):
                continue
            if count is None:
                return None
            if gene.size is not None:
                continue
            if gene.name in sizes:
                count += 1
            if gene.adapter is not None:
                own[gene.adapter] *= count
            elif isinstance(gene.domain, Choice) and any(gene.name == group.name for group in self.one_of):
                types.append(gene.domain)
            else:
                total *= count
        for domain in types:
            total *= sum(own.pop(str(name), 1) for name in domain.choices)  # "off" counts 1
        return total * prod(own.values())


def _all(gates: Sequence[Gate]) -> Condition:
    return frozenset((gate.gene, gate.value) for gate in gates)


def _absorb(conditions: set[Condition]) -> frozenset[Condition]:
    """Drop conditions that imply another, weaker one."""
    by_length: dict[int, set[Condition]] = {}
    for condition in conditions:
        by_length.setdefault(len(condition), set()).add(condition)
    return frozenset(
        condition
        for condition in conditions
        if not any(other < condition for n, shorter in by_length.items() if n < len(condition) for other in shorter)
    )
