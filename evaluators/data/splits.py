"""Rows of a data set and their checks: every problem is found before a model is loaded."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

EMBEDDED = "embedded"
EMBEDDED_DOMAINS = "embedded-domains"
#: The packages that hold the files of the embedded sources.
EMBEDDED_IN = {EMBEDDED: "autopeft.evaluators.data.topics", EMBEDDED_DOMAINS: "autopeft.evaluators.data.domains"}
FILES = "files"
SPLITS = ("train", "validation", "test")
MOST_PROBLEMS_PER_FILE = 5

Row = dict[str, Any]


class DataError(ValueError):
    """Everything wrong with the data, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """Where the rows are and what their fields are called. `source`: "embedded", "embedded-domains", "files" or a data
    set of the hub.

    `train`, `validation`, `test`: files (JSONL, CSV, Parquet; relative to `folder`), or names of the hub's splits.
    `domain`: the field that says which data set or task a row comes from, if the rows are of several.
    `max_train_rows`: train on so many rows, drawn at random (the same ones every time) with every label and every
    domain among them.
    """

    source: str = EMBEDDED
    revision: str | None = None
    train: str = "train"
    validation: str = "validation"
    test: str = "test"
    text: str = "text"
    label: str = "label"
    domain: str | None = None
    prompt: str = "prompt"
    completion: str = "completion"
    max_length: int = 64
    max_train_rows: int | None = None
    folder: Path = Path(".")

    @property
    def domain_field(self) -> str | None:
        """`domain`, or the one that the embedded data with domains has of its own."""
        return self.domain or ("domain" if self.source == EMBEDDED_DOMAINS else None)


@dataclass(frozen=True, slots=True)
class Splits:
    """Rows with the canonical fields of their task; `labels` for classification and `domains` where the rows have
    them, both sorted (numbers by their value).

    `warnings`: what is legal but worth knowing (texts that stand in two splits).
    """

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    labels: tuple[str, ...] | None
    warnings: tuple[str, ...] = ()
    domains: tuple[str, ...] | None = None


def load_splits(data: DataSettings, task: str) -> Splits:
    """All three splits, checked. Raises DataError with every problem."""
    problems: list[str] = []
    rows: dict[str, list[Row]] = {}
    for split in SPLITS:
        name = getattr(data, split)
        try:
            found, wrong = _canonical(_read(data, name, split), data, task)
        except (OSError, ValueError) as error:
            problems.append(f"{name}: {error}")
            continue
        if not wrong:
            rows[split] = found
        if not found and not wrong:
            problems.append(f"{name}: the {split} split is empty")
        problems += [f"{name}{place}: {what}" for place, what in wrong[:MOST_PROBLEMS_PER_FILE]]
        if len(wrong) > MOST_PROBLEMS_PER_FILE:
            problems.append(f"{name}: {len(wrong) - MOST_PROBLEMS_PER_FILE} more rows like these")
    labels = domains = None
    if rows.get("train"):  # not next to rows that are left out
        if task == "classification":
            labels = _values(rows["train"], "label")
            problems += _unseen(rows, "label", labels, data)
            if len(labels) < 2:
                problems.append(f"{data.train}: only one label, {labels[0]!r}: there is nothing to classify")
        if data.domain_field is not None:
            domains = _values(rows["train"], "domain")
            problems += _unseen(rows, "domain", domains, data)
        problems += _too_few(data, labels or (), domains or ())
    if problems:
        raise DataError(problems)
    if data.max_train_rows is not None:
        rows["train"] = _drawn(rows["train"], data.max_train_rows)
    return Splits(rows["train"], rows["validation"], rows["test"], labels, tuple(_leaks(rows)), domains)


def _values(rows: list[Row], field: str) -> tuple[str, ...]:
    return tuple(sorted({row[field] for row in rows}, key=_natural))


def _natural(value: str) -> tuple[bool, int, str]:
    """Numbers by value, before names by letter."""
    number = value.removeprefix("-").isdecimal()
    return not number, int(value) if number else 0, value


def _unseen(rows: dict[str, list[Row]], field: str, known: tuple[str, ...], data: DataSettings) -> Iterator[str]:
    for split in rows:
        unseen = sorted({row[field] for row in rows[split]} - set(known), key=_natural)
        if unseen:
            yield (
                f"{getattr(data, split)}: {field}s {', '.join(map(repr, unseen[:5]))} do not occur in the training"
                f" split, which has {', '.join(map(repr, known[:20]))}"
            )


def _too_few(data: DataSettings, labels: Sequence[str], domains: Sequence[str]) -> Iterator[str]:
    if data.max_train_rows is not None and data.max_train_rows < len(labels) + len(domains):
        named = [f"{len(values)} {what}" for values, what in ((labels, "labels"), (domains, "domains")) if values]
        yield f"max_train_rows {data.max_train_rows} is less than one row for each of the {' and '.join(named)}"


def _drawn(rows: list[Row], count: int) -> list[Row]:
    """So many rows at random, in the order of the file: a file sorted by label has few labels at its beginning.

    One row of each label and one of each domain are in.
    """
    order = list(range(len(rows)))
    Random("max_train_rows").shuffle(order)
    first = [{rows[i].get(field): i for i in reversed(order)}.values() for field in ("label", "domain")]
    chosen = dict.fromkeys([*chain.from_iterable(first), *order])
    return [rows[i] for i in sorted(list(chosen)[:count])]


# Reading. A row comes with the place to name in a message (":12" for line 12); what cannot be read as one, as text.

Found = Iterator[tuple[str, Row | str]]


def _read(data: DataSettings, name: str, split: str) -> Found:
    if data.source in EMBEDDED_IN:
        with (files(EMBEDDED_IN[data.source]) / f"{split}.jsonl").open(encoding="utf-8") as lines:
            yield from _jsonl(lines)
    elif data.source == FILES:
        path = Path(data.folder) / Path(name).expanduser()
        if not path.is_file():
            raise ValueError("there is no such file")
        yield from _file(path)
    else:
        yield from _hub(data, name)


def _file(path: Path) -> Found:
    try:
        if path.suffix in (".jsonl", ".json"):
            with path.open(encoding="utf-8-sig") as lines:
                yield from _jsonl(lines)
        elif path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as lines:
                yield from _csv(lines)
        elif path.suffix == ".parquet":
            yield from _parquet(path)
        else:
            raise ValueError(f"files of type {path.suffix!r} are not read: use .jsonl, .csv or .parquet")
    except UnicodeDecodeError as error:
        raise ValueError(f"this is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _jsonl(lines: Iterable[str]) -> Found:
    # Lines as a file has them: str.splitlines would also cut at characters that JSON allows inside a text.
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            row = f"this is not JSON: {error.msg}"
        else:
            row = row if isinstance(row, dict) else "this is not a JSON object"
        yield f":{number}", row


def _csv(lines: Iterable[str]) -> Found:
    csv.field_size_limit(2**31 - 1)  # a text may be long
    reader = csv.DictReader(lines, strict=True)
    end = 1  # of the row before; a row may take several lines
    try:
        for row in reader:
            yield f":{end + 1}", "more values than the header has names" if None in row else row
            end = reader.line_num
    except csv.Error as error:
        yield f":{end + 1}", f"this is not CSV: {error}"


def _parquet(path: Path) -> Found:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        rows = read_table(path).to_pylist()
    except ArrowException as error:
        raise ValueError(f"this is not a Parquet file: {_first_line(error)}") from error
    for number, row in enumerate(rows, start=1):
        yield f":{number}", row


def _hub(data: DataSettings, name: str) -> Found:
    from datasets import ClassLabel, load_dataset

    try:
        rows = load_dataset(data.source, split=name, revision=data.revision)
    except Exception as error:  # the hub's client raises many kinds: connection, not found, gated, bad split
        raise ValueError(f"{data.source} could not be loaded: {_first_line(error)}") from error
    features = {field: rows.features.get(field) for field in (data.label, data.domain_field)}
    named = {field: feature for field, feature in features.items() if isinstance(feature, ClassLabel)}
    for place, row in enumerate(rows):
        for field, feature in named.items():
            number = row[field]
            row = {**row, field: None if number in (None, -1) else feature.int2str(number)}  # -1: not given
        yield f"[{place}]", row


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Checking


def _canonical(found: Found, data: DataSettings, task: str) -> tuple[list[Row], list[tuple[str, str]]]:
    """Rows with canonical field names, and pairs of place and problem."""
    rows, wrong = [], []
    for place, row in found:
        try:
            if isinstance(row, str):
                raise ValueError(row)
            row = {name: value for name, value in row.items() if value not in (None, "")}
            canonical = _classification_row(row, data) if task == "classification" else _causal_row(row, data)
            if data.domain_field is not None:
                canonical["domain"] = _name(row, data.domain_field, "domain")
            rows.append(canonical)
        except ValueError as error:
            wrong.append((place, str(error)))
    return rows, wrong


def _fields(row: Row) -> str:
    return ", ".join(map(repr, row)) or "none"


def _field(row: Row, name: str) -> Any:
    if name not in row:
        raise ValueError(f"no field {name!r}; this row has {_fields(row)}")
    return row[name]


def _text(row: Row, name: str) -> str:
    value = _field(row, name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field {name!r} is not a text: {value!r:.40}")
    return value


def _name(row: Row, name: str, what: str) -> str:
    """Of a label or a domain."""
    value = _field(row, name)
    if not isinstance(value, (str, int, float)) or value != value or not str(value).strip():
        raise ValueError(f"field {name!r} is not a {what}: {value!r:.40}")
    # A column of whole numbers becomes one of floats where a value is missing.
    return str(int(value) if isinstance(value, float) and math.isfinite(value) and value == int(value) else value)


def _classification_row(row: Row, data: DataSettings) -> Row:
    return {"text": _text(row, data.text), "label": _name(row, data.label, "label")}


def _causal_row(row: Row, data: DataSettings) -> Row:
    """Prompt + completion (loss on the completion), messages, or text (loss on everything), as TRL has them."""
    if "messages" in row:
        return {"messages": _messages(row["messages"])}
    if data.prompt in row or data.completion in row:
        return {"prompt": _text(row, data.prompt), "completion": _text(row, data.completion)}
    if data.text in row:
        return {"text": _text(row, data.text)}
    raise ValueError(
        f"neither {data.prompt!r} and {data.completion!r}, nor 'messages', nor {data.text!r} among its fields:"
        f" {_fields(row)}"
    )


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError("'messages' must be a list of objects with 'role' and 'content'")
    messages = [{"role": message.get("role"), "content": message.get("content")} for message in value]
    for number, message in enumerate(messages):
        if not all(isinstance(text, str) for text in message.values()):
            raise ValueError(f"message {number}: 'role' and 'content' must be texts")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("'messages' must end with a message of the role 'assistant', after what it answers")
    return messages


def _leaks(rows: dict[str, list[Row]]) -> Iterator[str]:
    """Inputs that stand in two splits flatter every candidate."""

    def key(row: Row) -> str:
        return json.dumps(row.get("text") or row.get("prompt") or row["messages"][:-1])

    inputs = {split: {key(row) for row in rows[split]} for split in SPLITS}
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        both = len(inputs[first] & inputs[second])
        if both:
            what = "1 input stands" if both == 1 else f"{both} inputs stand"
            yield f"{what} in both {first} and {second}: the scores will be too good"
