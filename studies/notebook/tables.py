"""Tables in memory (data frames, data sets, lists of dicts) as files of the study."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from autopeft.evaluators.atomic import atomic_write_text
from autopeft.evaluators.rows import named_classes
from autopeft.studies.config.source import PlacedProblem

SPLITS = ("train", "validation", "test")
FOLDER = "data"


@dataclass(frozen=True, slots=True)
class Tables:
    """The contents of files by name, relative to the study's folder."""

    files: Mapping[str, str]
    warnings: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Write the files into a folder."""
        for name, text in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(path, text)

    def changed(self, folder: Path) -> list[str]:
        """Return the splits whose existing file in `folder` has other rows."""
        return [
            Path(name).stem
            for name, text in self.files.items()
            if (folder / name).is_file() and (folder / name).read_text(encoding="utf-8") != text
        ]


def is_table(value: Any) -> bool:
    """Return whether a value is a data frame, a data set or a sequence of rows."""
    rows = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    return rows or _is_frame(value) or _is_dataset(value)


def tables_of(
    given: Mapping[str, Any], problems: list[PlacedProblem], *, hold_out: bool
) -> tuple[Tables, dict[str, str]]:
    """Return the files of tables by split, and the settings that name them.

    `hold_out`: a random half of the validation rows becomes the test split, because scores on the rows that select
    candidates are biased.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    for split, table in given.items():
        rows[split] = []
        for position, row in enumerate(_rows(table)):
            if isinstance(row, Mapping):
                rows[split].append(_without_missing(row))
            else:
                problems.append(
                    (("data", split, position), f"must be a mapping of column names to values, got {row!r:.40}")
                )
                break
    warnings = []
    if hold_out and "validation" in rows:
        order = list(range(len(rows["validation"])))
        Random("test").shuffle(order)
        held_out = {*order[: len(order) // 2]}
        whole = rows["validation"]
        rows["test"] = [row for i, row in enumerate(whole) if i in held_out]
        rows["validation"] = [row for i, row in enumerate(whole) if i not in held_out]
        warnings.append(
            f"data: there are no test rows, so {len(held_out)} of the validation rows were set aside for the test"
        )
    files = {}
    for split, found in rows.items():
        try:
            files[f"{FOLDER}/{split}.jsonl"] = "".join(f"{_line(row)}\n" for row in found)
        except (TypeError, ValueError) as error:
            problems.append((("data", split), f"a value cannot be written as JSON: {error}"))
    return Tables(files, tuple(warnings)), {split: f"{FOLDER}/{split}.jsonl" for split in rows}


def _rows(table: Any) -> Iterator[Any]:
    if _is_frame(table):
        yield from table.to_dict("records")
        return
    # Data sets of the hub have class numbers in place of names.
    features = table.features if _is_dataset(table) else {}
    for row in table:
        if features and isinstance(row, Mapping):
            row = {**row, **{column: named_classes(feature, row[column]) for column, feature in features.items()}}
        yield row


def _is_frame(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "columns") and hasattr(value, "iloc")


def _is_dataset(value: Any) -> bool:
    return hasattr(value, "features") and hasattr(value, "column_names") and not isinstance(value, Mapping)


def _without_missing(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in row.items() if not _is_missing(value)}


def _is_missing(value: Any) -> bool:
    # NaN and pandas' NaT are not equal to themselves; the comparison of pandas' NA has no truth value.
    if value is None or isinstance(value, (str, list, tuple, dict)):
        return value is None
    try:
        return bool(value != value)
    except (TypeError, ValueError):
        return type(value).__name__ == "NAType"


def _line(row: Mapping[str, Any]) -> str:
    line = json.dumps(row, ensure_ascii=False, default=_plain)
    try:
        line.encode()
    except UnicodeEncodeError:  # half of a character, which the check of the rows reports with its row
        return json.dumps(row, default=_plain)
    return line


def _plain(value: Any) -> Any:
    for convert in ("tolist", "isoformat"):
        if hasattr(value, convert):
            return getattr(value, convert)()
    raise TypeError(f"{value!r:.60} of type {type(value).__name__}")
