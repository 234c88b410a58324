"""Rows of a data set and their checks: every problem is found before a model is loaded."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain
from pathlib import Path
from random import Random

from autopeft.evaluators.errors import DataError
from autopeft.evaluators.rows import EMBEDDED_IN, FILES, DataSettings, Row, name_of, named_classes
from autopeft.evaluators.tasks import TASKS, Task

SPLITS = ("train", "validation", "test")
MOST_PROBLEMS_PER_FILE = 5


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
    kind = TASKS[task].for_data(data)
    problems: list[str] = []
    rows: dict[str, list[Row]] = {}
    for split in SPLITS:
        name = getattr(data, split)
        try:
            found, wrong = _canonical(_read(data, name, split), data, kind)
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
        if kind.has_labels:
            labels = _values(rows["train"], kind.labels_of)
            problems += _unseen(rows, "label", kind.labels_of, labels, data)
            if problem := kind.label_problem(labels):
                problems.append(f"{data.train}: {problem}")
        if data.domain_field is not None:
            domains = _values(rows["train"], _domains_of)
            problems += _unseen(rows, "domain", _domains_of, domains, data)
        problems += _too_few(data, labels or (), domains or ())
    if problems:
        raise DataError(problems)
    if data.max_train_rows is not None:
        rows["train"] = _drawn(rows["train"], data.max_train_rows, kind.labels_of)
    warnings = tuple(_leaks(rows, kind))
    return Splits(rows["train"], rows["validation"], rows["test"], labels, warnings, domains)


#: The names that a row has of one kind: labels, any number of them, or its domain.
NamesOf = Callable[[Row], Sequence[str]]


def _domains_of(row: Row) -> Sequence[str]:
    return (row["domain"],) if "domain" in row else ()


def _values(rows: list[Row], names_of: NamesOf) -> tuple[str, ...]:
    return tuple(sorted({name for row in rows for name in names_of(row)}, key=_natural))


def _natural(value: str) -> tuple[bool, int, str]:
    """Numbers by value, before names by letter."""
    number = value.removeprefix("-").isdecimal()
    return not number, int(value) if number else 0, value


def _unseen(
    rows: dict[str, list[Row]], what: str, names_of: NamesOf, known: tuple[str, ...], data: DataSettings
) -> Iterator[str]:
    for split in rows:
        unseen = [name for name in _values(rows[split], names_of) if name not in known]
        if unseen:
            yield (
                f"{getattr(data, split)}: {what}s {', '.join(map(repr, unseen[:5]))} do not occur in the training"
                f" split, which has {', '.join(map(repr, known[:20]))}"
            )


def _too_few(data: DataSettings, labels: Sequence[str], domains: Sequence[str]) -> Iterator[str]:
    if data.max_train_rows is not None and data.max_train_rows < len(labels) + len(domains):
        named = [f"{len(values)} {what}" for values, what in ((labels, "labels"), (domains, "domains")) if values]
        yield f"max_train_rows {data.max_train_rows} is less than one row for each of the {' and '.join(named)}"


def _drawn(rows: list[Row], count: int, labels_of: NamesOf) -> list[Row]:
    """So many rows at random, in the order of the file: a file sorted by label has few labels at its beginning.

    One row of each label and one of each domain are in.
    """
    order = list(range(len(rows)))
    Random("max_train_rows").shuffle(order)
    first = [
        {name: i for i in reversed(order) for name in names_of(rows[i])}.values()
        for names_of in (labels_of, _domains_of)
    ]
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
    from datasets import load_dataset

    try:
        rows = load_dataset(data.source, split=name, revision=data.revision)
    except Exception as error:  # the hub's client raises many kinds: connection, not found, gated, bad split
        raise ValueError(f"{data.source} could not be loaded: {_first_line(error)}") from error
    fields = [field for field in (data.label, data.labels, data.domain_field) if field and field in rows.features]
    for place, row in enumerate(rows):
        yield f"[{place}]", {**row, **{field: named_classes(rows.features[field], row[field]) for field in fields}}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Checking


def _canonical(found: Found, data: DataSettings, task: type[Task]) -> tuple[list[Row], list[tuple[str, str]]]:
    """Rows with canonical field names, and pairs of place and problem."""
    rows, wrong = [], []
    for place, row in found:
        try:
            if isinstance(row, str):
                raise ValueError(row)
            row = {name: value for name, value in row.items() if value not in (None, "")}
            canonical = task.row(row, data)
            if data.domain_field is not None:
                canonical["domain"] = name_of(row, data.domain_field, "domain")
            rows.append(canonical)
        except ValueError as error:
            wrong.append((place, str(error)))
    return rows, wrong


def _leaks(rows: dict[str, list[Row]], task: type[Task]) -> Iterator[str]:
    """Inputs that stand in two splits flatter every candidate."""
    inputs = {split: {json.dumps(task.input_of(row)) for row in rows[split]} for split in SPLITS}
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        both = len(inputs[first] & inputs[second])
        if both:
            what = "1 input stands" if both == 1 else f"{both} inputs stand"
            yield f"{what} in both {first} and {second}: the scores will be too good"
