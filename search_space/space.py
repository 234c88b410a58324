"""The declarative search space: which adapters, of what size, where, and how they are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import product
from math import prod
from random import Random
from typing import Any

from autopeft.search_space.adapters import ADAPTERS, AdapterSpec, Mixture
from autopeft.search_space.adapters.mixture import MIXTURE_FIELDS, ROUTER_FIELDS
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.backbone import Backbone, Site
from autopeft.search_space.choices import OFF, STAGES, AdapterChoice, OneOf, Problem, SpaceError, problems_of, sites_of
from autopeft.search_space.domains import BOOLEAN, Choice, Domain, Int, Value, without_zero
from autopeft.search_space.genes import TRAINING, Condition, Gate, Gene

Assignment = dict[str, Value]
#: So many partial readings of a candidate are looked at before it counts as outside the space.
MOST_READINGS = 10_000


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


class SearchSpace:
    """Genes compiled from a declaration over one backbone.

    `adapters`: choices by name. `one_of`: exclusive groups. `layer_gate`: one more bit per layer that all adapters
    share. `stages`: number of equal groups of layers for the granularity "stage" (default: 4, or the number of layers
    if that is less). `training`: value or domain per field of `Training`. Raises SpaceError with every problem found.
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
        self._gates = {
            (name, site.name): self._gates_of(name, site) for name, sites in self._sites.items() for site in sites
        }
        self._experts = {key: self._experts_gate(key[0], self.backbone.site(key[1])) for key in self._gates}
        self.genes: tuple[Gene, ...] = tuple(self._compile())
        #: Every adapter at every site that it may take.
        self.placements: tuple[Placement, ...] = tuple(self._place())
        self._by_name = {gene.name: gene for gene in self.genes}

    # Declaration -> genes

    def _scope(self, granularity: str, site: Site) -> str:
        """The suffix of the gene that decides for `site`; sites without a layer decide for themselves."""
        if granularity == "model":
            return ""
        if granularity == "site" or site.layer is None:
            return f".{site.name}"
        if granularity == "layer":
            return f".layers.{site.layer}"
        return f".stages.{site.layer * self.stages // self.backbone.num_layers}"

    def _group_of(self, name: str) -> OneOf | None:
        return next((group for group in self.one_of if name in group.members), None)

    def _size_gate(self, name: str) -> str | None:
        """The size field if its domain contains 0, so that "is it on" is a gene of its own."""
        choice = self.adapters[name]
        size = ADAPTERS[choice.kind].size_field
        domain = choice.fields.get(size) if size else None
        return size if isinstance(domain, (Int, Choice)) and domain.contains(0) else None

    def _gates_of(self, name: str, site: Site) -> tuple[Gate, ...]:
        """What decides whether the adapter is on at `site`, highest order first."""
        choice = self.adapters[name]
        gates: list[Gate] = []
        if self.layer_gate and site.layer is not None:
            gates.append(Gate(f"layers.{site.layer}.on", True))
        group = self._group_of(name)
        if group is not None:
            gates.append(Gate(f"{group.name}{self._scope(group.per, site)}", name))
        if choice.placement is not None:
            gates.append(Gate(f"{name}.on{self._scope(choice.placement, site)}", True, name))
        size = self._size_gate(name)
        if size is not None:
            scope = self._scope(choice.vary.get(size, "model"), site)
            gates.append(Gate(f"{name}.{size}.on{scope}", True, name, f"{name}.{size}{scope}"))
        return tuple(gates)

    def _experts_gate(self, name: str, site: Site) -> Gate | None:
        """What decides whether there are several experts, if their domain contains 0: a plain adapter."""
        choice = self.adapters[name]
        domain = choice.fields.get("experts")
        if not (isinstance(domain, (Int, Choice)) and domain.contains(0)):
            return None
        scope = self._scope(choice.vary.get("experts", "model"), site)
        return Gate(f"{name}.experts.on{scope}", True, name, f"{name}.experts{scope}")

    def _conditions_of(self, name: str, site: Site, key: str) -> Condition:
        """When a field matters."""
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
            for key, domain in choice.fields.items():
                if isinstance(domain, Domain):
                    yield from self._field_genes(name, key, domain)
        for key, domain in self.training.items():
            if isinstance(domain, Domain):
                yield Gene(name=TRAINING + key, domain=domain)

    def _types(self, gates: Sequence[Gate]) -> Choice:
        """The members of a group that have a site in the scope of these gates."""
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

    def _place(self) -> Iterator[Placement]:
        led: dict[tuple[str, int | None], str] = {}
        for name, choice in self.adapters.items():
            for site in self._sites[name]:
                genes = {
                    key: f"{name}.{key}{self._scope(choice.vary.get(key, 'model'), site)}"
                    for key, domain in choice.fields.items()
                    if isinstance(domain, Domain)
                }
                fixed = {key: value for key, value in choice.fields.items() if not isinstance(value, Domain)}
                gates, experts = self._gates[name, site.name], self._experts[name, site.name]
                first = led.setdefault((name, site.layer), site.name)
                shares = choice.router_per == "layer" and site.layer is not None and first != site.name
                leader = first if shares else ""
                yield Placement(name, choice.kind, site, gates, genes, fixed, experts, leader, choice.given)

    # Assignments

    def complete(self, partial: Mapping[str, Value], fill: Callable[[Gene], Value]) -> Assignment:
        """The active genes, in order: values of `partial` where given, of `fill` elsewhere; inactive ones dropped."""
        assignment: Assignment = {}
        for gene in self.genes:
            if gene.is_active(assignment):
                given = partial.get(gene.name)
                assignment[gene.name] = given if given is not None else fill(gene)
        return assignment

    def completed(self, partial: Mapping[str, Value]) -> Assignment:
        """The active genes: what `partial` leaves open at the middle of its domain."""
        return self.complete(partial, lambda gene: gene.domain.from_unit(0.5))

    def sample(self, rng: Random) -> Assignment:
        """Active genes drawn independently and uniformly over their domains."""
        return self.complete({}, lambda gene: gene.domain.sample(rng))

    def contains(self, assignment: Mapping[str, Value]) -> bool:
        """Whether exactly the active genes are set, each within its domain."""
        active = {gene.name: gene for gene in self.genes if gene.is_active(assignment)}
        return active.keys() == assignment.keys() and all(
            gene.domain.contains(assignment[name]) for name, gene in active.items()
        )

    def decode(self, assignment: Mapping[str, Value]) -> Candidate:
        """The candidate that an assignment of the active genes stands for."""
        placed: dict[str, list[AdapterSpec]] = {}
        for place in self.placements:
            if place.is_on(assignment):
                placed.setdefault(place.site.name, []).append(place.spec(assignment))
        training = {
            key: assignment[TRAINING + key] if isinstance(domain, Domain) else domain
            for key, domain in self.training.items()
        }
        return Candidate(architecture=Architecture.of(placed), training=training)

    def locate(self, candidate: Candidate) -> Assignment | None:
        """An assignment that decodes to the candidate's architecture, with its values of the searched training fields.

        None if there is none. Training fields that the candidate does not name take their middle; those that the space
        fixes do not count. A gate that nothing needs is off.
        """
        training: Assignment = {}
        for key, domain in self.training.items():
            if isinstance(domain, Domain):
                value = candidate.training.get(key, domain.from_unit(0.5))
                if not domain.contains(value):
                    return None
                training[TRAINING + key] = value
        wanted = dict(candidate.architecture.adapters)
        here: dict[str, list[Placement]] = {}
        gated: dict[str, list[Placement]] = {}
        for place in self.placements:
            here.setdefault(place.site.name, []).append(place)
            for gate in place.gates:
                gated.setdefault(gate.gene, []).append(place)
        if not wanted.keys() <= here.keys():
            return None

        def crowded(genes: Assignment, places: Iterable[Placement]) -> bool:
            """Whether more is on at the sites of `places` than is wanted there."""
            touched = {place.site.name for place in places}
            return any(sum(p.is_on(genes) for p in here[site]) > len(wanted.get(site, ())) for site in touched)

        if crowded(training, self.placements):  # by what is always on
            return None
        # Adapters of one kind may be taken for each other at one site and told apart at the next: the sites that leave
        # no choice come first, and where a later one contradicts, another way is tried.
        steps = sorted(
            ((self._readings(here[site], specs), here[site]) for site, specs in wanted.items()),
            key=lambda step: len(step[0]),
        )
        open_ends: list[tuple[int, Assignment, Assignment]] = [(0, training, {})]
        for _ in range(MOST_READINGS):
            if not open_ends:
                return None
            position, genes, free = open_ends.pop()
            if position < len(steps):
                readings, places = steps[position]
                for reading, open_to in readings:
                    if all(genes.get(name, value) == value for name, value in reading.items()):
                        more = {**genes, **reading}
                        fresh = [place for name in more.keys() - genes.keys() for place in gated.get(name, ())]
                        if not crowded(more, [*places, *fresh]):
                            open_ends.append((position + 1, more, {**free, **open_to}))
                continue
            assignment = self.complete({**free, **genes}, partial(_idle, gated, genes))
            if self.decode(assignment).architecture == candidate.architecture:
                return assignment
        return None

    def _readings(
        self, places: Sequence[Placement], specs: Sequence[AdapterSpec]
    ) -> list[tuple[Assignment, Assignment]]:
        """The genes that put `specs` at one site, for each way to share them among its places; see `_genes_of`."""
        readings = []
        ways = [
            [(place, found) for place in places if (found := self._genes_of(place, spec)) is not None] for spec in specs
        ]
        for taken in product(*ways):
            pairs = [pair for _, (bound, _) in taken for pair in bound.items()]
            reading = dict(pairs)
            # Two members of a group contradict each other.
            if len({place.adapter for place, _ in taken}) == len(specs) and all(
                reading[name] == v for name, v in pairs
            ):
                readings.append((reading, {gene: value for _, (_, free) in taken for gene, value in free.items()}))
        return readings

    def _genes_of(self, place: Placement, spec: AdapterSpec) -> tuple[Assignment, Assignment] | None:
        """The genes, gates included, that must have their values for `spec` to be at a place, and those that may have
        another one, with one that will do. None if it cannot be there.
        """
        mixture = isinstance(spec, Mixture)
        if isinstance(spec, Mixture) and (spec.given, spec.leader) != (place.given, place.leader):
            return None
        if place.kind != spec.plain.kind or (place.experts is None and mixture != place.is_mixture({})):
            return None
        bound: Assignment = {gate.gene: gate.value for gate in place.gates}
        free: Assignment = {}
        if place.experts is not None:
            bound[place.experts.gene] = mixture
        declared = self.adapters[place.adapter].fields
        for part in (spec.plain, spec) if isinstance(spec, Mixture) else (spec,):
            for field in fields(part):
                # What a router has, a site that follows another reads of that one.
                followed = isinstance(part, Mixture) and place.leader and field.name in ROUTER_FIELDS
                if field.name in ("expert", "given", "leader") or followed:
                    continue
                default: Value = getattr(type(part)(), field.name)
                values = _standing_for(part, field.name, declared.get(field.name, default))
                if not values:
                    return None
                if field.name in place.genes:
                    (bound if len(values) == 1 else free)[place.genes[field.name]] = values[-1]
        return bound, free

    def encode(self, assignment: Mapping[str, Value]) -> tuple[list[float], list[bool]]:
        """Position on the unit interval per gene and whether the gene is active; inactive genes stand at 0.5."""
        mask = [gene.name in assignment for gene in self.genes]
        unit = [
            gene.domain.to_unit(assignment[gene.name]) if active else 0.5
            for gene, active in zip(self.genes, mask, strict=True)
        ]
        return unit, mask

    def from_unit(self, unit: Sequence[float]) -> Assignment:
        """The assignment at a point of the unit cube; coordinates of inactive genes do not count."""
        positions = {gene.name: u for gene, u in zip(self.genes, unit, strict=True)}
        return self.complete({}, lambda gene: gene.domain.from_unit(positions[gene.name]))

    def neighbours(self, assignment: Mapping[str, Value]) -> Iterator[Assignment]:
        """Assignments that differ in one active gene; genes that this wakes up take the middle of their domain."""
        for name, value in assignment.items():
            for other in self._by_name[name].domain.neighbours(value):
                yield self.completed({**assignment, name: other})

    def smallest(self) -> Assignment:
        """An assignment with the fewest parameters; it has no adapters at all where the space allows that."""
        return self._extreme(-1)

    def largest(self) -> Assignment:
        """An assignment with the most parameters."""
        return self._extreme(+1)

    def _extreme(self, sign: int) -> Assignment:
        def cost(assignment: Assignment) -> int:
            return sign * self.decode(assignment).architecture.num_params(self.backbone)

        def fill(gene: Gene) -> Value:
            return gene.domain.from_unit(1.0 if sign > 0 else 0.0)

        best = self.complete({}, fill)
        # Sizes and gates are at their extremes already. One greedy pass settles the types, whose sites are apart, and
        # the fields without an order.
        for gene in self.genes:
            if isinstance(gene.domain, Choice) and not gene.domain.ordered and gene.domain != BOOLEAN:
                for value in gene.domain.choices:
                    trial = self.complete({**best, gene.name: value}, fill)
                    if cost(trial) > cost(best):
                        best = trial
        return best

    @property
    def cardinality(self) -> int | None:
        """Number of settings of the architecture's genes (training apart); None if one is continuous.

        As in the literature it is a product over the genes, whether or not they matter in a given setting; an on/off
        gene and its size count as one choice. Only types that are chosen once for the model are added up, each with
        its own genes. Distinct networks are fewer: a layer that is switched off can have any type.
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
            total *= sum(own.pop(str(name), 1) for name in domain.choices)  # "off" is one more
        return total * prod(own.values())


def domain_problems(space: SearchSpace, domains: Sequence[str] | None) -> Iterator[Problem]:
    """What routers by task miss in the data, with the path of the setting."""
    for name, choice in space.adapters.items():
        router, tasks = (choice.fields.get(key, getattr(Mixture(), key)) for key in ("router", "tasks"))
        routers = router.choices if isinstance(router, Choice) else (router,)
        if "experts" not in choice.fields or not set(routers) & {"task", "poly"}:
            continue
        if domains is None:
            yield ("data", "domain"), f"the router of {name!r} goes by the domain of a row: say which column it is in"
        elif isinstance(tasks, Domain) or tasks != len(domains):
            yield ("space", "adapters", name, "tasks"), f"the data has {len(domains)} domains: {', '.join(domains[:8])}"


def _idle(gated: Mapping[str, Sequence[Placement]], genes: Mapping[str, Value], gene: Gene) -> Value:
    """A value of a gate with which none of the places `gated` by it is on; the middle where there is none."""
    places = gated.get(gene.name, ())
    for value in gene.domain.choices if isinstance(gene.domain, Choice) and places else ():
        if not any(place.is_on({**genes, gene.name: value}) for place in places):
            return value
    return gene.domain.from_unit(0.5)


def _standing_for(spec: AdapterSpec, key: str, domain: Domain | Value) -> list[Value]:
    """The values of a field's domain that come to `spec`, of a range its own and the ends: a mixture of two experts,
    asked for four at once, has two of them.
    """
    own: Value = getattr(spec, key)
    if not isinstance(domain, Domain):
        values: list[Value] = [domain]
    elif isinstance(domain, Choice):
        values = list(domain.choices)
    else:
        values = [own] * domain.contains(own) + [domain.from_unit(0.0), domain.from_unit(1.0)]
    return [value for value in dict.fromkeys(values) if value == own or _comes_to(spec, {key: value})]


def _comes_to(spec: AdapterSpec, change: dict[str, Any]) -> bool:
    try:
        return isinstance(spec, Mixture) and replace(spec, **change).canonical() == spec
    except ValueError:  # such as no experts
        return False


def _all(gates: Sequence[Gate]) -> Condition:
    return frozenset((gate.gene, gate.value) for gate in gates)


def _absorb(conditions: set[Condition]) -> frozenset[Condition]:
    """Drop conditions that another, weaker one implies."""
    return frozenset(c for c in conditions if not any(other < c for other in conditions))
