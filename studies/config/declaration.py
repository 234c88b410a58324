"""From the settings of a study file to a search space over one backbone.

Problems are pairs of the path in the file and what is wrong there; `study_file.py` adds the lines.
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
from autopeft.studies.config.settings import AdapterSettings, Range

if TYPE_CHECKING:
    from autopeft.studies.config.study_file import StudyFile

#: The path of the offending key in the file, and what is wrong there.
Finding = tuple[tuple[str | int, ...], str]
PRESET = ("space", "preset")
#: Groups of layers where neither the file nor its preset says how many.
STAGES = 4


@dataclass(slots=True)
class Declaration:
    """Arguments of `SearchSpace` as far as they could be read, and the problems found on the way."""

    arguments: dict[str, Any]
    problems: list[Finding] = field(default_factory=list)

    def space(self, backbone: Backbone) -> SearchSpace:
        """Raises SpaceError with all problems."""
        problems = list(self.problems)
        try:
            space = SearchSpace(backbone=backbone, **self.arguments)
        except SpaceError as error:
            broken_preset = PRESET in dict(problems)
            for path, what in error.problems:
                # Nobody knows what a broken preset would have brought: only its adapters' own problems count.
                if not broken_preset or (path[0] == "adapters" and len(path) > 1):
                    problems.append((path if path[0] == "training" else ("space", *path), what))
        if problems:
            raise SpaceError(problems)
        return space


def declare(study: StudyFile, backbone: Backbone) -> Declaration:
    """The space that the file describes over `backbone`; what the file says replaces what its preset says."""
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


def _preset(study: StudyFile, backbone: Backbone, problems: list[Finding]) -> Mapping[str, Any]:
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


def _adapter(name: str, settings: AdapterSettings, problems: list[Finding]) -> AdapterChoice:
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


#: A backbone that stands for all of them, while the model is not loaded.
ANY_MODEL = "any"
#: What follows from LoRAs that are given.
OF_GIVEN = ("experts", "shared_experts", "rank", "alpha", "scaling", "init")


def _given(
    folder: Path,
    backbone: Backbone,
    name: str,
    settings: AdapterSettings,
    choice: AdapterChoice,
    problems: list[Finding],
) -> AdapterChoice:
    """A choice with the LoRAs that the file names as its experts, at the sites that they have."""
    path = ("space", "adapters", name)
    if not settings.given:
        return choice
    if choice.kind != "lora":
        problems.append(((*path, "given"), f"only LoRAs can be given, not a {choice.kind}"))
        return choice
    problems += [
        ((*path, key), "this follows from the LoRAs that are given") for key in OF_GIVEN if key in choice.fields
    ]
    given = tuple(str((folder / Path(one).expanduser()).resolve()) for one in settings.given)
    try:
        rank = max(read(one).rank for one in given)
        sites = sites_of(given, backbone)
    except GivenError as error:
        problems.append(((*path, "given"), str(error)))
        return choice
    at = choice.at or tuple(dict.fromkeys(site.role for site in sites))
    # Elsewhere a router would be trained between experts that do nothing.
    names = None if backbone.id == ANY_MODEL else frozenset(site.name for site in sites)
    own = {key: value for key, value in choice.fields.items() if key not in OF_GIVEN}
    # Their scale is in their values: alpha over the rank is 1.
    fields = {**own, "experts": len(given), "rank": rank, "alpha": float(rank)}
    return replace(choice, at=at, sites=names, fields=fields, given=given)


def _settings(
    owners: Sequence[type], settings: Mapping[str, Any], path: tuple[str, ...], problems: list[Finding]
) -> Iterator[tuple[str, Domain | Value]]:
    """Pairs of field and domain or value, without those that are wrong."""
    hints = {name: hint for owner in reversed(owners) for name, hint in get_type_hints(owner).items()}
    for key, setting in settings.items():
        try:
            yield key, domain(setting, scalar_type(hints.get(key)))
        except ValueError as error:
            problems.append(((*path, key), str(error)))


def scalar_type(hint: Any) -> type | None:
    """bool, int, float or str where a field is one of them (or None); else None: nothing is known."""
    types = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return next((t for t in types if t in (bool, int, float, str)), None)


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


def domain(setting: Any, expected: type | None) -> Domain | Value:
    """A setting as the space wants it. Raises ValueError.

    A range is one of whole numbers if its field is whole or, where that is not known, if both its ends are.
    Numbers take the field's type: 16 and 16.0 would be two keys of one network.
    """
    if isinstance(setting, Range):
        whole = isinstance(setting.low, int) and isinstance(setting.high, int)
        if expected in (bool, str) or (expected is int and not whole):
            raise ValueError(f"must be {_WORDS[expected]}, not {'this' if whole else 'a'} range")
        if whole and expected is not float:
            return Int(low=int(setting.low), high=int(setting.high), step=setting.step or 1, log=setting.log)
        if setting.step is not None:
            raise ValueError("step is for whole numbers; list the values instead")
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
