"""Loading and checking of the rows of a data set; all problems are found before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from random import Random
from typing import Any

from autopeft.evaluators.data.losses import Encoded, Unread
from autopeft.evaluators.data.reading import MOST_PROBLEMS_PER_FILE, read_split
from autopeft.evaluators.errors import DataError
from autopeft.evaluators.rows import DataConfig, Row
from autopeft.evaluators.tasks import TASKS, Task
from autopeft.search_space.spelling import did_you_mean

SPLITS = ("train", "validation", "test")
#: The splits of the retained rows, by the split with which they are scored.
RETAINED = {"validation": "retained", "test": "retained_test"}
#: Longer names of labels are sorted as texts, even if they are numbers.
MOST_DIGITS = 1000


@dataclass(frozen=True, slots=True)
class Splits:
    """Rows with the canonical fields of their task.

    `labels` (for classification) and `domains` (if the rows have them) are sorted, numbers by value. `warnings`: texts
    about permitted but questionable rows, such as inputs in two splits. `places`: by split, the file and line of each
    row, for messages. `unread`: by column that no task reads and that has a part of what a row says, what to do with
    it and the number of its rows by split. `encoded`: the rows as `encode_splits` returned them, if it did. `retained`,
    `retained_test`: see `data/retained.py`; empty where nothing is retained. `documents`: by metric, those of its task
    of lm-eval, as in `harness/documents.py`.
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
    documents: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

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
    for split, most in _most_rows(data).items():
        if most is None:
            continue
        drawn = _drawn(rows[split], most, kind.labels_of)
        rows[split] = [rows[split][i] for i in drawn]
        places[split] = [places[split][i] for i in drawn]
        left[split] = [left[split][i] for i in drawn]
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


def _most_rows(data: DataConfig) -> dict[str, int | None]:
    return {"train": data.max_train_rows, "validation": data.max_eval_rows, "test": data.max_eval_rows}


def _too_few(data: DataConfig, labels: Sequence[str], domains: Sequence[str]) -> Iterator[str]:
    named = [f"{len(values)} {what}" for values, what in ((labels, "labels"), (domains, "domains")) if values]
    for name in ("max_train_rows", "max_eval_rows"):
        most = getattr(data, name)
        if most is not None and most < len(labels) + len(domains):
            yield f"data.{name}: {most} is too small: each of the {' and '.join(named)} needs a row"


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


def _leaks(rows: dict[str, list[Row]], task: type[Task]) -> Iterator[str]:
    """Yield a warning for each pair of splits with common inputs, which make all scores too good."""
    inputs = {split: {json.dumps(task.input_of(row)) for row in rows[split]} for split in SPLITS}
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        both = len(inputs[first] & inputs[second])
        if both:
            inputs_occur = "1 input occurs" if both == 1 else f"{both} inputs occur"
            yield f"{inputs_occur} in both {first} and {second}: the scores will be too optimistic"
