"""From a space of Python objects to the settings of a study file: the inverse of `declaration.py`.

An object without equivalent in a file is a problem, at the path that it would have there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_type_hints

from autopeft.search_space.adapters import ADAPTERS, Mixture
from autopeft.search_space.declaration import AdapterChoice, OneOf
from autopeft.search_space.domains import Choice, Float, Int
from autopeft.search_space.training import Training
from autopeft.studies.config.declaration import domain, scalar_type
from autopeft.studies.config.sections.base import Range
from autopeft.studies.config.sections.space import AdapterSettings, OneOfSettings, SpaceSettings
from autopeft.studies.config.source import PlacedProblem

DOMAINS = (Float, Int, Choice)
_OWN = ("kind", "at", "layers", "placement", "vary", "given", "router_per")


def space_section(space: Any, problems: list[PlacedProblem]) -> Any:
    """Return the section `space` for a preset's name, objects of `autopeft.search_space`, or a mapping with objects.

    Objects are one `AdapterChoice`, a list of `AdapterChoice` and `OneOf` (an adapter's name is its kind), or a mapping
    of names to `AdapterChoice`. Other values are returned unchanged, and the check of the file rejects them.
    """
    if isinstance(space, str):
        return {"preset": space}
    if isinstance(space, AdapterChoice):
        space = [space]
    if isinstance(space, Mapping):
        if space and not space.keys() & SpaceSettings.model_fields.keys():
            space = {"adapters": space}
        section = dict(space)
    elif isinstance(space, Sequence):
        section = {"adapters": [], "one_of": []}
        for position, entry in enumerate(space):
            if isinstance(entry, (AdapterChoice, OneOf)):
                section["one_of" if isinstance(entry, OneOf) else "adapters"].append(entry)
            else:
                problems.append((("space", position), f"must be an AdapterChoice or a OneOf, got {entry!r:.60}"))
    else:
        return space
    section["adapters"] = _named(section.get("adapters", {}), "adapters", problems)
    section["one_of"] = _named(section.get("one_of", {}), "one_of", problems)
    return {key: value for key, value in section.items() if value != {}}


def training_section(training: Any, problems: list[PlacedProblem]) -> Any:
    """Return the section `training` for a mapping whose values may be domains."""
    if not isinstance(training, Mapping):
        return training
    return _fields(training, _types(Training), ("training",), problems)


def _named(entries: Any, section: str, problems: list[PlacedProblem]) -> Any:
    """Return adapters or groups by name, as settings."""
    if isinstance(entries, Sequence) and not isinstance(entries, str):
        found: dict[str, Any] = {}
        for entry in entries:
            name = entry.name if isinstance(entry, OneOf) else getattr(entry, "kind", None)
            if not isinstance(name, str):
                problems.append(
                    (
                        ("space", section),
                        f"must be a mapping of names to settings or a list of objects, got {entry!r:.60}",
                    )
                )
            elif name in found:
                what = f"two entries have the name {name!r}: use a mapping with distinct names"
                problems.append((("space", section, name), what))
            else:
                found[name] = entry
        entries = found
    if not isinstance(entries, Mapping):
        return entries
    return {
        str(name): _entry(str(name), entry, ("space", section, str(name)), problems) for name, entry in entries.items()
    }


def _entry(name: str, entry: Any, path: tuple[str, ...], problems: list[PlacedProblem]) -> Any:
    if isinstance(entry, AdapterChoice):
        return _adapter(name, entry, path, problems)
    if isinstance(entry, OneOf):
        if entry.name != name:
            problems.append((path, f"the key must be the name of the group, {entry.name!r}"))
        return _changed(OneOfSettings, members=list(entry.members), per=entry.per, optional=entry.optional)
    if isinstance(entry, Mapping):
        kind = entry.get("kind", name)
        own = {key: value for key, value in entry.items() if key in _OWN}
        rest = {key: value for key, value in entry.items() if key not in _OWN}
        return {**own, **_fields(rest, _field_types(kind), path, problems)}
    return entry


def _adapter(name: str, choice: AdapterChoice, path: tuple[str, ...], problems: list[PlacedProblem]) -> dict[str, Any]:
    if choice.sites is not None:
        problems.append(((*path, "sites"), "cannot be set in a study: use `at` and `layers`"))
    problems += [
        ((*path, key), "is not a field of an adapter: pass it as an argument of AdapterChoice")
        for key in choice.fields.keys() & {*_OWN}
    ]
    own = _changed(
        AdapterSettings,
        at=list(choice.at),
        layers=None if choice.layers is None else list(choice.layers),
        placement=choice.placement,
        vary=dict(choice.vary),
        given=list(choice.given),
        router_per=choice.router_per,
    )
    fields = _fields(choice.fields, _field_types(choice.kind), path, problems)
    return ({} if choice.kind == name else {"kind": choice.kind}) | fields | own


def _changed(section: type, **values: Any) -> dict[str, Any]:
    """Return the values that differ from the section's defaults."""
    defaults = {name: field.default for name, field in section.model_fields.items()}  # type: ignore[attr-defined]
    return {
        key: value
        for key, value in values.items()
        if (tuple(value) if isinstance(value, list) else value) != defaults[key]
    }


def _types(*owners: type) -> dict[str, type | None]:
    return {name: scalar_type(hint) for owner in owners for name, hint in get_type_hints(owner).items()}


def _field_types(kind: Any) -> dict[str, type | None]:
    return _types(Mixture, ADAPTERS[kind]) if isinstance(kind, str) and kind in ADAPTERS else {}


def _fields(
    values: Mapping[Any, Any], types: Mapping[str, type | None], path: tuple[str, ...], problems: list[PlacedProblem]
) -> dict[str, Any]:
    found = {}
    for key, value in values.items():
        try:
            found[str(key)] = setting_of(value, types.get(str(key)))
        except ValueError as error:
            problems.append(((*path, str(key)), str(error)))
    return found


def setting_of(value: Any, expected: type | None = None) -> Any:
    """Return a domain as data that `domain` reads back as an equal domain; other values are returned unchanged.

    `expected`: the type of its field, as for `domain`. Raises ValueError if no data gives an equal domain.
    """
    if not isinstance(value, DOMAINS):
        return value
    data, setting = _data(value)
    try:
        read_back = domain(setting, expected)
    except ValueError:  # the wrong type for its field, which the check of the file reports
        return data
    if read_back == value:
        return data
    if isinstance(value, Choice):
        raise ValueError(
            f"a study orders lists of numbers but not lists of words: use Choice.of({_listed(value.choices)})"
        )
    raise ValueError(f"this field takes real numbers: use Float(low={value.low}, high={value.high})")


def _data(value: Float | Int | Choice) -> tuple[Any, Range | tuple[Any, ...]]:
    """Return the data, and its setting after a study file is read."""
    if isinstance(value, Choice):
        return list(value.choices), value.choices
    data: dict[str, Any] = {"low": value.low, "high": value.high}
    if value.log:
        data["log"] = True
    if isinstance(value, Int) and value.step != 1:
        data["step"] = value.step
    return data, Range(**data)


def _listed(values: Iterable[Any]) -> str:
    return repr(list(values))
