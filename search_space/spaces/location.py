"""The inverse of `SearchSpace.decode`: from a candidate to an assignment of genes that decodes to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from autopeft.search_space.adapters import AdapterSpec, Mixture
from autopeft.search_space.adapters.mixture import DERIVED_FIELDS, ROUTER_FIELDS
from autopeft.search_space.architecture import Candidate
from autopeft.search_space.domains import Choice, Domain, Value
from autopeft.search_space.spaces.genes import TRAINING, Assignment, Gene
from autopeft.search_space.spaces.placement import Placement

if TYPE_CHECKING:
    from autopeft.search_space.spaces.space import SearchSpace

#: Partial assignments to try before a candidate counts as outside the space.
MAX_PARTIAL = 10_000


def locate(space: SearchSpace, candidate: Candidate) -> Assignment | None:
    """Return an assignment that decodes to the architecture and the searched training fields of the candidate.

    None if the space does not contain it. A searched training field that the candidate lacks takes the middle of its
    domain; fields with a fixed value in the space are not compared. A gate that no adapter needs is off.
    """
    training: Assignment = {}
    for key, domain in space.training.items():
        if isinstance(domain, Domain):
            value = candidate.training.get(key, domain.from_unit(0.5))
            if not domain.contains(value):
                return None
            training[TRAINING + key] = value
    target = dict(candidate.architecture.adapters)
    at_site: dict[str, list[Placement]] = {}
    gated: dict[str, list[Placement]] = {}
    for place in space.placements:
        at_site.setdefault(place.site.name, []).append(place)
        for gate in place.gates:
            gated.setdefault(gate.gene, []).append(place)
    if not target.keys() <= at_site.keys():
        return None

    def crowded(genes: Assignment, places: Iterable[Placement]) -> bool:
        """Return whether more adapters are on at a site of `places` than the candidate has there."""
        touched = {place.site.name for place in places}
        return any(sum(p.is_on(genes) for p in at_site[site]) > len(target.get(site, ())) for site in touched)

    if crowded(training, space.placements):  # some adapters are always on
        return None
    # Depth-first search with backtracking: several declared adapters may match at one site and only one at the next.
    # Sites with the fewest readings come first.
    steps = sorted(
        ((_readings(space, at_site[site], specs), at_site[site]) for site, specs in target.items()),
        key=lambda step: len(step[0]),
    )
    stack: list[tuple[int, Assignment, Assignment]] = [(0, training, {})]
    for _ in range(MAX_PARTIAL):
        if not stack:
            return None
        position, genes, free = stack.pop()
        if position < len(steps):
            readings, places = steps[position]
            for reading, suggested in readings:
                if all(genes.get(name, value) == value for name, value in reading.items()):
                    more = {**genes, **reading}
                    fresh = [place for name in more.keys() - genes.keys() for place in gated.get(name, ())]
                    if not crowded(more, [*places, *fresh]):
                        stack.append((position + 1, more, {**free, **suggested}))
            continue
        assignment = space.complete({**free, **genes}, partial(_idle, gated, genes))
        if space.decode(assignment).architecture == candidate.architecture:
            return assignment
    return None


def _readings(
    space: SearchSpace, places: Sequence[Placement], specs: Sequence[AdapterSpec]
) -> list[tuple[Assignment, Assignment]]:
    """Return the genes that put `specs` at one site, for each assignment of specs to placements; see `_genes_of`."""
    readings = []
    options = [
        [(place, found) for place in places if (found := _genes_of(space, place, spec)) is not None] for spec in specs
    ]
    for taken in product(*options):
        pairs = [pair for _, (bound, _) in taken for pair in bound.items()]
        reading = dict(pairs)
        # Members of one exclusive group contradict each other.
        if len({place.adapter for place, _ in taken}) == len(specs) and all(reading[name] == v for name, v in pairs):
            readings.append((reading, {gene: value for _, (_, free) in taken for gene, value in free.items()}))
    return readings


def _genes_of(space: SearchSpace, place: Placement, spec: AdapterSpec) -> tuple[Assignment, Assignment] | None:
    """Return the genes that `spec` needs at a placement: those with one possible value, and those with several.

    Gates are among the first; each of the second has one value that works. None if `spec` cannot be there.
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
            # A site that follows another reads the router fields of that site.
            followed = part is mixture and place.leader and field.name in ROUTER_FIELDS
            if (part is mixture and field.name in DERIVED_FIELDS) or followed:
                continue
            default: Value = getattr(type(part)(), field.name)
            fixed = place.fixed.get(field.name, default)
            values = _equivalent_values(part, field.name, declared.get(field.name, fixed))
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
    """Return a value of a gate that switches no placement on, or the middle of its domain."""
    places = gated.get(gene.name, ())
    for value in gene.domain.choices if isinstance(gene.domain, Choice) and places else ():
        if not any(place.is_on({**genes, gene.name: value}) for place in places):
            return value
    return gene.domain.from_unit(0.5)


def _equivalent_values(spec: AdapterSpec, key: str, domain: Domain | Value) -> list[Value]:
    """Return the values of a domain with which a field gives `spec` in canonical form.

    Example: with top_k 2 or 4, a mixture of two experts is the same. Of a range, only the value of `spec` and the
    bounds are tried.
    """
    own: Value = getattr(spec, key)
    if not isinstance(domain, Domain):
        values: list[Value] = [domain]
    elif isinstance(domain, Choice):
        values = list(domain.choices)
    else:
        values = [own] * domain.contains(own) + [domain.from_unit(0.0), domain.from_unit(1.0)]
    return [value for value in dict.fromkeys(values) if value == own or _is_equivalent(spec, {key: value})]


def _is_equivalent(spec: AdapterSpec, change: dict[str, Any]) -> bool:
    try:
        return replace(spec, **change).canonical() == spec
    except ValueError:  # such as 0 experts
        return False
