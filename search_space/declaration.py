"""Choices: what a user declares of a space (which adapters, exclusive or not), and all that can be wrong with it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_type_hints

from autopeft.search_space.adapters import ADAPTERS, AdapterSpec, Lora, Mixture
from autopeft.search_space.adapters.mixture import MIXTURE_FIELDS, ROUTER_FIELDS
from autopeft.search_space.backbones.backbone import Backbone, Site, first_to_run
from autopeft.search_space.domains import Choice, Domain, Float, Int, Value, without_zero
from autopeft.search_space.routers import ROUTERS, Router
from autopeft.search_space.spelling import did_you_mean
from autopeft.search_space.training import Training

Granularity = Literal["model", "stage", "layer", "site"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
Variation = Literal[Granularity, "expert"]
VARIATIONS: tuple[str, ...] = get_args(Variation)
Problem = tuple[tuple[str, ...], str]


class SpaceError(ValueError):
    """Everything wrong with a declaration: pairs of the path to the offending key and what is wrong there."""

    def __init__(self, problems: Sequence[tuple[tuple[str | int, ...], str]]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(f"{'.'.join(map(str, path))}: {what}" for path, what in problems))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterChoice:
    """One adapter type in the space.

    `at`: roles of the sites it may take (empty: the type's own). `layers`: those layers only (None: all). `placement`:
    the granularity of its on/off gene (None: always on). `fields`: a value or a domain per field; a size domain may
    contain 0, which is "off". With `experts` among them there is a mixture of so many (0: a plain adapter), and the
    other fields of `Mixture` may be there. `vary`: the granularity at which a field is chosen (default: once for the
    model); "expert": the rank of LoRAs, once for each expert of the model, whose first is also that of a plain one.
    `router_per`: whether each site has a router, or the first of a layer has one that the others follow. `given`:
    folders of LoRAs that are the experts, as they are; number, rank and scale are then fields of one value. `sites`:
    names of those that any of them is for, and of no others (None: no matter).
    """

    kind: str
    at: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    placement: Granularity | None = None
    fields: Mapping[str, Domain | Value] = field(default_factory=dict)
    vary: Mapping[str, Variation] = field(default_factory=dict)
    router_per: Literal["site", "layer"] = "site"
    given: tuple[str, ...] = ()
    sites: frozenset[str] | None = None


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


def sites_of(choice: AdapterChoice, backbone: Backbone) -> tuple[Site, ...]:
    """Return the sites that a choice may take, of its roles, layers and named sites, where its type fits."""
    roles = choice.at or ADAPTERS[choice.kind].default_roles
    smallest, _ = _extremes(choice)
    return tuple(
        site
        for site in backbone.sites
        if site.role in roles
        and smallest.fits(site)
        and (choice.layers is None or site.layer in choice.layers)
        and (choice.sites is None or site.name in choice.sites)
    )


def _extremes(choice: AdapterChoice) -> tuple[AdapterSpec, AdapterSpec]:
    """Return the type in the smallest and the largest of its sizes; its default where the declaration is wrong."""
    kind = ADAPTERS[choice.kind]
    name = kind.size_field
    if name is None or name not in choice.fields:
        return kind(), kind()
    domain = choice.fields[name]
    sizes: list[dict[str, Any]]
    try:
        domain = without_zero(domain if isinstance(domain, Domain) else Choice(choices=(domain,)))
        ends = (min(domain.choices), max(domain.choices)) if isinstance(domain, Choice) else (domain.low, domain.high)
        sizes = [{name: size} for size in ends]
        smallest, largest = (kind(**size) for size in sizes)
    except (TypeError, ValueError):
        return kind(), kind()
    return smallest, largest


def leaders_of(choice: AdapterChoice, sites: Sequence[Site]) -> dict[int | None, Site | None]:
    """Return the site that has the router of each layer whose sites share one; None where that is not known."""
    layers: dict[int | None, list[Site]] = {}
    for site in sites if choice.router_per == "layer" else ():
        if site.layer is not None:
            layers.setdefault(site.layer, []).append(site)
    return {layer: first_to_run(here) for layer, here in layers.items()}


def problems_of(
    backbone: Backbone,
    adapters: Mapping[str, AdapterChoice],
    one_of: Sequence[OneOf],
    stages: int,
    training: Mapping[str, Domain | Value],
) -> Iterator[Problem]:
    """Yield everything that is wrong with a declaration over `backbone`."""
    if not adapters:
        yield ("adapters",), "the space is empty: name at least one adapter"
    if not 1 <= stages <= backbone.num_layers:
        yield ("stages",), f"must be between 1 and the {backbone.num_layers} layers of the model"
    for name, choice in adapters.items():
        if not re.fullmatch(NAME, name):
            yield ("adapters", name), "a name is made of letters, digits, - and _"
        for path, what in _choice_problems(choice, backbone):
            yield ("adapters", name, *path), what
    for group in one_of:
        yield from _group_problems(group, one_of, adapters)
    known = [f.name for f in fields(Training)]
    for key, domain in training.items():
        if key not in known:
            yield ("training", key), f"unknown training field{did_you_mean(key, known)}"
            continue
        for what in _field_problems(Training, key, domain):
            yield ("training", key), what


def _group_problems(group: OneOf, groups: Sequence[OneOf], adapters: Mapping[str, AdapterChoice]) -> Iterator[Problem]:
    path = ("one_of", group.name)
    if not re.fullmatch(NAME, group.name):
        yield path, "a name is made of letters, digits, - and _"
    if [other.name for other in groups].count(group.name) > 1:
        yield path, "two groups have this name"
    if not group.members:
        yield path, "name at least one member"
    if group.per not in GRANULARITIES:
        yield (*path, "per"), f"unknown granularity {group.per!r}{did_you_mean(group.per, GRANULARITIES)}"
    if group.optional and OFF in group.members:
        yield path, f"{OFF!r} means none of the members here: take another name"
    for member in group.members:
        if member not in adapters:
            yield path, f"no adapter {member!r}{did_you_mean(member, adapters)}"
        elif adapters[member].router_per == "layer" and group.per == "site":
            yield (
                ("adapters", member, "router_per"),
                f"{group.name!r} decides per site: the sites have no router in common",
            )
        elif adapters[member].placement is not None:
            yield ("adapters", member, "placement"), f"{group.name!r} decides where it is on; leave this out"


def _choice_problems(choice: AdapterChoice, backbone: Backbone) -> Iterator[Problem]:
    if choice.kind not in ADAPTERS:
        yield ("kind",), f"unknown adapter {choice.kind!r}{did_you_mean(choice.kind, ADAPTERS)}"
        return
    spec = ADAPTERS[choice.kind]
    yield from _place_problems(choice, backbone)
    known = [*fields_of(choice.kind)]
    for key, domain in choice.fields.items():
        if key not in known:
            yield (key,), f"unknown field of {choice.kind}{did_you_mean(key, known)}"
            continue
        if key in MIXTURE_FIELDS and "experts" not in choice.fields:
            yield (key,), "this is for mixtures: say how many experts there are (experts: 4)"
            continue
        if key in MIXTURE_FIELDS and choice.fields["experts"] == 0:
            if key != "experts":
                yield (key,), "this is for mixtures, and there are no experts (experts: 0)"
            continue
        if key in (spec.size_field, "experts"):
            try:
                domain = without_zero(domain if isinstance(domain, Domain) else Choice(choices=(domain,)))
            except ValueError as error:
                yield (key,), str(error)
                continue
        for what in _field_problems(fields_of(choice.kind)[key], key, domain):
            yield (key,), what
    yield from _router_problems(choice, backbone)
    for key, per in choice.vary.items():
        if not isinstance(choice.fields.get(key), Domain):
            yield ("vary", key), "only a field with several values can vary"
        if per == "expert":
            for what in _per_expert_problems(choice, key):
                yield ("vary", key), what
        elif per not in GRANULARITIES:
            yield ("vary", key), f"unknown granularity {per!r}{did_you_mean(per, VARIATIONS)}"
    if choice.placement is not None and choice.placement not in GRANULARITIES:
        what = f"unknown granularity {choice.placement!r}{did_you_mean(choice.placement, GRANULARITIES)}"
        yield ("placement",), what


def _per_expert_problems(choice: AdapterChoice, key: str) -> Iterator[str]:
    """Yield what is wrong with a field that is chosen for each expert."""
    if choice.kind != Lora.kind or key != Lora.size_field:
        yield "experts can differ in the rank of a lora alone"
    elif not choice.fields.get("experts"):
        yield "this is for mixtures: say how many experts there are (experts: 4)"
    elif choice.given:
        yield "the LoRAs that are given have ranks of their own"
    elif mixing := [router.name for router in _routers(choice) if router.mixes_parameters]:
        yield f"{' and '.join(mixing)} mixes the matrices of LoRAs, which are of one rank then"
    elif isinstance(domain := choice.fields.get(key), Domain) and domain.contains(0):
        yield "an expert has a rank of at least 1: where there are none is said by experts or by placement"


def fields_of(kind: str) -> dict[str, type[AdapterSpec]]:
    """Return the fields that a type may declare, each with the class that checks its values: its own or `Mixture`."""
    spec = ADAPTERS[kind]
    own = dict.fromkeys((f.name for f in fields(spec)), spec)
    return {**own, **dict.fromkeys(MIXTURE_FIELDS, Mixture)} if spec.can_be_expert else own


def domain_problems(adapters: Mapping[str, AdapterChoice], domains: Sequence[str] | None) -> Iterator[Problem]:
    """Yield what routers that need domains miss in data with `domains`, with the path of the setting."""
    for name, choice in adapters.items():
        if not any(router.needs_domains for router in _routers(choice)):
            continue
        tasks = choice.fields.get("tasks", 1)
        if domains is None:
            yield ("data", "domain"), f"the router of {name!r} goes by the domain of a row: say which column it is in"
        elif isinstance(tasks, Domain) or tasks != len(domains):
            yield ("space", "adapters", name, "tasks"), f"the data has {len(domains)} domains: {', '.join(domains[:8])}"


def _routers(choice: AdapterChoice) -> list[Router]:
    """Return the routers that a choice may have, of those that there are; none without experts."""
    if "experts" not in choice.fields:
        return []
    router = choice.fields.get("router", Mixture().router)
    names = router.choices if isinstance(router, Choice) else () if isinstance(router, Domain) else (router,)
    return [ROUTERS[str(name)] for name in names if name in ROUTERS]


def _router_problems(choice: AdapterChoice, backbone: Backbone) -> Iterator[Problem]:
    """Yield what is wrong with a router for this model, or beside other fields."""
    if "experts" not in choice.fields:
        if choice.router_per != "site":
            yield ("router_per",), "this is for mixtures: say how many experts there are (experts: 4)"
        return
    routers = _routers(choice)
    heads = choice.fields.get("heads", 1)
    for count in heads.choices if isinstance(heads, Choice) else (heads,):
        site = next((s for s in sites_of(choice, backbone) if not _divides(count, s)), None)
        if site is not None:
            yield ("heads",), f"{count} blocks do not fit {site.name}, from {site.in_features} to {site.out_features}"
            break
    between = [router.name for router in routers if router.between_given]
    if between and not choice.given:
        yield ("router",), f"{' and '.join(between)}: only between LoRAs that are given (given: [folder, folder])"
    if any(router.follows for router in routers):
        yield ("router",), "sites that follow another have router_per: layer"
    ahead = [router.name for router in routers if router.reads_ahead]
    if backbone.causal and ahead:
        yield ("router",), f"{' and '.join(ahead)} would look ahead, which a causal model must not"
    shared = choice.fields.get("shared_experts", 0)
    apart = [router.name for router in routers if not router.has_gates]
    if apart and (isinstance(shared, Domain) or shared):
        names = " and ".join(f"router {router!r}" for router in apart)
        yield ("shared_experts",), f"{names} does not support shared_experts"
    own_parts = [router.name for router in routers if not router.can_lead]
    if own_parts and choice.router_per == "layer":
        yield ("router_per",), f"{' and '.join(own_parts)}: each site has a part of its own, no other can follow it"
    mixing = [router.name for router in routers if router.mixes_parameters]
    if mixing and choice.kind != "lora":
        yield ("router",), f"{' and '.join(mixing)} mixes the parameters of LoRAs, not of a {choice.kind}"
    own = ("experts", "shared_experts", "top_k", ADAPTERS[choice.kind].size_field)
    if choice.router_per == "layer" and "site" in (choice.placement, *(choice.vary.get(str(key)) for key in own)):
        yield ("router_per",), "the sites of a layer can share a router if they are on together, with as many experts"
    for layer, leader in leaders_of(choice, sites_of(choice, backbone)).items():
        if leader is None:
            what = f"whether the norms of layer {layer} run before its attention is not known: have `at` name no norms"
            yield ("router_per",), what
            break
    for key in ROUTER_FIELDS:
        if choice.router_per == "layer" and choice.vary.get(key) == "site":
            yield ("vary", key), "the sites of a layer share a router (router_per: layer): vary it by layer at most"
    if any(router.needs_domains for router in routers) and "tasks" not in choice.fields:
        yield ("router",), "a router by task needs to know how many there are (tasks: 4)"


def _divides(heads: object, site: Site) -> bool:
    return not isinstance(heads, int) or not (site.in_features % heads or site.out_features % heads)


def _place_problems(choice: AdapterChoice, backbone: Backbone) -> Iterator[Problem]:
    """Yield what is wrong with roles and layers, or that no site is left."""
    spec, present = ADAPTERS[choice.kind], backbone.roles
    fine = True
    for role in choice.at:
        if role not in spec.roles:
            fine = False
            yield ("at",), f"{choice.kind} cannot sit at {role!r}{did_you_mean(role, spec.roles)}"
        elif role not in present:
            fine = False
            yield ("at",), f"this model has no site {role!r}; it has {', '.join(sorted(present))}"
    for layer in choice.layers or ():
        if not 0 <= layer < backbone.num_layers:
            fine = False
            yield ("layers",), f"no layer {layer}: the model has layers 0 to {backbone.num_layers - 1}"
    sites = sites_of(choice, backbone) if fine else ()
    largest = _extremes(choice)[1]
    if largest.size is not None and spec.size_field is not None:
        for site in [site for site in sites if not largest.fits(site)][:1]:
            what = f"{largest.size} is too much at {site.name}, of {site.in_features} to {site.out_features} features"
            yield (spec.size_field,), what
    if not fine or sites:
        return
    roles = choice.at or spec.default_roles
    if choice.sites is not None and sites_of(replace(choice, sites=None), backbone):
        yield ("given",), f"there is no module that the LoRAs are for, of {', '.join(roles)} in these layers"
    elif not choice.at and not set(roles) & set(present):
        yield ("at",), f"none of {', '.join(roles)} is in this model; name sites of your own"
    elif choice.layers is not None and sites_of(replace(choice, layers=None), backbone):
        yield ("layers",), f"no site {' or '.join(roles)} is in these layers"
    else:
        yield ("at",), f"no site {' or '.join(roles)} of this model can take a {choice.kind}"


#: Per type of a field: its name, and what may stand there.
_TYPES: dict[type, tuple[str, tuple[type, ...]]] = {
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    str: ("a word", (str,)),
    bool: ("true or false", (bool,)),
}


def _field_problems(owner: type, key: str, domain: Domain | Value) -> Iterator[str]:
    """Yield the objections of `owner` to the values of `domain` (all of a choice, the ends of a range)."""
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
