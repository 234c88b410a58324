"""The declarative search space: which adapters, of what size, where, and how they are trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import prod
from random import Random
from typing import Literal, get_args, get_type_hints

from autopeft.search_space.adapters import ADAPTERS, AdapterSpec
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.backbone import Backbone, Site
from autopeft.search_space.domains import BOOLEAN, Choice, Domain, Float, Int, Value, without_zero
from autopeft.search_space.genes import TRAINING, Condition, Gate, Gene
from autopeft.search_space.suggestions import did_you_mean
from autopeft.search_space.training import Training

Granularity = Literal["model", "stage", "layer", "site"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
Assignment = dict[str, Value]


class SpaceError(ValueError):
    """Everything wrong with a declaration: pairs of the path to the offending key and what is wrong there."""

    def __init__(self, problems: Sequence[tuple[tuple[str, ...], str]]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(f"{'.'.join(path)}: {what}" for path, what in problems))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterChoice:
    """One adapter type in the space.

    `at`: roles of the sites it may take (empty: the type's own). `layers`: those layers only (None: all). `placement`:
    the granularity of its on/off gene (None: always on). `fields`: a value or a domain per field; a size domain may
    contain 0, which is "off". `vary`: the granularity at which a field is chosen (default: once for the model).
    """

    kind: str
    at: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    placement: Granularity | None = None
    fields: Mapping[str, Domain | Value] = field(default_factory=dict)
    vary: Mapping[str, Granularity] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class OneOf:
    """Exactly one of `members` (names of adapter choices) is present, or none if `optional`; chosen `per` scope."""

    name: str
    members: tuple[str, ...]
    per: Granularity = "model"
    optional: bool = False


OFF = "off"
#: Names of adapters and groups begin the names of genes, where a dot follows.
NAME = r"[A-Za-z0-9_-]+"
#: Groups of layers where a declaration does not say how many.
STAGES = 4


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
        problems = list(self._problems())
        if problems:
            raise SpaceError(problems)
        self._sites = {name: self._sites_of(choice) for name, choice in self.adapters.items()}
        self._gates = {
            (name, site.name): self._gates_of(name, site) for name, sites in self._sites.items() for site in sites
        }
        self.genes: tuple[Gene, ...] = tuple(self._compile())
        self._by_name = {gene.name: gene for gene in self.genes}

    # Declaration -> genes

    def _problems(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if not self.adapters:
            yield ("adapters",), "the space is empty: name at least one adapter"
        if not 1 <= self.stages <= self.backbone.num_layers:
            yield ("stages",), f"must be between 1 and the {self.backbone.num_layers} layers of the model"
        for name, choice in self.adapters.items():
            if not re.fullmatch(NAME, name):
                yield ("adapters", name), "a name is made of letters, digits, - and _"
            for path, what in self._choice_problems(choice):
                yield ("adapters", name, *path), what
        for group in self.one_of:
            for path, what in self._group_problems(group):
                yield path, what
        known = [f.name for f in fields(Training)]
        for key, domain in self.training.items():
            if key not in known:
                yield ("training", key), f"unknown training field{did_you_mean(key, known)}"
                continue
            for what in _field_problems(Training, key, domain):
                yield ("training", key), what

    def _group_problems(self, group: OneOf) -> Iterator[tuple[tuple[str, ...], str]]:
        path = ("one_of", group.name)
        if not re.fullmatch(NAME, group.name):
            yield path, "a name is made of letters, digits, - and _"
        if [other.name for other in self.one_of].count(group.name) > 1:
            yield path, "two groups have this name"
        if not group.members:
            yield path, "name at least one member"
        if group.per not in GRANULARITIES:
            yield (*path, "per"), f"unknown granularity {group.per!r}{did_you_mean(group.per, GRANULARITIES)}"
        if group.optional and OFF in group.members:
            yield path, f"{OFF!r} means none of the members here: take another name"
        for member in group.members:
            if member not in self.adapters:
                yield path, f"no adapter {member!r}{did_you_mean(member, self.adapters)}"
            elif self.adapters[member].placement is not None:
                yield ("adapters", member, "placement"), f"{group.name!r} decides where it is on; leave this out"

    def _choice_problems(self, choice: AdapterChoice) -> Iterator[tuple[tuple[str, ...], str]]:
        if choice.kind not in ADAPTERS:
            yield ("kind",), f"unknown adapter {choice.kind!r}{did_you_mean(choice.kind, ADAPTERS)}"
            return
        spec = ADAPTERS[choice.kind]
        yield from self._place_problems(choice)
        known = [f.name for f in fields(spec)]
        for key, domain in choice.fields.items():
            if key not in known:
                yield (key,), f"unknown field of {choice.kind}{did_you_mean(key, known)}"
                continue
            if key == spec.size_field:
                try:
                    domain = without_zero(domain if isinstance(domain, Domain) else Choice(choices=(domain,)))
                except ValueError as error:
                    yield (key,), str(error)
                    continue
            for what in _field_problems(spec, key, domain):
                yield (key,), what
        for key, per in choice.vary.items():
            if not isinstance(choice.fields.get(key), Domain):
                yield ("vary", key), "only a field with several values can vary"
            if per not in GRANULARITIES:
                yield ("vary", key), f"unknown granularity {per!r}{did_you_mean(per, GRANULARITIES)}"
        if choice.placement is not None and choice.placement not in GRANULARITIES:
            what = f"unknown granularity {choice.placement!r}{did_you_mean(choice.placement, GRANULARITIES)}"
            yield ("placement",), what

    def _place_problems(self, choice: AdapterChoice) -> Iterator[tuple[tuple[str, ...], str]]:
        """What is wrong with its roles and layers, or that no site is left."""
        spec, present = ADAPTERS[choice.kind], self.backbone.roles
        fine = True
        for role in choice.at:
            if role not in spec.roles:
                fine = False
                yield ("at",), f"{choice.kind} cannot sit at {role!r}{did_you_mean(role, spec.roles)}"
            elif role not in present:
                fine = False
                yield ("at",), f"this model has no site {role!r}; it has {', '.join(sorted(present))}"
        for layer in choice.layers or ():
            if not 0 <= layer < self.backbone.num_layers:
                fine = False
                yield ("layers",), f"no layer {layer}: the model has layers 0 to {self.backbone.num_layers - 1}"
        if not fine or self._sites_of(choice):
            return
        roles = choice.at or spec.default_roles
        if not choice.at and not set(roles) & set(present):
            yield ("at",), f"none of {', '.join(roles)} is in this model; name sites of your own"
        elif choice.layers is not None and self._sites_of(replace(choice, layers=None)):
            yield ("layers",), f"no site {' or '.join(roles)} is in these layers"
        else:
            yield ("at",), f"no site {' or '.join(roles)} of this model can take a {choice.kind}"

    def _sites_of(self, choice: AdapterChoice) -> tuple[Site, ...]:
        roles = choice.at or ADAPTERS[choice.kind].default_roles
        return tuple(
            site
            for site in self.backbone.sites
            if site.role in roles
            and ADAPTERS[choice.kind]().fits(site)
            and (choice.layers is None or site.layer in choice.layers)
        )

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

    def _compile(self) -> Iterator[Gene]:
        gates: dict[str, list[Gate]] = {}
        conditions: dict[str, set[Condition]] = {}
        order: dict[str, int] = {}
        for chain in self._gates.values():
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
        if key == ADAPTERS[self.adapters[name].kind].size_field:
            domain = without_zero(domain)
        for scope, sites in self._scopes(name, key).items():
            conditions = {_all(self._gates[name, site.name]) for site in sites}
            yield Gene(name=f"{name}.{key}{scope}", domain=domain, conditions=_absorb(conditions), adapter=name)

    # Assignments

    def complete(self, partial: Mapping[str, Value], fill: Callable[[Gene], Value]) -> Assignment:
        """The active genes, in order: values of `partial` where given, of `fill` elsewhere; inactive ones dropped."""
        assignment: Assignment = {}
        for gene in self.genes:
            if gene.is_active(assignment):
                given = partial.get(gene.name)
                assignment[gene.name] = given if given is not None else fill(gene)
        return assignment

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
        for name, choice in self.adapters.items():
            for site in self._sites[name]:
                if all(assignment.get(gate.gene) == gate.value for gate in self._gates[name, site.name]):
                    values = {
                        key: assignment[f"{name}.{key}{self._scope(choice.vary.get(key, 'model'), site)}"]
                        if isinstance(domain, Domain)
                        else domain
                        for key, domain in choice.fields.items()
                    }
                    placed.setdefault(site.name, []).append(ADAPTERS[choice.kind](**values))
        training = {
            key: assignment[TRAINING + key] if isinstance(domain, Domain) else domain
            for key, domain in self.training.items()
        }
        return Candidate(architecture=Architecture.of(placed), training=training)

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
                yield self.complete({**assignment, name: other}, lambda gene: gene.domain.from_unit(0.5))

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


def _all(gates: Sequence[Gate]) -> Condition:
    return frozenset((gate.gene, gate.value) for gate in gates)


def _absorb(conditions: set[Condition]) -> frozenset[Condition]:
    """Drop conditions that another, weaker one implies."""
    return frozenset(c for c in conditions if not any(other < c for other in conditions))


#: Per type of a field: its name, and what may stand there.
_TYPES: dict[type, tuple[str, tuple[type, ...]]] = {
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    str: ("a word", (str,)),
    bool: ("true or false", (bool,)),
}


def _field_problems(owner: type, key: str, domain: Domain | Value) -> Iterator[str]:
    """What `owner` says against the values of `domain` (all of a choice, the ends of a range)."""
    if isinstance(domain, Choice):
        values: Sequence[Value] = domain.choices
    elif isinstance(domain, (Float, Int)):
        values = (domain.low, domain.high)
    else:
        values = (domain,)
    expected, allowed = _TYPES.get(get_type_hints(owner)[key], ("", (int, float, str, bool)))
    if isinstance(domain, (Float, Int)) and type(domain.low) not in allowed:
        yield f"must be {expected}, not a range like this"
        return
    for value in values:
        if type(value) not in allowed:
            yield f"must be {expected}, got {value!r}"
            continue
        try:
            owner(**{key: value})
        except (ValueError, TypeError) as error:
            yield str(error)
