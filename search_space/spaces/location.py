"""From a candidate back to genes: which assignment of a space decodes to it, if there is one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from autopeft.search_space.adapters import AdapterSpec, Mixture
from autopeft.search_space.adapters.mixture import ROUTER_FIELDS
from autopeft.search_space.architecture import Candidate
from autopeft.search_space.domains import Choice, Domain, Value
from autopeft.search_space.spaces.genes import TRAINING, Assignment, Gene
from autopeft.search_space.spaces.placement import Placement

if TYPE_CHECKING:
    from autopeft.search_space.spaces.space import SearchSpace

#: So many partial readings of a candidate are looked at before it counts as outside the space.
MOST_READINGS = 10_000


def locate(space: SearchSpace, candidate: Candidate) -> Assignment | None:
    """Return an assignment that decodes to the candidate's architecture, with its searched training fields.

    None if there is none. Training fields that the candidate does not name take their middle; those that the space
    fixes do not count. A gate that nothing needs is off.
    """
    training: Assignment = {}
    for key, domain in space.training.items():
        if isinstance(domain, Domain):
            value = candidate.training.get(key, domain.from_unit(0.5))
            if not domain.contains(value):
                return None
            training[TRAINING + key] = value
    wanted = dict(candidate.architecture.adapters)
    here: dict[str, list[Placement]] = {}
    gated: dict[str, list[Placement]] = {}
    for place in space.placements:
        here.setdefault(place.site.name, []).append(place)
        for gate in place.gates:
            gated.setdefault(gate.gene, []).append(place)
    if not wanted.keys() <= here.keys():
        return None

    def crowded(genes: Assignment, places: Iterable[Placement]) -> bool:
        """Whether more is on at the sites of `places` than is wanted there."""
        touched = {place.site.name for place in places}
        return any(sum(p.is_on(genes) for p in here[site]) > len(wanted.get(site, ())) for site in touched)

    if crowded(training, space.placements):  # by what is always on
        return None
    # Adapters of one kind may be taken for each other at one site and told apart at the next: the sites that leave
    # no choice come first, and where a later one contradicts, another way is tried.
    steps = sorted(
        ((_readings(space, here[site], specs), here[site]) for site, specs in wanted.items()),
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
        assignment = space.complete({**free, **genes}, partial(_idle, gated, genes))
        if space.decode(assignment).architecture == candidate.architecture:
            return assignment
    return None


def _readings(
    space: SearchSpace, places: Sequence[Placement], specs: Sequence[AdapterSpec]
) -> list[tuple[Assignment, Assignment]]:
    """Return the genes that put `specs` at one site, for each way to share them among its places; see `_genes_of`."""
    readings = []
    ways = [
        [(place, found) for place in places if (found := _genes_of(space, place, spec)) is not None] for spec in specs
    ]
    for taken in product(*ways):
        pairs = [pair for _, (bound, _) in taken for pair in bound.items()]
        reading = dict(pairs)
        # Two members of a group contradict each other.
        if len({place.adapter for place, _ in taken}) == len(specs) and all(reading[name] == v for name, v in pairs):
            readings.append((reading, {gene: value for _, (_, free) in taken for gene, value in free.items()}))
    return readings


def _genes_of(space: SearchSpace, place: Placement, spec: AdapterSpec) -> tuple[Assignment, Assignment] | None:
    """Return the genes that put `spec` at a place, or None if it cannot be there.

    First those, gates included, that must have their values, then those that may have another one.
    """
    mixture = spec if isinstance(spec, Mixture) else None
    if mixture and (mixture.given, mixture.leader_site) != (place.given, place.leader_of(mixture)):
        return None
    if place.kind != spec.plain.kind or (place.experts is None and bool(mixture) != place.is_mixture({})):
        return None
    bound: Assignment = {gate.gene: gate.value for gate in place.gates}
    free: Assignment = {}
    if place.experts is not None:
        bound[place.experts.gene] = bool(mixture)
    own_ranks = mixture.ranks if mixture else ()
    if own_ranks and not place.ranks:
        return None
    declared = space.adapters[place.adapter].fields
    for part in (spec.plain, mixture) if mixture else (spec,):
        for field in fields(part):
            # What a router has, a site that follows another reads of that one.
            followed = part is mixture and place.leader and field.name in ROUTER_FIELDS
            if field.name in ("expert", "given", "leader", "ranks") or followed:
                continue
            default: Value = getattr(type(part)(), field.name)
            values = _standing_for(part, field.name, declared.get(field.name, default))
            if not values:
                return None
            if field.name in place.genes:
                (bound if len(values) == 1 else free)[place.genes[field.name]] = values[-1]
    if place.ranks:
        genes = place.rank_genes(*(mixture.shared_experts, mixture.experts) if mixture else (0, 0))
        ranks: Sequence[Any] = own_ranks or [spec.size] * len(genes)
        domain = declared["rank"]
        if not (isinstance(domain, Domain) and all(domain.contains(rank) for rank in ranks)):
            return None
        bound.update(zip(genes, ranks, strict=True))
    return bound, free


def _idle(gated: Mapping[str, Sequence[Placement]], genes: Mapping[str, Value], gene: Gene) -> Value:
    """Return a value of a gate with which none of the places `gated` by it is on; the middle where there is none."""
    places = gated.get(gene.name, ())
    for value in gene.domain.choices if isinstance(gene.domain, Choice) and places else ():
        if not any(place.is_on({**genes, gene.name: value}) for place in places):
            return value
    return gene.domain.from_unit(0.5)


def _standing_for(spec: AdapterSpec, key: str, domain: Domain | Value) -> list[Value]:
    """Return the values of a field's domain that make `spec`, of a range its own and the ends.

    A mixture of two experts with a `top_k` of 4 is one with a `top_k` of 2.
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
        return replace(spec, **change).canonical() == spec
    except ValueError:  # such as no experts
        return False
