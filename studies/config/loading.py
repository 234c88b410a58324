"""Reading and checking of a study file as a whole.

Precedence: defaults < file < environment (`AUTOPEFT__SEARCH__TRIALS=5`) < `--set search.trials=5`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from autopeft.studies.config import checks
from autopeft.studies.config.sections.base import Range
from autopeft.studies.config.source import Keys, Source, StudyFileError, read
from autopeft.studies.config.study_file import FILE_NAME, StudyFile
from autopeft.studies.config.yaml_text import unfit


def load_study(
    path: str | Path, overrides: Iterable[str] = (), environment: Mapping[str, str] = os.environ
) -> StudyFile:
    """Read and check a study file, or the `study.yaml` of a folder. Raises StudyFileError with every problem."""
    path = Path(path)
    path = path / FILE_NAME if os.path.isdir(path) else path  # False for names that are too long
    overrides = tuple(overrides)
    study = _checked(read(path, overrides, environment), path)
    study._overrides = overrides
    return study


def study_from_mapping(data: Mapping[str, Any], folder: str | Path = ".") -> StudyFile:
    """Check settings in the form of data; relative paths count from `folder`. Raises StudyFileError."""
    # A round trip through JSON makes a copy, with lists for tuples.
    return _checked(Source("", json.loads(json.dumps(dict(data)))), Path(folder) / FILE_NAME)


def _checked(source: Source, path: Path) -> StudyFile:
    # A section whose entries are all commented out is null in YAML.
    data = {key: value for key, value in source.data.items() if value is not None}
    if out_of_reach := [source.render(keys, what) if keys else f"{source.name}:1 {what}" for keys, what in unfit(data)]:
        raise StudyFileError(source.problems + out_of_reach)
    study, found, removed = _salvaged(data)
    study._file = path  # some settings are paths relative to it
    for keys, what in checks.problems_of(study):
        # A problem next to a removed entry may be a consequence of the removal.
        if not any(keys[: len(gone)] == gone or gone[: len(keys)] == keys for gone in removed):
            found.append((keys, what))
    found.sort(key=lambda problem: source.line(problem[0]))
    problems = source.problems + [source.render(keys, what) for keys, what in found]
    if problems:
        raise StudyFileError(problems)
    study._source = source
    return study


def _salvaged(data: dict[str, Any]) -> tuple[StudyFile, list[tuple[Keys, str]], list[Keys]]:
    """Return the settings, the problems of their form, and the entries that were removed to make the rest readable.

    So the rest can be checked too, and the user sees all problems at once.
    """
    problems: list[tuple[Keys, str]] = []
    removed: list[Keys] = []
    while True:
        try:
            return StudyFile.model_validate_json(json.dumps(data)), problems, removed
        except ValidationError as error:
            found, reason = list(_found(error, data)), error
        if not removed:
            problems = [(path, what) for path, what, _ in found]
        before = json.dumps(data)
        for _, _, culprit in found:
            removed.append(culprit)
            _remove(data, culprit)
        data.setdefault("study", "unnamed")
        if json.dumps(data) == before:  # nothing left to remove: what is wrong has no entry of its own
            raise reason


# Errors of pydantic in terms of the study file

_WORDS = {
    "missing": "is missing",
    "model_type": "must be a mapping of keys to values",
    "dict_type": "must be a mapping of keys to values",
    "tuple_type": "must be a list",
    "string_pattern_mismatch": "must be made of letters, digits, - and _",
    "int_type": "must be a whole number",
    "bool_type": "must be true or false",
    "string_type": "must be a text",
}


def _found(error: ValidationError, data: Any) -> Iterator[tuple[Keys, str, Keys]]:
    """Yield path, problem, and the entry whose removal solves the problem."""
    seen = set()
    for entry in error.errors(include_url=False):
        location, kind, context = entry["loc"], entry["type"], entry.get("ctx", {})
        path = culprit = _path(location, data)
        what = _WORDS.get(kind) or entry["msg"].removeprefix("Value error, ").replace("Input should", "must")
        if kind == "missing":
            path = (*path, location[-1])
        elif kind == "extra_forbidden":
            what = checks.unknown_key(str(location[-1]), _section(location[:-1]).model_fields)
        elif kind == "too_short":
            given = len(_entry(data, path))  # pydantic counts only valid entries
            if given >= context["min_length"]:
                continue
            what = f"needs at least {context['min_length']} entries, has {given}"
        elif kind == "too_long":
            what = f"may have {context['max_length']} entries, has {len(_entry(data, path))}"
        # pydantic reports a problem of a union once per member.
        if path not in seen:
            seen.add(path)
            # A list is removed as a whole, because a list without one entry has another meaning.
            numbers = [i for i, key in enumerate(culprit) if isinstance(key, int)]
            yield path, what, culprit[: numbers[0]] if numbers else culprit


def _path(location: Keys, data: Any) -> Keys:
    """Return the keys in `location`, without the names of union members."""
    path: list[str | int] = []
    for key in location:
        here = key in data if isinstance(data, dict) else isinstance(data, list) and isinstance(key, int)
        if here:
            data = data[key]
            path.append(key)
    return tuple(path)


def _entry(data: Any, path: Keys) -> Any:
    for key in path:
        data = data[key]
    return data


def _section(location: Keys) -> type[BaseModel]:
    """Return the section at `location`; names and positions of entries belong to the section of the entries."""
    section: type[BaseModel] = StudyFile
    for key in location:
        if key == Range.__name__:
            section = Range
        elif key in section.model_fields:
            section = next(_sections(section.model_fields[str(key)].annotation), section)
    return section


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


def _remove(data: dict[Any, Any], path: Keys) -> None:
    *parents, last = path or ("study",)
    for key in parents:
        data = data.get(key, {})
    data.pop(last, None)
