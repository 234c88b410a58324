"""From the settings of a study file to a search space over one backbone.

Problems are pairs of a path in the file and a message; `source.py` adds the lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from autopeft.search_space.adapters import ADAPTERS, Mixture
from autopeft.search_space.adapters.given import GivenError, read, sites_of
from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.declaration import AdapterChoice, OneOf, SpaceError
from autopeft.search_space.domains import Choice, Domain, Float, Int, Value
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.search_space.spelling import did_you_mean
from autopeft.search_space.training import Training
from autopeft.studies.config.sections.base import Range
from autopeft.studies.config.sections.space import AdapterSettings
from autopeft.studies.config.source import PlacedProblem

if TYPE_CHECKING:
    from autopeft.studies.config.study_file import StudyFile

PRESET = ("space", "preset")
#: The number of stages if neither the file nor its preset sets it.
STAGES = 4


@dataclass(slots=True)
class Declaration:
    """The readable arguments of `SearchSpace`, and the problems of the other settings."""

    arguments: dict[str, Any]
    problems: list[PlacedProblem] = field(default_factory=list)

    def space(self, backbone: Backbone) -> SearchSpace:
        """Build the space. Raises SpaceError with all problems."""
        problems = list(self.problems)
        try:
            space = SearchSpace(backbone=backbone, **self.arguments)
        except SpaceError as error:
            broken_preset = PRESET in dict(problems)
            for path, what in error.problems:
                # The contents of a broken preset are unknown, so only problems inside single adapters are real.
                if not broken_preset or (path[0] == "adapters" and len(path) > 1):
                    problems.append((path if path[0] == "training" else ("space", *path), what))
        if problems:
            raise SpaceError(problems)
        return space


def declare(study: StudyFile, backbone: Backbone) -> Declaration:
    """Read the space of a study file over `backbone`; settings of the file replace those of its preset."""
    settings = study.space
    declared = Declaration({})
    preset = _preset(study, backbone, declared.problems)
    groups = {group.name: group for group in preset.get("one_of", ())}
    for name, group in settings.one_of.items():
        groups[name] = OneOf(name=name, members=group.members, per=group.per, optional=group.optional)
    own = {
        name: _given(
            study.folder, backbone, name, adapter, _adapter(name, adapter, declared.problems), declared.problems
        )
        for name, adapter in settings.adapters.items()
    }
    gate = settings.layer_gate
    declared.arguments = {
        "adapters": {**preset.get("adapters", {}), **own},
        "one_of": tuple(groups.values()),
        "layer_gate": preset.get("layer_gate", False) if gate is None else gate,
        "stages": settings.stages or preset.get("stages") or min(STAGES, backbone.num_layers),
        "training": dict(_settings([Training], dict(study.training), ("training",), declared.problems)),
    }
    return declared


def _preset(study: StudyFile, backbone: Backbone, problems: list[PlacedProblem]) -> Mapping[str, Any]:
    from autopeft.search_space.spaces.presets import PRESETS

    name = study.space.preset
    if name is None:
        return {}
    if name not in PRESETS:
        problems.append((PRESET, f"unknown preset {name!r}{did_you_mean(name, PRESETS)}"))
        return {}
    try:
        return PRESETS[name].space(backbone)
    except ValueError as error:
        problems.append((PRESET, str(error)))
        return {}


def _adapter(name: str, settings: AdapterSettings, problems: list[PlacedProblem]) -> AdapterChoice:
    path = ("space", "adapters", name)
    kind = settings.kind or name
    owners: list[type] = [ADAPTERS[kind], Mixture] if kind in ADAPTERS else []
    fields = dict(_settings(owners, settings.fields, path, problems))
    broken = settings.fields.keys() - fields.keys()
    return AdapterChoice(
        kind=kind,
        at=settings.at,
        layers=settings.layers,
        placement=settings.placement,
        fields=fields,
        vary={key: per for key, per in settings.vary.items() if key not in broken},
        router_per=settings.router_per,
    )


#: The id of a substitute backbone for checks without the model.
ANY_MODEL = "any"
#: Fields that follow from pretrained LoRAs.
OF_GIVEN = ("experts", "shared_experts", "rank", "alpha", "scaling", "init")


def _given(
    folder: Path,
    backbone: Backbone,
    name: str,
    settings: AdapterSettings,
    choice: AdapterChoice,
    problems: list[PlacedProblem],
) -> AdapterChoice:
    """Return the choice with the pretrained LoRAs of the file as its experts, at the sites of these LoRAs."""
    path = ("space", "adapters", name)
    basis = choice.kind in ADAPTERS and ADAPTERS[choice.kind].takes_given
    if not settings.given:
        if basis:
            problems.append((path, f"{choice.kind} is made of pretrained LoRAs: set given: [folder, folder]"))
        return choice
    if choice.kind != "lora" and not basis:
        problems.append(((*path, "given"), f"only kind lora can have pretrained experts, not {choice.kind}"))
        return choice
    fixed = () if basis else OF_GIVEN
    problems += [
        ((*path, key), "cannot be set: the LoRAs in `given` determine it") for key in fixed if key in choice.fields
    ]
    given = tuple(str((folder / Path(one).expanduser()).resolve()) for one in settings.given)
    try:
        rank = max(read(one).rank for one in given)
        sites = sites_of(given, backbone)
        for site in sites if backbone.id != ANY_MODEL else ():
            for one in given:
                read(one).check(site)
    except GivenError as error:
        problems.append(((*path, "given"), str(error)))
        if basis:
            return choice
        # A mixture nevertheless, so that its other settings are no problems too.
        return replace(choice, fields={**choice.fields, "experts": len(given)})
    at = choice.at or tuple(dict.fromkeys(site.role for site in sites))
    # At other sites, a router would be trained over experts without effect, or a basis would be random.
    names = None if backbone.id == ANY_MODEL else frozenset(site.name for site in sites)
    if basis:
        return replace(choice, at=at, sites=names, given=given)
    own = {key: value for key, value in choice.fields.items() if key not in OF_GIVEN}
    # Their scale is part of their values, so alpha over the rank is 1.
    fields = {**own, "experts": len(given), "rank": rank, "alpha": float(rank)}
    return replace(choice, at=at, sites=names, fields=fields, given=given)


def _settings(
    owners: Sequence[type], settings: Mapping[str, Any], path: tuple[str, ...], problems: list[PlacedProblem]
) -> Iterator[tuple[str, Domain | Value]]:
    """Yield pairs of field and domain or value for valid settings; add problems for the others."""
    hints = {name: hint for owner in reversed(owners) for name, hint in get_type_hints(owner).items()}
    for key, setting in settings.items():
        try:
            yield key, domain(setting, scalar_type(hints.get(key)))
        except ValueError as error:
            problems.append(((*path, key), str(error)))


def scalar_type(hint: Any) -> type | None:
    """Return bool, int, float or str if a field has this type (or it and None); None for other types."""
    types = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return next((t for t in types if t in (bool, int, float, str)), None)


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


def domain(setting: Any, expected: type | None) -> Domain | Value:
    """Return a setting as a domain or value of the space. Raises ValueError.

    `expected`: the type of its field, None if unknown. A range has whole numbers if its field has or, for an unknown
    type, if both ends are whole. Numbers are converted to the field's type, because 16 and 16.0 would give two keys to
    one network.
    """
    if isinstance(setting, Range):
        whole = isinstance(setting.low, int) and isinstance(setting.high, int)
        if expected in (bool, str) or (expected is int and not whole):
            raise ValueError(f"must be {_WORDS[expected]}, got a range from {setting.low} to {setting.high}")
        if whole and expected is not float:
            return Int(low=int(setting.low), high=int(setting.high), step=setting.step or 1, log=setting.log)
        if setting.step is not None:
            raise ValueError("step needs whole numbers: list the values instead")
        return Float(low=float(setting.low), high=float(setting.high), log=setting.log)
    if isinstance(setting, tuple):
        return Choice.of([_value(value, expected) for value in setting])
    return _value(setting, expected)


def _value(value: Value, expected: type | None) -> Value:
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if expected is not None and type(value) is not expected:
        raise ValueError(f"must be {_WORDS[expected]}, got {value!r}")
    return value
