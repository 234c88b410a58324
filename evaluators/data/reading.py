"""Reading of one split: rows from a file, a package or the hub, with the field names of the task, and all problems."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path

from autopeft.evaluators.errors import first_line
from autopeft.evaluators.rows import (
    EMBEDDED_IN,
    EMBEDDED_PROSE,
    FILES,
    DataConfig,
    MissingFieldError,
    Row,
    check_values,
    name_of,
    named_classes,
    text_of,
)
from autopeft.evaluators.tasks import Task

MOST_PROBLEMS_PER_FILE = 5
#: Rows of a Parquet file, which may claim any number of them in a few bytes.
MOST_ROWS = 10_000_000
NO_OBJECT = "not a JSON object"
#: The packages that hold the files of all embedded sources.
PACKAGES = {**EMBEDDED_IN, EMBEDDED_PROSE: "autopeft.evaluators.data.prose"}

#: Pairs of a place for messages (":12" for line 12) and a row, or a text that says why the row cannot be read.
PlacedRows = Iterator[tuple[str, Row | str]]


def read_split(
    data: DataConfig, name: str, split: str, task: type[Task], columns: set[str]
) -> tuple[list[Row], list[str], list[Mapping[str, str]], list[str]]:
    """Return the canonical rows of a split, their places, their columns that `task` leaves unread, and all problems.

    The names of all columns are added to `columns`.
    """
    try:
        rows, places, unread, wrong = _canonical(_read(data, name, split), data, task, columns)
    except (OSError, ValueError) as error:
        return [], [], [], [f"{name}: {error}"]
    problems = [f"{name}{place}: {what}" for place, what in wrong[:MOST_PROBLEMS_PER_FILE]]
    if len(wrong) > MOST_PROBLEMS_PER_FILE:
        problems.append(f"{name}: {len(wrong) - MOST_PROBLEMS_PER_FILE} more rows with problems")
    return rows, [f"{name}{place}" for place in places], unread, problems


def _read(data: DataConfig, name: str, split: str) -> PlacedRows:
    if (package := PACKAGES.get(data.source)) is not None:
        with (files(package) / f"{split}.jsonl").open(encoding="utf-8") as lines:
            yield from _jsonl(lines)
    elif data.source == FILES:
        path = Path(data.folder) / Path(name).expanduser()
        if not path.is_file():
            raise ValueError("is a folder or a pipe, not a file" if path.exists() else "no such file")
        yield from _file(path)
    else:
        yield from _hub(data, name)


def _file(path: Path) -> PlacedRows:
    suffix = path.suffix.lower()
    try:
        if suffix == ".json" and (text := path.read_text(encoding="utf-8-sig")).lstrip().startswith("["):
            yield from _json_array(text)
        elif suffix in (".jsonl", ".json"):
            with path.open(encoding="utf-8-sig") as lines:
                yield from _jsonl(lines)
        elif suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as lines:
                yield from _csv(lines)
        elif suffix == ".parquet":
            yield from _parquet(path)
        else:
            raise ValueError(f"files of type {path.suffix!r} are not supported: use .jsonl, .json, .csv or .parquet")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error.reason} at byte {error.start}") from error


def _jsonl(lines: Iterable[str]) -> PlacedRows:
    # Lines of the file: str.splitlines would also split at characters that JSON allows inside a text.
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            row = f"not valid JSON: {_json_problem(error)}"
        else:
            row = row if isinstance(row, dict) else NO_OBJECT
        yield f":{number}", row


def _json_array(text: str) -> PlacedRows:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        yield f":{getattr(error, 'lineno', 1)}", f"not valid JSON: {_json_problem(error)}"
    else:
        for position, row in enumerate(rows):
            yield f"[{position}]", row if isinstance(row, dict) else NO_OBJECT


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "it is nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"


def _csv(lines: Iterable[str]) -> PlacedRows:
    csv.field_size_limit(2**31 - 1)  # a text may be long
    reader = csv.DictReader(lines, strict=True)
    end = 1  # last line of the previous row; a row may take several lines
    try:
        for row in reader:
            yield f":{end + 1}", "has more values than the header has columns" if None in row else row
            end = reader.line_num
    except csv.Error as error:
        yield f":{end + 1}", f"not valid CSV: {error}"


def _parquet(path: Path) -> PlacedRows:
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            count = file.metadata.num_rows
            rows = file.read().to_pylist() if count <= MOST_ROWS else []
    # pyarrow's own, and those of Python for a value that it does not have, such as a date after the year 9999.
    except Exception as error:
        raise ValueError(f"not a Parquet file that can be read: {first_line(error)}") from error
    if count > MOST_ROWS:
        raise ValueError(f"has {count:,} rows; a file may have {MOST_ROWS:,}")
    for number, row in enumerate(rows, start=1):
        yield f":{number}", row


def _hub(data: DataConfig, name: str) -> PlacedRows:
    from datasets import load_dataset

    try:
        rows = load_dataset(data.source, split=name, revision=data.revision)
    except Exception as error:  # the hub's client has many exceptions: connection, not found, gated, bad split
        raise ValueError(f"{data.source} could not be loaded: {first_line(error)}") from error
    fields = [field for field in (data.label, data.labels, data.domain_field) if field and field in rows.features]
    for place, row in enumerate(rows):
        yield f"[{place}]", {**row, **{field: named_classes(rows.features[field], row[field]) for field in fields}}


def _canonical(
    found: PlacedRows, data: DataConfig, task: type[Task], columns: set[str]
) -> tuple[list[Row], list[str], list[Mapping[str, str]], list[tuple[str, str]]]:
    """Return rows with canonical field names, their places, their columns that `task` leaves unread, and problems.

    The names of all columns are added to `columns`.
    """
    rows, places, unread, wrong = [], [], [], []
    for place, whole in found:
        try:
            if isinstance(whole, str):
                raise ValueError(whole)
            columns.update(whole)
            row = {name: value for name, value in whole.items() if value not in (None, "")}
            canonical = task.row(row, data)
            if data.domain_field is not None:
                canonical["domain"] = name_of(row, data.domain_field, "domain")
            if data.tests is not None and data.tests in row:  # training rows need none
                canonical["tests"] = text_of(row, data.tests)
            check_values(canonical)
            rows.append(canonical)
            places.append(place)
            unread.append(task.unread(row, data))
        except MissingFieldError as error:
            wrong.append((place, f"field {error.name!r} is empty" if error.name in whole else str(error)))
        except ValueError as error:
            wrong.append((place, str(error)))
    return rows, places, unread, wrong
