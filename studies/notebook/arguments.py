"""The arguments of `Study` as the settings of a study file, and the file's errors in the words of the arguments.

Relative paths count from the working directory, as everywhere in Python; in the settings they are absolute.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autopeft.search_space.metrics import QUALITIES, MetricError, Own, Quality, place_of
from autopeft.search_space.problem import METRICS
from autopeft.studies.config.declaration import Finding
from autopeft.studies.config.source import StudyFileError
from autopeft.studies.config.written import written_space, written_training
from autopeft.studies.notebook.tables import SPLITS, Tables, is_table, tables_of

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
#: Settings of the file and the arguments that have them, and the options of commands and what they are here.
_ARGUMENTS = (
    (re.compile(r"^study(?= |:)"), "name"),
    (re.compile(r"^search\.trials(?= |:)"), "trials"),
    (re.compile(r"^model\.id(?= |:)"), "model"),
    (re.compile(r"\bdata/(train|validation|test)\.jsonl:(\d+)"), None),
    (re.compile(r"--allow-lossy"), "allow_lossy=True"),
    (re.compile(r"--force"), "force=True"),
    (re.compile(r"--pick "), ""),
)


def in_words_of_arguments(text: str) -> str:
    """Rewrite a message about a study file or a command for the caller of a function."""
    for pattern, word in _ARGUMENTS:
        if word is None:  # line 3 of a table that was written is its row 2
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
    """Return the settings as plain data and the files they name. Raises StudyFileError for what no file can say."""
    named = [argument for argument in ("study", "name") if argument in others]
    problems: list[Finding] = [((argument,), "the name of the study is the argument `name`") for argument in named]
    settings: dict[str, Any] = {"study": name, "output": ".", **others}
    settings["model"] = _model(model, problems)
    settings["data"], tables = _data(data, problems)
    settings["space"] = written_space(space, problems)
    settings["training"] = written_training(others.get("training"), problems)
    settings["objectives"], settings["metrics"] = _objectives(objectives, metric, others.get("metrics"), problems)
    if trials is not None:
        search = others.get("search") or {}
        if isinstance(search, Mapping):
            if "trials" in search:
                problems.append((("search", "trials"), "stands in `search` and as an argument of its own"))
            settings["search"] = {**search, "trials": trials}
    settings = {key: _plain(value, (key,), problems) for key, value in settings.items() if value is not None}
    _make_absolute(settings, tables)
    if problems:
        raise StudyFileError(f"{'.'.join(map(str, path))}: {what}" for path, what in problems)
    return settings, tables


def _objectives(objectives: Any, metric: Any, own: Any, problems: list[Finding]) -> tuple[Any, Any]:
    """Return the settings `objectives`, with `metric` first unless it is one of them, and `metrics`."""
    if isinstance(own, Mapping):
        own = {name: _place(value, ("metrics", str(name)), problems) for name, value in own.items()}
    if metric is None:
        return objectives, own
    name = metric if isinstance(metric, str) else getattr(metric, "name", getattr(metric, "__name__", None))
    if isinstance(metric, Quality) and not isinstance(metric, Own):
        _register(metric, problems)
    elif not isinstance(metric, (str, Own)) and not callable(metric):
        problems.append((("metric",), f"must be a function, a metric or a name, got a {type(metric).__name__}"))
    elif not isinstance(metric, str):
        place = metric.place if isinstance(metric, Own) else _place(metric, ("metric",), problems)
        own = {**(own or {}), str(name): place}
    given = ["num_params"] if objectives is None else objectives
    if isinstance(given, (list, tuple)):
        named = [entry.get("name") if isinstance(entry, Mapping) else entry for entry in given]
        objectives = list(given) if name in named else [name, *given]
    return objectives, own


def _place(function: Any, path: tuple[str, ...], problems: list[Finding]) -> Any:
    """Return a function as its module:function; anything else as it is."""
    try:
        return place_of(function) if callable(function) else function
    except MetricError as error:
        problems.append((path, str(error)))
        return None


def _register(metric: Quality, problems: list[Finding]) -> None:
    """Register a metric in this process. Another one that goes on with the study needs it, too, as from a plug-in."""
    known = METRICS.get(metric.name)
    if known is None or repr(known) == repr(metric):  # a cell that runs again defines its class anew
        QUALITIES[metric.name] = metric
    else:
        problems.append((("metric",), f"{metric.name!r} is a metric already: take another name"))


def _model(model: Any, problems: list[Finding]) -> Any:
    if isinstance(model, (str, os.PathLike)):
        return {"id": os.fspath(model)}
    if model is None or isinstance(model, Mapping):
        return model
    what = (
        f"must be an id or a folder, got a {type(model).__name__}: a study is resumed, and its recipes load, in other"
        " processes, which see no objects of this one; write it with save_pretrained, with its tokenizer, and"
        " give the folder"
    )
    problems.append((("model",), what))
    return None


def _data(data: Any, problems: list[Finding]) -> tuple[Any, Tables]:
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
            problems.append((("data", "source"), "tables have none: leave it out"))
        if "validation" not in data:
            problems.append((("data", "validation"), "is missing: rows to compare candidates on"))
        tables, names = tables_of(given, problems, hold_out="test" not in data)
        return {"source": "files", **data, **names}, tables
    if is_table(data):
        what = "one table alone: name its parts, {'train': ..., 'validation': ..., 'test': ...}"
    else:
        what = f"must be a folder, tables by split or the settings of a study file, got a {type(data).__name__}"
    problems.append((("data",), what))
    return None, nothing


def _files_in(folder: Path) -> dict[str, str]:
    """Return the file of each split, where there is exactly one."""
    found = {}
    for split in SPLITS:
        files = [folder / f"{split}{suffix}" for suffix in SUFFIXES if (folder / f"{split}{suffix}").is_file()]
        if len(files) == 1:
            found[split] = str(files[0])
    return found


def _plain(value: Any, path: tuple[str, ...], problems: list[Finding]) -> Any:
    """Return texts, numbers, lists and mappings, as YAML can hold them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, (*path, str(key)), problems) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [
            _plain(entry, path, problems) for entry in (sorted(value) if isinstance(value, (set, frozenset)) else value)
        ]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a number of numpy's
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    problems.append((path, f"cannot stand in a study file: {value!r:.60}"))
    return None


def _make_absolute(settings: dict[str, Any], tables: Tables) -> None:
    model, data = settings.get("model"), settings.get("data")
    if isinstance(model, dict) and isinstance(model.get("id"), str):
        given = Path(model["id"]).expanduser()
        if given.is_dir() or model["id"].startswith((".", "~")):
            model["id"] = _absolute(model["id"])
    if isinstance(data, dict) and data.get("source") == "files":
        for split in SPLITS:
            # Those of tables are in the study's folder.
            if isinstance(data.get(split), str) and data[split] not in tables.files:
                data[split] = _absolute(data[split])
    for section, key in (("search", "prior"), ("evaluation", "cache_folder")):
        values = settings.get(section)
        if isinstance(values, dict) and isinstance(values.get(key), str):
            values[key] = _absolute(values[key])
    if isinstance(settings.get("output"), str) and settings["output"] != ".":
        settings["output"] = _absolute(settings["output"])
    space = settings.get("space")
    adapters = space.get("adapters") if isinstance(space, dict) else None
    for adapter in adapters.values() if isinstance(adapters, dict) else ():
        if isinstance(adapter, dict) and isinstance(adapter.get("given"), list):
            adapter["given"] = [_absolute(one) if isinstance(one, str) else one for one in adapter["given"]]


def _absolute(path: str) -> str:
    return os.path.abspath(Path(path).expanduser())
