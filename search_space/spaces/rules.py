"""What practitioners run by hand, and where a space cannot contain it."""

from __future__ import annotations

from collections.abc import Iterator

from autopeft.search_space.adapters import Lora
from autopeft.search_space.domains import Choice, Domain
from autopeft.search_space.spaces.presets import BASELINES
from autopeft.search_space.spaces.space import SearchSpace

#: The baselines that are copied most: LoRA at every linear layer, and at queries and values.
RULES = ("lora-all-linear", "lora-r8-qv")


def left_out(space: SearchSpace) -> dict[str, tuple[str, ...]]:
    """Return by rule the roles at which the space has no LoRA of the rule's rank; rules that fit are not in it.

    A search cannot find what its space leaves out, so a baseline that wins from outside of it teaches it nothing.
    """
    offered = dict(_offered(space))
    found = {}
    for rule in RULES:
        roles: dict[str, None] = {}
        for name, spec in BASELINES[rule](space.backbone):
            if isinstance(spec, Lora) and offered.get(name, 0.0) < spec.rank:
                roles[space.backbone.site(name).role] = None
        if roles:
            found[rule] = tuple(roles)
    return found


def _offered(space: SearchSpace) -> Iterator[tuple[str, float]]:
    """Yield sites and the largest rank of LoRA there, the smaller ones first."""
    domains = {gene.name: gene.domain for gene in space.genes}
    places = [place for place in space.placements if place.kind == Lora.kind]
    ranks = [
        (place.site.name, _largest(domains[place.genes["rank"]]) if "rank" in place.genes else place.fixed["rank"])
        for place in places
        if "rank" in place.genes or "rank" in place.fixed
    ]
    yield from sorted(((name, float(rank)) for name, rank in ranks), key=lambda pair: pair[1])


def _largest(domain: Domain) -> float:
    values = domain.choices if isinstance(domain, Choice) else (domain.high,)
    return max(float(value) for value in values)
