"""Loading and checking of the rows of a data set; all problems are found before a model is loaded."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import chain, islice
from pathlib import Path
from random import Random

from autopeft.evaluators.data.losses import Encoded, Unread
from autopeft.evaluators.errors import DataError, first_line
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
from autopeft.evaluators.tasks import TASKS, Task
from autopeft.search_space.spelling import did_you_mean

SPLITS = ("train", "validation", "test")
#: The splits of the retained rows, by the split with which they are scored.
RETAINED = {"validation": "retained", "test": "retained_test"}
MOST_PROBLEMS_PER_FILE = 5
#: Longer names of labels are sorted as texts, even if they are numbers.
MOST_DIGITS = 1000
#: Rows of a Parquet file, which may claim any number of them in a few bytes.
MOST_ROWS = 10_000_000
NO_OBJECT = "not a JSON object"
#: The packages that hold the files of all embedded sources.
PACKAGES = {**EMBEDDED_IN, EMBEDDED_PROSE: "autopeft.evaluators.data.prose"}


@dataclass(frozen=True, slots=True)
class Splits:
    """Rows with the canonical fields of their task.

    `labels` (for classification) and `domains` (if the rows have them) are sorted, numbers by value. `warnings`: texts
    about permitted but questionable rows, such as inputs in two splits. `places`: by split, the file and line of each
    row, for messages. `unread`: by column that no task reads and that has a part of what a row says, what to do with
    it and the number of its rows by split. `encoded`: the rows as `encode_splits` returned them, if it did. `retained`,
    `retained_test`: see `data/retained.py`; empty where nothing is retained.
    """

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    labels: tuple[str, ...] | None
    warnings: tuple[str, ...] = ()
    domains: tuple[str, ...] | None = None
    places: Mapping[str, Sequence[str]] = field(default_factory=dict, compare=False, repr=False)
    unread: Mapping[str, Unread] = field(default_factory=dict)
    encoded: Encoded | None = field(default=None, compare=False, repr=False)
    retained: list[Row] = field(default_factory=list)
    retained_test: list[Row] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the splits that have rows."""
        return (*SPLITS, *RETAINED.values()) if self.retained else SPLITS

    def place(self, split: str, position: int) -> str:
        """Return the file and line of a row, for messages."""
        return self.places[split][position] if self.places else f"{split} row {position + 1}"


def load_splits(data: DataConfig, task: str) -> Splits:
    """Load and check all three splits, before any tokenizer reads them. Raises DataError with every problem."""
    kind = TASKS[task].for_data(data)
    problems: list[str] = []
    warnings: list[str] = []
    rows: dict[str, list[Row]] = {}
    places: dict[str, list[str]] = {}
    left: dict[str, list[Mapping[str, str]]] = {}
    columns: set[str] = set()
    for split in SPLITS:
        name = getattr(data, split)
        found, where, left[split], wrong = read_split(data, name, split, kind, columns)
        problems += wrong
        if wrong:
            continue
        rows[split], places[split] = found, where
        if not found:
            problems.append(f"{name}: the {split} split is empty")
        elif len(found) == 1 and split != "train":
            problems.append(
                f"{name}: the {split} split has one row; a score needs two at least, to have a standard error"
            )
    labels = domains = None
    if rows.get("train"):  # without rows, these checks would report follow-up problems
        if kind.has_labels:
            labels = _values(rows["train"], kind.labels_of)
            spelt = _first_places(rows, places, kind.labels_of)
            problems += _spaced("label", spelt)
            warnings += _cased("label", spelt)
            problems += unseen(rows, places, "label", kind.labels_of, labels, data)
            if problem := kind.label_problem(labels):
                problems.append(f"{data.train}: {problem}")
        if data.domain_field is not None:
            domains = _values(rows["train"], domains_of)
            spelt = _first_places(rows, places, domains_of)
            problems += _spaced("domain", spelt)
            warnings += _cased("domain", spelt)
            problems += unseen(rows, places, "domain", domains_of, domains, data)
        problems += _too_few(data, labels or (), domains or ())
        if data.system is not None and data.system not in columns:
            problems.append(f"data.system: no row has a column {data.system!r}{did_you_mean(data.system, columns)}")
    if problems:
        raise DataError(problems)
    if data.max_train_rows is not None:
        drawn = _drawn(rows["train"], data.max_train_rows, kind.labels_of)
        rows["train"] = [rows["train"][i] for i in drawn]
        places["train"] = [places["train"][i] for i in drawn]
        left["train"] = [left["train"][i] for i in drawn]
    warnings += _leaks(rows, kind)
    return Splits(
        rows["train"],
        rows["validation"],
        rows["test"],
        labels,
        tuple(warnings),
        domains,
        places=places,
        unread=Unread.counted(left),
    )


#: Returns the names of one kind in a row: its labels or its domain.
NamesOf = Callable[[Row], Sequence[str]]


def domains_of(row: Row) -> Sequence[str]:
    """Return the domain of a row, if it has one."""
    return (row["domain"],) if "domain" in row else ()


def _values(rows: list[Row], names_of: NamesOf) -> tuple[str, ...]:
    return tuple(sorted({name for row in rows for name in names_of(row)}, key=_natural))


def _natural(value: str) -> tuple[bool, int, str]:
    """Return a sorting key: numbers by value, before names in alphabetical order."""
    # Python reads no longer numbers from text.
    number = len(value) < MOST_DIGITS and value.removeprefix("-").isdecimal()
    return not number, int(value) if number else 0, value


def unseen(
    rows: dict[str, list[Row]],
    places: dict[str, list[str]],
    what: str,
    names_of: NamesOf,
    trained: tuple[str, ...],
    data: DataConfig,
) -> Iterator[str]:
    """Yield the problem of each split with names that are not among `trained`, those of the training rows."""
    for split in rows:
        others = [name for name in _values(rows[split], names_of) if name not in trained]
        if others:
            first = next(
                at for at, row in zip(places[split], rows[split], strict=True) if {*names_of(row)} - {*trained}
            )
            yield (
                f"{first}: {what}s {', '.join(map(repr, others[:5]))} do not occur in the training split, {data.train},"
                f" which has {', '.join(map(repr, trained[:20]))}"
            )


def _first_places(rows: dict[str, list[Row]], places: dict[str, list[str]], names_of: NamesOf) -> dict[str, str]:
    """Return the place of the first row with each name."""
    found: dict[str, str] = {}
    for split in rows:
        for row, place in zip(rows[split], places[split], strict=True):
            for name in names_of(row):
                found.setdefault(name, place)
    return found


def _alike(names: Iterable[str], key: Callable[[str], str]) -> Iterator[tuple[str, str]]:
    """Yield pairs of names with the same key: the first one and another."""
    firsts: dict[str, str] = {}
    for name in names:
        first = firsts.setdefault(key(name), name)
        if first != name:
            yield first, name


def _spaced(what: str, places: dict[str, str]) -> Iterator[str]:
    for first, name in islice(_alike(places, str.strip), MOST_PROBLEMS_PER_FILE):
        yield (
            f"{places[name]}: {what} {name!r} differs from {first!r} in {places[first]} only by surrounding spaces:"
            " remove the spaces"
        )


def _cased(what: str, places: dict[str, str]) -> Iterator[str]:
    for first, name in islice(_alike(places, lambda name: name.strip().casefold()), MOST_PROBLEMS_PER_FILE):
        yield (
            f"{what}s {first!r} ({places[first]}) and {name!r} ({places[name]}) differ only by letter case or spaces"
            " and are separate: give them one spelling if they are the same"
        )


def _too_few(data: DataConfig, labels: Sequence[str], domains: Sequence[str]) -> Iterator[str]:
    if data.max_train_rows is not None and data.max_train_rows < len(labels) + len(domains):
        named = [f"{len(values)} {what}" for values, what in ((labels, "labels"), (domains, "domains")) if values]
        yield f"data.max_train_rows: {data.max_train_rows} is too small: each of the {' and '.join(named)} needs a row"


def _drawn(rows: list[Row], count: int, labels_of: NamesOf) -> list[int]:
    """Return the sorted positions of `count` random rows, at least one of each label and each domain.

    The first rows would not do, because a file that is sorted by label starts with few labels.
    """
    order = list(range(len(rows)))
    Random("max_train_rows").shuffle(order)
    first = [
        {name: i for i in reversed(order) for name in names_of(rows[i])}.values()
        for names_of in (labels_of, domains_of)
    ]
    chosen = dict.fromkeys([*chain.from_iterable(first), *order])
    return sorted(list(chosen)[:count])


# Reading

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


# Checking


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


def _leaks(rows: dict[str, list[Row]], task: type[Task]) -> Iterator[str]:
    """Yield a warning for each pair of splits with common inputs, which make all scores too good."""
    inputs = {split: {json.dumps(task.input_of(row)) for row in rows[split]} for split in SPLITS}
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        both = len(inputs[first] & inputs[second])
        if both:
            inputs_occur = "1 input occurs" if both == 1 else f"{both} inputs occur"
            yield f"{inputs_occur} in both {first} and {second}: the scores will be too optimistic"
