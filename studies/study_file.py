"""The study file: every setting of a study, read and checked as a whole.

Precedence: defaults < file < environment (`AUTOPEFT__SEARCH__TRIALS=5`) < `--set search.trials=5`.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, PrivateAttr, ValidationError

from autopeft.search_space.architecture import digest
from autopeft.search_space.backbone import Backbone
from autopeft.search_space.choices import SpaceError
from autopeft.search_space.limits import Limits
from autopeft.search_space.problem import METRICS, Objective, Problem
from autopeft.search_space.space import SearchSpace
from autopeft.search_space.suggestions import did_you_mean
from autopeft.studies import checks, settings
from autopeft.studies.declaration import declare
from autopeft.studies.source import Keys, Source, StudyFileError, read
from autopeft.studies.starting import start_points

if TYPE_CHECKING:
    from autopeft.evaluators.tasks.data import DataSettings

__all__ = ["StudyFile", "StudyFileError", "differences", "fingerprint", "load_study", "study_from_mapping"]

FILE_NAME = "study.yaml"


class StudyFile(settings.Section):
    """The settings of one study."""

    study: settings.Name = Field(description="name of the study: letters, digits, - and _")
    seed: int = Field(default=0, ge=0, lt=2**31, description="the same seed gives the same study")
    task: Literal["classification", "causal-lm"] = Field(default="classification", description="what is learnt")
    model: settings.ModelSettings = settings.ModelSettings()
    data: settings.DataSettings = settings.DataSettings()
    space: settings.SpaceSettings = settings.SpaceSettings()
    training: settings.TrainingSettings = settings.TrainingSettings()
    objectives: Annotated[tuple[settings.ObjectiveSettings, ...], Field(min_length=2, max_length=4)] = Field(
        default=(settings.ObjectiveSettings(name="accuracy"), settings.ObjectiveSettings(name="num_params")),
        description="two to four metrics that span the front",
    )
    constraints: settings.ConstraintSettings = settings.ConstraintSettings()
    search: settings.SearchSettings = settings.SearchSettings()
    proxy: settings.ProxySettings = settings.ProxySettings()
    baselines: settings.BaselineSettings = settings.BaselineSettings()
    finalists: settings.FinalistSettings = settings.FinalistSettings()
    evaluation: settings.EvaluationSettings = settings.EvaluationSettings()
    tracking: settings.TrackingSettings = settings.TrackingSettings()
    output: str | None = Field(
        default=None, description="folder of all results; default: runs/<study> beside this file"
    )
    storage: str | None = Field(
        default=None, description="Optuna storage URL; default: a database in the output folder"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where to train; auto: a GPU if there is one"
    )

    _source: Source = PrivateAttr(default_factory=lambda: Source("", {}))
    _file: Path = PrivateAttr(default_factory=lambda: Path.cwd() / FILE_NAME)
    _overrides: tuple[str, ...] = PrivateAttr(default=())

    @property
    def path(self) -> Path:
        """The file, as the user named it."""
        return self._file

    @property
    def words(self) -> str:
        """What names this study on a command line: the file, and what was set there in place of what it says."""
        return shlex.join([str(self.path), *(word for each in self._overrides for word in ("--set", each))])

    @property
    def folder(self) -> Path:
        """The folder of the file, absolute: relative paths count from here."""
        return self._file.resolve().parent

    @property
    def output_folder(self) -> Path:
        return Path(os.path.normpath(self.folder / Path(self.output or f"runs/{self.study}").expanduser()))

    @property
    def tracking_uri(self) -> str:
        return self.tracking.uri or f"sqlite:///{self.output_folder / 'mlflow.db'}"

    @property
    def model_id(self) -> str:
        """`model.id`, with a folder beside the file made absolute."""
        beside = self.folder / Path(self.model.id).expanduser()
        return str(beside) if beside.is_dir() or self.model.id.startswith((".", "~")) else self.model.id

    def data_settings(self) -> DataSettings:
        """What `load_splits` wants; a hub's splits have their usual names unless the file says otherwise."""
        from autopeft.evaluators.tasks.data import DataSettings

        set_here = {key: value for key, value in dict(self.data).items() if value is not None}
        return DataSettings(**set_here, folder=self.folder)

    def space_for(self, backbone: Backbone) -> SearchSpace:
        """The space over `backbone`. Raises StudyFileError, as for the file itself."""
        with self._rendered():
            return declare(self, backbone).space(backbone)

    @contextmanager
    def _rendered(self) -> Iterator[None]:
        """A SpaceError becomes a StudyFileError, its problems in the order of the file."""
        try:
            yield
        except SpaceError as error:
            problems = sorted(error.problems, key=lambda problem: self._source.line(problem[0]))
            raise StudyFileError(self.render(path, what) for path, what in problems) from None

    def objectives_list(self) -> tuple[Objective, ...]:
        return tuple(
            Objective.of(
                o.name,
                bound=o.bound,
                reference=o.reference,
                maximise=METRICS[o.name].maximise if o.direction is None else o.direction == "maximise",
            )
            for o in self.objectives
        )

    def problem(self, backbone: Backbone) -> Problem:
        """What a searcher works on, but for the trials of an earlier study. Raises StudyFileError."""
        space = self.space_for(backbone)
        limits = Limits.of(self.constraints.model_dump(exclude_none=True), backbone)
        with self._rendered():
            start = start_points(self, space, limits)
        return Problem(
            space=space,
            objectives=self.objectives_list(),
            num_trials=self.search.trials,
            limits=limits,
            initial=self.search.initial,
            surrogate=self.search.surrogate,
            start=start,
        )

    def render(self, path: Keys, what: str) -> str:
        """The problem `what` with the setting at `path`, as `file:line key: what`."""
        return self._source.render(path, what)


def load_study(
    path: str | Path, overrides: Iterable[str] = (), environment: Mapping[str, str] = os.environ
) -> StudyFile:
    """Read and check a study file, or the `study.yaml` of a folder. Raises StudyFileError: every problem."""
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    overrides = tuple(overrides)
    study = _checked(read(path, overrides, environment), path)
    study._overrides = overrides
    return study


def study_from_mapping(data: Mapping[str, Any], folder: str | Path = ".") -> StudyFile:
    """The same for settings that are data already; relative paths count from `folder`."""
    # By way of JSON: a copy of our own, with lists for tuples.
    return _checked(Source("", json.loads(json.dumps(dict(data)))), Path(folder) / FILE_NAME)


def _checked(source: Source, path: Path) -> StudyFile:
    # A section whose entries are all commented out is null in YAML.
    data = {key: value for key, value in source.data.items() if value is not None}
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise StudyFileError([f"{source.name}: a text has half of a surrogate pair (\\ud800 to \\udfff)"]) from None
    study, found, removed = _salvaged(data)
    study._file = path  # some settings name files beside it
    for keys, what in checks.problems_of(study):
        # Next to an entry that was removed, it may come of the removal.
        if not any(keys[: len(gone)] == gone or gone[: len(keys)] == keys for gone in removed):
            found.append((keys, what))
    found.sort(key=lambda problem: source.line(problem[0]))
    problems = source.problems + [source.render(keys, what) for keys, what in found]
    if problems:
        raise StudyFileError(problems)
    study._source = source
    return study


def _salvaged(data: dict[str, Any]) -> tuple[StudyFile, list[tuple[Keys, str]], list[Keys]]:
    """The settings, the problems with their form, and the entries taken out until the rest could be read.

    So the rest can be checked as well: all problems are to come at once.
    """
    problems: list[tuple[Keys, str]] = []
    removed: list[Keys] = []
    while True:
        try:
            return StudyFile.model_validate_json(json.dumps(data)), problems, removed
        except ValidationError as error:
            found = list(_found(error, data))
        if not removed:
            problems = [(path, what) for path, what, _ in found]
        for _, _, culprit in found:
            removed.append(culprit)
            _remove(data, culprit)
        data.setdefault("study", "unnamed")


# What pydantic finds, in the words of the file

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
    """Path, problem, and the entry without which the problem would be gone."""
    seen = set()
    for entry in error.errors(include_url=False):
        location, kind, context = entry["loc"], entry["type"], entry.get("ctx", {})
        path = culprit = _path(location, data)
        what = _WORDS.get(kind) or entry["msg"].removeprefix("Value error, ").replace("Input should", "must")
        if kind == "missing":
            path = (*path, location[-1])
        elif kind == "extra_forbidden":
            what = f"unknown key{did_you_mean(str(location[-1]), _section(location[:-1]).model_fields)}"
        elif kind == "too_short":
            given = len(_entry(data, path))  # pydantic counts the valid ones only
            if given >= context["min_length"]:
                continue
            what = f"needs at least {context['min_length']} entries, has {given}"
        elif kind == "too_long":
            what = f"may have {context['max_length']} entries, has {context['actual_length']}"
        # A union reports a problem once for each of its members.
        if path not in seen:
            seen.add(path)
            # Without one entry a list would be another list: it goes as a whole.
            numbers = [i for i, key in enumerate(culprit) if isinstance(key, int)]
            yield path, what, culprit[: numbers[0]] if numbers else culprit


def _path(location: Keys, data: Any) -> Keys:
    """The keys among `location`, which holds the members of unions too."""
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
    """The section at `location`; names and positions of entries stay in the section of the entries."""
    section: type[BaseModel] = StudyFile
    for key in location:
        if key == settings.Range.__name__:
            section = settings.Range
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


# What must stay the same while a study goes on

_LASTING = ("seed", "task", "model", "data", "space", "training", "objectives", "constraints")


def fingerprint(study: StudyFile) -> dict[str, Any]:
    """What trials must share to be compared: it may not change between `run` and `run --resume`."""
    from autopeft.searchers import SEARCHERS, FromScores

    dump = study.model_dump(mode="json")
    search = {key: dump["search"][key] for key in ("searcher", "share", "rungs", "keep", "batch")}
    # These came later: where they are not set, a study of before goes on.
    search |= {key: dump["search"][key] for key in ("initial", "surrogate", "start", "prior") if dump["search"][key]}
    scores = study.proxy.model_dump(mode="json", exclude_defaults=True)
    starts_from_scores = issubclass(SEARCHERS[study.search.searcher], FromScores)
    found = {key: dump[key] for key in _LASTING} | {"search": search}
    return found | {"proxy": scores} if scores and starts_from_scores else found


def key_of(study: StudyFile, *fields: str) -> str:
    """Of what these fields say other than by default: results with one key were found under the same settings."""
    return digest(study.model_dump(mode="json", include=set(fields), exclude_defaults=True))


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """What two fingerprints do not share, one readable line for each setting."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for name in dict.fromkeys((*old, *new)):
            path = f"{key}.{name}" if key else name
            if name not in new:
                lines.append(f"{path}: {_text(old[name])} was removed")
            elif name not in old:
                lines.append(f"{path}: {_text(new[name])} was added")
            else:
                lines += differences(old[name], new[name], path)
        return lines
    return [] if old == new else [f"{key}: was {_text(old)}, is {_text(new)}"]


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
