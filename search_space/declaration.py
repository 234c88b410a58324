"""The declaration of a search space (adapter choices and exclusive groups) and its validation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal, get_args, get_type_hints

from autopeft.search_space.adapters import ADAPTERS, AdapterSpec, Lora, Mixture
from autopeft.search_space.adapters.lora import experts_problem, from_site
from autopeft.search_space.adapters.mixture import MIXTURE_FIELDS, ROUTER_FIELDS
from autopeft.search_space.backbones.backbone import Backbone, Site, first_to_run
from autopeft.search_space.domains import Choice, Domain, Float, Int, Value, listed, without_zero
from autopeft.search_space.routers import ROUTERS, Router
from autopeft.search_space.spelling import did_you_mean
from autopeft.search_space.training import Training

Granularity = Literal["model", "stage", "layer", "site"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
Variation = Literal[Granularity, "expert"]
VARIATIONS: tuple[str, ...] = get_args(Variation)
#: The path to a key of the declaration, and what is wrong there.
DeclarationProblem = tuple[tuple[str, ...], str]


class SpaceError(ValueError):
    """An invalid declaration. `problems`: each path to an offending key, with what is wrong there."""

    def __init__(self, problems: Sequence[tuple[tuple[str | int, ...], str]]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(f"{'.'.join(map(str, path))}: {message}" for path, message in problems))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterChoice:
    """One adapter type in the space.

    `at`: roles of the sites where it may sit (empty: the type's default roles). `layers`: indices of the layers where
    it may sit (None: all). `placement`: granularity of its on/off gene (None: always on). `fields`: a value or a domain
    per field; a size domain may contain 0, which means "off". With the field `experts` the adapter is a mixture of that
    many experts (0: a plain adapter), and the other fields of `Mixture` are allowed. `vary`: granularity at which a
    field is chosen (default: once for the model); "expert", for the rank of LoRAs only, chooses it once per expert
    index, and a plain adapter takes the first. `router_per`: "site" gives each site a router; "layer" gives one to the
    first site of each layer, and the others follow it. `given`: folders of pretrained LoRAs that are the experts,
    unchanged; number, rank and scale are then fields with a single value. A type that is made of LoRAs takes these.
    `sites`: names of the only sites allowed, those that at least one of these LoRAs adapts (None: no restriction).
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
    """An exclusive group: exactly one of `members` (names of adapter choices) is present, or none if `optional`.

    `per`: granularity at which the member is chosen.
    """

    name: str
    members: tuple[str, ...]
    per: Granularity = "model"
    optional: bool = False


OFF = "off"
#: Names of adapters and groups are prefixes of gene names and end at the first dot there.
NAME = r"[A-Za-z0-9_-]+"
#: Default number of stages (groups of layers).
STAGES = 4


def sites_of(choice: AdapterChoice, backbone: Backbone) -> tuple[Site, ...]:
    """Return the sites that fit the type of a choice, among its roles, layers and named sites."""
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
    """Return the adapter at its smallest and its largest size; twice the default if the declaration is invalid."""
    kind = ADAPTERS[choice.kind]
    name = kind.size_field
    if name is None:
        return kind(), kind()
    limits = kind.strictest({key: listed(setting) for key, setting in choice.fields.items()})
    domain = choice.fields.get(name, getattr(kind(), name))
    try:
        domain = without_zero(domain if isinstance(domain, Domain) else Choice(choices=(domain,)))
        ends = (min(domain.choices), max(domain.choices)) if isinstance(domain, Choice) else (domain.low, domain.high)
        smallest, largest = (kind(**{name: size, **limits}) for size in ends)
    except (TypeError, ValueError):
        return kind(), kind()
    return smallest, largest


def leaders_of(choice: AdapterChoice, sites: Sequence[Site]) -> dict[int | None, Site | None]:
    """Return for each layer whose sites share a router the site that owns it; None where that is unknown."""
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
) -> Iterator[DeclarationProblem]:
    """Yield everything wrong with a declaration over `backbone`."""
    if not adapters:
        yield ("adapters",), "the space is empty: name at least one adapter"
    if not 1 <= stages <= backbone.num_layers:
        yield ("stages",), f"must be between 1 and {backbone.num_layers}, the number of layers, got {stages}"
    for name, choice in adapters.items():
        if not re.fullmatch(NAME, name):
            yield ("adapters", name), "a name may contain only letters, digits, - and _"
        for path, message in _choice_problems(choice, backbone):
            yield ("adapters", name, *path), message
    for group in one_of:
        yield from _group_problems(group, one_of, adapters)
    known = [f.name for f in fields(Training)]
    for key, domain in training.items():
        if key not in known:
            yield ("training", key), f"unknown training field{did_you_mean(key, known)}"
            continue
        for message in _field_problems(Training, key, domain):
            yield ("training", key), message


def _group_problems(
    group: OneOf, groups: Sequence[OneOf], adapters: Mapping[str, AdapterChoice]
) -> Iterator[DeclarationProblem]:
    path = ("one_of", group.name)
    if not re.fullmatch(NAME, group.name):
        yield path, "a name may contain only letters, digits, - and _"
    if [other.name for other in groups].count(group.name) > 1:
        yield path, "two groups have this name: rename one"
    if not group.members:
        yield path, "a group needs at least one member"
    if group.per not in GRANULARITIES:
        yield (*path, "per"), f"unknown granularity {group.per!r}{did_you_mean(group.per, GRANULARITIES)}"
    if group.optional and OFF in group.members:
        yield path, f"in an optional group, {OFF!r} means that no member is on: rename the adapter {OFF!r}"
    for member in group.members:
        if member not in adapters:
            yield path, f"unknown adapter name {member!r}{did_you_mean(member, adapters)}"
        elif adapters[member].router_per == "layer" and group.per == "site":
            yield (
                ("adapters", member, "router_per"),
                f"must be site: group {group.name!r} chooses per site, so the sites of a layer cannot share a router",
            )
        elif adapters[member].placement is not None:
            yield (
                ("adapters", member, "placement"),
                f"cannot be set: group {group.name!r} already decides where the adapter is on",
            )


def _choice_problems(choice: AdapterChoice, backbone: Backbone) -> Iterator[DeclarationProblem]:
    if choice.kind not in ADAPTERS:
        yield ("kind",), f"unknown adapter {choice.kind!r}{did_you_mean(choice.kind, ADAPTERS)}"
        return
    spec = ADAPTERS[choice.kind]
    yield from _place_problems(choice, backbone)
    known = [*fields_of(choice.kind)]
    for key, domain in choice.fields.items():
        if key not in known:
            others = [f.name for f in fields(AdapterChoice) if f.name not in ("fields", "sites")]
            yield (key,), f"unknown field of {choice.kind}{did_you_mean(key, [*known, *others])}"
            continue
        if key in MIXTURE_FIELDS and "experts" not in choice.fields:
            yield (key,), "only mixtures of experts have this setting: set the number of experts, such as experts: 4"
            continue
        if key in MIXTURE_FIELDS and choice.fields["experts"] == 0:
            if key != "experts":
                yield (key,), "only mixtures of experts have this setting, and experts: 0 is a plain adapter"
            continue
        if key in (spec.size_field, "experts"):
            try:
                domain = without_zero(domain if isinstance(domain, Domain) else Choice(choices=(domain,)))
            except ValueError as error:
                yield (key,), str(error)
                continue
        for message in _field_problems(fields_of(choice.kind)[key], key, domain):
            yield (key,), message
    yield from _router_problems(choice, backbone)
    for key, per in choice.vary.items():
        if not isinstance(choice.fields.get(key), Domain):
            yield ("vary", key), "only a field with a list or a range of values can vary"
        if per == "expert":
            for message in _per_expert_problems(choice, key):
                yield ("vary", key), message
        elif per not in GRANULARITIES:
            yield ("vary", key), f"unknown granularity {per!r}{did_you_mean(per, VARIATIONS)}"
    if choice.placement is not None and choice.placement not in GRANULARITIES:
        message = f"unknown granularity {choice.placement!r}{did_you_mean(choice.placement, GRANULARITIES)}"
        yield ("placement",), message


def _per_expert_problems(choice: AdapterChoice, key: str) -> Iterator[str]:
    """Yield what is wrong with a field that varies by expert."""
    if choice.kind != Lora.kind or key != Lora.size_field:
        yield "only the rank of a lora can vary per expert"
    elif not choice.fields.get("experts"):
        yield "only mixtures of experts have this setting: set the number of experts, such as experts: 4"
    elif choice.given:
        yield "pretrained LoRAs (given) have fixed ranks"
    elif mixing := [router for router in _routers(choice) if router.mixes_parameters]:
        yield f"{_named(mixing)} mixes the matrices of LoRAs and needs experts of equal rank"
    elif isinstance(domain := choice.fields.get(key), Domain) and domain.contains(0):
        yield "the rank of an expert must be at least 1: to switch experts off, add 0 to experts or set placement"


def fields_of(kind: str) -> dict[str, type[AdapterSpec]]:
    """Return the fields that an adapter type can have, each with the class that validates it: its own or `Mixture`."""
    spec = ADAPTERS[kind]
    own = dict.fromkeys((f.name for f in fields(spec) if f.name != "given"), spec)  # a key of its own
    return {**own, **dict.fromkeys(MIXTURE_FIELDS, Mixture)} if spec.can_be_expert else own


def domain_problems(
    adapters: Mapping[str, AdapterChoice], domains: Sequence[str] | None
) -> Iterator[DeclarationProblem]:
    """Yield what routers by task lack in data with these `domains` (None: no domain column), by path of the setting."""
    for name, choice in adapters.items():
        if not any(router.needs_domains for router in _routers(choice)):
            continue
        tasks = choice.fields.get("tasks", 1)
        if domains is None:
            yield (
                ("data", "domain"),
                f"is missing: the router of {name!r} needs the column with the domain of each row",
            )
        elif isinstance(tasks, Domain) or tasks != len(domains):
            shown = ", ".join(domains[:8])
            yield ("space", "adapters", name, "tasks"), f"must be {len(domains)}, the number of domains: {shown}"


def _routers(choice: AdapterChoice) -> list[Router]:
    """Return the routers that a choice may have; none without experts."""
    if "experts" not in choice.fields:
        return []
    router = choice.fields.get("router", Mixture().router)
    names = router.choices if isinstance(router, Choice) else () if isinstance(router, Domain) else (router,)
    return [ROUTERS[str(name)] for name in names if name in ROUTERS]


def _router_problems(choice: AdapterChoice, backbone: Backbone) -> Iterator[DeclarationProblem]:
    """Yield what is wrong with a router for this model or in combination with other fields."""
    if "experts" not in choice.fields:
        if choice.router_per != "site":
            yield (
                ("router_per",),
                "only mixtures of experts have this setting: set the number of experts, such as experts: 4",
            )
        return
    if choice.fields["experts"] != 0 and (init := from_site(listed(choice.fields.get("init")))):
        yield ("init",), experts_problem(init)
    routers = _routers(choice)
    heads = choice.fields.get("heads", 1)
    for count in heads.choices if isinstance(heads, Choice) else (heads,):
        site = next((s for s in sites_of(choice, backbone) if not _divides(count, s)), None)
        if site is not None:
            features = f"{site.in_features} input and {site.out_features} output features"
            yield ("heads",), f"{count} does not divide the features of {site.name}: {features}"
            break
    between = [router for router in routers if router.between_given]
    if between and not choice.given:
        yield ("router",), f"{_named(between)} needs pretrained LoRAs as experts (given: [folder, folder])"
    following = [router for router in routers if router.follows]
    if following:
        yield (
            ("router",),
            f"{_named(following)} cannot be chosen directly: set router_per: layer, which lets sites share a router",
        )
    ahead = [router for router in routers if router.reads_ahead]
    if backbone.causal and ahead:
        yield ("router",), f"{_named(ahead)} reads later tokens, so it cannot be used in a causal model"
    shared = choice.fields.get("shared_experts", 0)
    apart = [router for router in routers if not router.has_gates]
    if apart and (isinstance(shared, Domain) or shared):
        yield ("shared_experts",), f"{_named(apart)} does not support shared_experts"
    own_parts = [router for router in routers if not router.can_lead]
    if own_parts and choice.router_per == "layer":
        yield ("router_per",), f"must be site: {_named(own_parts)} has separate parameters for each site"
    mixing = [router for router in routers if router.mixes_parameters]
    if mixing and choice.kind != "lora":
        yield ("router",), f"{_named(mixing)} mixes the matrices of LoRAs and does not support {choice.kind}"
    own = ("experts", "shared_experts", "top_k", ADAPTERS[choice.kind].size_field)
    if choice.router_per == "layer" and "site" in (choice.placement, *(choice.vary.get(str(key)) for key in own)):
        message = (
            "sites that share a router must be on together, with equal experts, top_k and size: choose none per site"
        )
        yield ("router_per",), message
    for layer, leader in leaders_of(choice, sites_of(choice, backbone)).items():
        if leader is None:
            message = (
                f"cannot tell whether the norms of layer {layer} run before its attention: leave norms out of `at`"
            )
            yield ("router_per",), message
            break
    for key in ROUTER_FIELDS:
        if choice.router_per == "layer" and choice.vary.get(key) == "site":
            yield ("vary", key), "the sites of a layer share a router (router_per: layer), so this cannot vary per site"
    if any(router.needs_domains for router in routers) and "tasks" not in choice.fields:
        yield ("router",), "a router by task needs the number of tasks: set tasks, such as tasks: 4"


def _named(routers: Sequence[Router]) -> str:
    return " and ".join(f"router {router.name!r}" for router in routers)


def _divides(heads: object, site: Site) -> bool:
    return not isinstance(heads, int) or not (site.in_features % heads or site.out_features % heads)


def _place_problems(choice: AdapterChoice, backbone: Backbone) -> Iterator[DeclarationProblem]:
    """Yield what is wrong with the roles and layers of a choice, or that no site is left."""
    spec, present = ADAPTERS[choice.kind], backbone.roles
    fine = True
    for role in choice.at:
        if role not in spec.roles:
            fine = False
            yield ("at",), f"{choice.kind} cannot be attached at {role!r}{did_you_mean(role, spec.roles)}"
        elif role not in present:
            fine = False
            yield ("at",), backbone.absence([role])
    for layer in choice.layers or ():
        if not 0 <= layer < backbone.num_layers:
            fine = False
            yield ("layers",), f"no layer {layer}: the model has layers 0 to {backbone.num_layers - 1}"
    sites = sites_of(choice, backbone) if fine else ()
    largest = _extremes(choice)[1]
    if largest.size is not None and spec.size_field is not None:
        for site in [site for site in sites if not largest.fits(site)][:1]:
            features = f"{site.in_features} input and {site.out_features} output features"
            yield (spec.size_field,), f"{largest.size} is too large for {site.name}: {features}"
    if not fine or sites:
        return
    roles = choice.at or spec.default_roles
    if choice.sites is not None and sites_of(replace(choice, sites=None), backbone):
        yield ("given",), f"the pretrained LoRAs adapt no site with role {' or '.join(roles)} in these layers"
    elif not choice.at and not set(roles) & set(present):
        yield ("at",), backbone.absence(roles)
    elif choice.layers is not None and sites_of(replace(choice, layers=None), backbone):
        yield ("layers",), f"these layers have no site with role {' or '.join(roles)}"
    else:
        why = _extremes(choice)[0].misfit(backbone)
        yield ("at",), f"{choice.kind} fits no site with role {' or '.join(roles)} of this model: {why}"


#: For each type of a field: its name in messages, and the types of its values.
_TYPES: dict[type, tuple[str, tuple[type, ...]]] = {
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    str: ("a word", (str,)),
    bool: ("true or false", (bool,)),
}


def _field_problems(owner: type, key: str, domain: Domain | Value) -> Iterator[str]:
    """Yield the errors that `owner` raises for the values of `domain` (all of a choice, the ends of a range)."""
    if isinstance(domain, Choice):
        values: Sequence[Value] = domain.choices
    elif isinstance(domain, (Float, Int)):
        values = (domain.low, domain.high)
    else:
        values = (domain,)
    expected, allowed = _TYPES.get(get_type_hints(owner)[key], ("", (int, float, str, bool)))
    if isinstance(domain, (Float, Int)) and type(domain.low) not in allowed:
        yield f"must be {expected}, got a range from {domain.low} to {domain.high}"
        return
    for value in values:
        if type(value) not in allowed:
            yield f"must be {expected}, got {value!r}"
            continue
        try:
            owner(**{key: value})
        except (ValueError, TypeError) as error:
            yield str(error)
