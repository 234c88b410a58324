"""From the arguments of `Study` to the settings of a study file, and errors in terms of the arguments.

Relative paths count from the working directory, as everywhere in Python; in the settings they are absolute.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autopeft.search_space.metrics import QUALITIES, MetricError, Quality, UserDefined, place_of
from autopeft.search_space.problem import METRICS
from autopeft.studies.config.source import PlacedProblem, StudyFileError
from autopeft.studies.config.written import space_section, training_section
from autopeft.studies.notebook.tables import SPLITS, Tables, is_table, tables_of
from autopeft.studies.urls import located

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
#: The table of the retained rows.
RETAINED = "retained"
#: Settings and command-line options in messages, and the arguments that replace them; None: see `in_argument_terms`.
_ARGUMENTS = (
    (re.compile(r"^study(?= |:)"), "name"),
    (re.compile(r"^search\.trials(?= |:)"), "trials"),
    (re.compile(r"^model\.id(?= |:)"), "model"),
    (re.compile(r"\bdata/(train|validation|test|retained)\.jsonl:(\d+)"), None),
    (re.compile(r"--allow-lossy"), "allow_lossy=True"),
    (re.compile(r"--force"), "force=True"),
    (re.compile(r"--pick "), ""),
)


def in_argument_terms(text: str) -> str:
    """Rewrite a message about a study file or a command in terms of arguments."""
    for pattern, word in _ARGUMENTS:
        if word is None:  # line 3 of a table's file is row 2 of the table
            text = pattern.sub(lambda match: f"{match[1]}, row {int(match[2]) - 1}", text)
        else:
            text = pattern.sub(word, text)
    return text


def settings_of(
    *,
    name: Any,
    model: Any,
    data: Any,
    space: Any,
    objectives: Any,
    metric: Any,
    trials: Any,
    others: Mapping[str, Any],
) -> tuple[dict[str, Any], Tables]:
    """Return settings as plain data, and the files of tables. Raises StudyFileError for objects unfit for a file."""
    named = [argument for argument in ("study", "name") if argument in others]
    problems: list[PlacedProblem] = [
        ((argument,), "use the argument `name` for the name of the study") for argument in named
    ]
    settings: dict[str, Any] = {"study": name, "output": ".", **others}
    settings["model"] = _model(model, problems)
    settings["data"], tables = _data(data, problems)
    settings["forgetting"], tables = _forgetting(others.get("forgetting"), tables, problems)
    settings["space"] = space_section(space, problems)
    settings["training"] = training_section(others.get("training"), problems)
    settings["objectives"], settings["metrics"] = _objectives(objectives, metric, others.get("metrics"), problems)
    if trials is not None:
        search = others.get("search") or {}
        if isinstance(search, Mapping):
            if "trials" in search:
                problems.append((("search", "trials"), "is set twice: in `search` and as the argument `trials`"))
            settings["search"] = {**search, "trials": trials}
    settings = {key: _plain(value, (key,), problems) for key, value in settings.items() if value is not None}
    _make_absolute(settings, tables)
    if problems:
        raise StudyFileError(f"{'.'.join(map(str, path))}: {what}" for path, what in problems)
    return settings, tables


def _objectives(objectives: Any, metric: Any, own: Any, problems: list[PlacedProblem]) -> tuple[Any, Any]:
    """Return the settings `objectives` (with `metric` first unless it is among them) and `metrics`."""
    if isinstance(own, Mapping):
        own = {name: _place(value, ("metrics", str(name)), problems) for name, value in own.items()}
    if metric is None:
        return objectives, own
    name = metric if isinstance(metric, str) else getattr(metric, "name", getattr(metric, "__name__", None))
    if isinstance(metric, Quality) and not isinstance(metric, UserDefined):
        _register(metric, problems)
    elif not isinstance(metric, (str, UserDefined)) and not callable(metric):
        problems.append((("metric",), f"must be a function, a metric or a name, got a {type(metric).__name__}"))
    elif not isinstance(metric, str):
        place = metric.place if isinstance(metric, UserDefined) else _place(metric, ("metric",), problems)
        own = {**(own or {}), str(name): place}
    given = ["num_params"] if objectives is None else objectives
    if isinstance(given, (list, tuple)):
        named = [entry.get("name") if isinstance(entry, Mapping) else entry for entry in given]
        objectives = list(given) if name in named else [name, *given]
    return objectives, own


def _place(function: Any, path: tuple[str, ...], problems: list[PlacedProblem]) -> Any:
    """Return the module:function of a function; other values unchanged."""
    try:
        return place_of(function) if callable(function) else function
    except MetricError as error:
        problems.append((path, str(error)))
        return None


def _register(metric: Quality, problems: list[PlacedProblem]) -> None:
    """Register a metric in this process; other processes need it from a plug-in to resume the study."""
    registered = METRICS.get(metric.name)
    if registered is None or repr(registered) == repr(metric):  # a cell that runs again redefines its class
        QUALITIES[metric.name] = metric
    else:
        problems.append((("metric",), f"{metric.name!r} is already a metric: choose another name"))


def _model(model: Any, problems: list[PlacedProblem]) -> Any:
    if isinstance(model, (str, os.PathLike)):
        return {"id": os.fspath(model)}
    if model is None or isinstance(model, Mapping):
        return model
    what = (
        f"must be a hub id or a folder, got a {type(model).__name__}: other processes must be able to load the model to"
        " resume the study or to use its recipes; save it and its tokenizer with save_pretrained, and pass the folder"
    )
    problems.append((("model",), what))
    return None


def _data(data: Any, problems: list[PlacedProblem]) -> tuple[Any, Tables]:
    nothing = Tables({})
    if data is None:
        return None, nothing
    if isinstance(data, (str, os.PathLike)):
        folder = Path(data).expanduser()
        if folder.is_dir():
            return {"source": "files", **_files_in(folder)}, nothing
        return {"source": os.fspath(data)}, nothing
    if isinstance(data, Mapping):
        data = {str(key): value for key, value in data.items() if value is not None}
        given = {split: data[split] for split in SPLITS if is_table(data.get(split))}
        if not given:
            return data, nothing
        if data.get("source", "files") != "files":
            problems.append((("data", "source"), "cannot be combined with tables: leave it out"))
        if "validation" not in data:
            problems.append((("data", "validation"), "is missing: pass the rows on which candidates are compared"))
        tables, names = tables_of(given, problems, hold_out="test" not in data)
        return {"source": "files", **data, **names}, tables
    if is_table(data):
        what = "a single table has no splits: pass {'train': ..., 'validation': ..., 'test': ...}"
    else:
        what = f"must be a folder, tables by split or the settings of a study file, got a {type(data).__name__}"
    problems.append((("data",), what))
    return None, nothing


def _forgetting(retained: Any, tables: Tables, problems: list[PlacedProblem]) -> tuple[Any, Tables]:
    """Return the section of retained rows, which are a table, a file or the name of a source, and all tables."""
    if isinstance(retained, (str, os.PathLike)):
        path = os.fspath(retained)
        return {"source": "files", "file": path} if path.endswith(SUFFIXES) else {"source": path}, tables
    if not is_table(retained):
        return retained, tables
    more, names = tables_of({RETAINED: retained}, problems, hold_out=False)
    return {"source": "files", "file": names[RETAINED]}, Tables({**tables.files, **more.files}, tables.warnings)


def _files_in(folder: Path) -> dict[str, str]:
    """Return the file of each split for which the folder has exactly one file."""
    found = {}
    for split in SPLITS:
        named = [path for path in folder.iterdir() if path.stem == split and path.suffix.lower() in SUFFIXES]
        files = [path for path in named if path.is_file()]
        if len(files) == 1:
            found[split] = str(files[0])
    return found


def _plain(value: Any, path: tuple[str, ...], problems: list[PlacedProblem]) -> Any:
    """Return the value as texts, numbers, lists and mappings, which YAML can represent."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, (*path, str(key)), problems) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [
            _plain(entry, path, problems) for entry in (sorted(value) if isinstance(value, (set, frozenset)) else value)
        ]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a NumPy number
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    problems.append((path, f"cannot be written to a study file: {value!r:.60}"))
    return None


def _make_absolute(settings: dict[str, Any], tables: Tables) -> None:
    model, data = settings.get("model"), settings.get("data")
    if isinstance(model, dict) and isinstance(model.get("id"), str):
        given = Path(model["id"]).expanduser()
        if given.is_dir() or model["id"].startswith((".", "~")):
            model["id"] = _absolute(model["id"])
    if isinstance(data, dict) and data.get("source") == "files":
        for split in SPLITS:
            # The files of tables are in the study's folder.
            if isinstance(data.get(split), str) and data[split] not in tables.files:
                data[split] = _absolute(data[split])
    for section, key in (("search", "prior"), ("evaluation", "cache_folder"), ("forgetting", "file")):
        values = settings.get(section)
        if isinstance(values, dict) and isinstance(values.get(key), str) and values[key] not in tables.files:
            values[key] = _absolute(values[key])
    own = settings.get("metrics")
    for values in own.values() if isinstance(own, dict) else ():
        if isinstance(values, dict) and isinstance(values.get("folder"), str):
            values["folder"] = _absolute(values["folder"])
    tracking = settings.get("tracking")
    for values, key in ((settings, "storage"), (tracking, "uri")):
        if isinstance(values, dict) and isinstance(values.get(key), str):
            values[key] = located(values[key], Path.cwd())
    if isinstance(settings.get("output"), str) and settings["output"] != ".":
        settings["output"] = _absolute(settings["output"])
    space = settings.get("space")
    adapters = space.get("adapters") if isinstance(space, dict) else None
    for adapter in adapters.values() if isinstance(adapters, dict) else ():
        if isinstance(adapter, dict) and isinstance(adapter.get("given"), list):
            adapter["given"] = [_absolute(one) if isinstance(one, str) else one for one in adapter["given"]]


def _absolute(path: str) -> str:
    return os.path.abspath(Path(path).expanduser())
