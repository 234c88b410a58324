"""Rows of a data set and their checks: every problem is found before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

EMBEDDED = "embedded"
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
    """Where the rows are and what their fields are called. `source`: "embedded", "files" or a data set of the hub.

    `train`, `validation`, `test`: files (JSONL, CSV, Parquet; relative to `folder`), or names of the hub's splits.
    """

    source: str = EMBEDDED
    revision: str | None = None
    train: str = "train"
    validation: str = "validation"
    test: str = "test"
    text: str = "text"
    label: str = "label"
    prompt: str = "prompt"
    completion: str = "completion"
    max_length: int = 64
    max_train_rows: int | None = None
    folder: Path = Path(".")


@dataclass(frozen=True, slots=True)
class Splits:
    """Rows with the canonical fields of their task; `labels` for classification, in sorted order.

    `warnings`: what is legal but worth knowing (texts that stand in two splits).
    """

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    labels: tuple[str, ...] | None
    warnings: tuple[str, ...] = ()


def load_splits(data: DataSettings, task: str) -> Splits:
    """All three splits, checked. Raises DataError with every problem."""
    problems: list[str] = []
    rows: dict[str, list[Row]] = {}
    for split in SPLITS:
        name = getattr(data, split)
        try:
            numbered = list(_read(data, name, split))
        except (OSError, ValueError) as error:
            problems.append(f"{name}: {error}")
            continue
        if not numbered:
            problems.append(f"{name}: the {split} split is empty")
            continue
        rows[split], wrong = _canonical(numbered, data, task)
        problems += [f"{name}{place}: {what}" for place, what in wrong[:MOST_PROBLEMS_PER_FILE]]
        if len(wrong) > MOST_PROBLEMS_PER_FILE:
            problems.append(f"{name}: {len(wrong) - MOST_PROBLEMS_PER_FILE} more rows like these")
    if problems:
        raise DataError(problems)
    labels = None
    if task == "classification":
        labels = tuple(sorted({row["label"] for row in rows["train"]}))
        for split in ("validation", "test"):
            unseen = sorted({row["label"] for row in rows[split]} - set(labels))
            if unseen:
                problems.append(
                    f"{getattr(data, split)}: labels {', '.join(map(repr, unseen[:5]))} do not occur in the training"
                    f" split, which has {', '.join(map(repr, labels[:20]))}"
                )
        if len(labels) < 2:
            problems.append(f"{data.train}: only one label, {labels[0]!r}: there is nothing to classify")
    if problems:
        raise DataError(problems)
    if data.max_train_rows is not None:
        rows["train"] = rows["train"][: data.max_train_rows]
    return Splits(rows["train"], rows["validation"], rows["test"], labels, tuple(_leaks(rows)))


def _read(data: DataSettings, name: str, split: str) -> Iterator[tuple[str, Row]]:
    """Rows with the place to name in a message (":12" for line 12)."""
    if data.source == EMBEDDED:
        path = files("autopeft.evaluators.topics") / f"{split}.jsonl"
        yield from _jsonl(path.read_text(encoding="utf-8"))
    elif data.source == FILES:
        path = Path(data.folder) / Path(name).expanduser()
        if not path.is_file():
            raise ValueError("there is no such file")
        yield from _file(path)
    else:
        yield from _hub(data, name)


def _file(path: Path) -> Iterator[tuple[str, Row]]:
    if path.suffix in (".jsonl", ".json"):
        yield from _jsonl(path.read_text(encoding="utf-8"))
        return
    import pandas

    if path.suffix == ".csv":
        frame = pandas.read_csv(path) if path.stat().st_size else pandas.DataFrame()
        first = 2  # the header is line 1
    elif path.suffix == ".parquet":
        frame, first = pandas.read_parquet(path), 1
    else:
        raise ValueError(f"files of type {path.suffix!r} are not read: use .jsonl, .csv or .parquet")
    frame = frame.astype(object).where(frame.notna(), None)
    for number, row in enumerate(frame.to_dict("records")):
        yield f":{number + first}", row


def _jsonl(text: str) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not a JSON object")
        yield f":{number}", row


def _hub(data: DataSettings, name: str) -> Iterator[tuple[str, Row]]:
    from datasets import ClassLabel, load_dataset

    try:
        rows = load_dataset(data.source, split=name, revision=data.revision)
    except Exception as error:  # the hub's client raises many kinds: connection, not found, gated, bad split
        raise ValueError(f"{data.source} could not be loaded: {str(error).splitlines()[0]}") from error
    feature = rows.features.get(data.label)
    for number, row in enumerate(rows):
        if isinstance(feature, ClassLabel):
            row[data.label] = feature.int2str(row[data.label])
        yield f"[{number}]", row


def _canonical(numbered: list[tuple[str, Row]], data: DataSettings, task: str) -> tuple[list[Row], list]:
    """Rows with canonical field names, and pairs of place and problem."""
    rows, wrong = [], []
    for place, row in numbered:
        try:
            rows.append(_classification_row(row, data) if task == "classification" else _causal_row(row, data))
        except ValueError as error:
            wrong.append((place, str(error)))
    return rows, wrong


def _field(row: Row, name: str) -> Any:
    if row.get(name) is None:
        raise ValueError(f"no field {name!r}; this row has {', '.join(map(repr, row)) or 'none'}")
    return row[name]


def _text(row: Row, name: str) -> str:
    value = _field(row, name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field {name!r} is not a text: {value!r:.40}")
    return value


def _classification_row(row: Row, data: DataSettings) -> Row:
    return {"text": _text(row, data.text), "label": str(_field(row, data.label))}


def _causal_row(row: Row, data: DataSettings) -> Row:
    """prompt + completion (loss on the completion), messages, or text (loss on everything), as TRL has them."""
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or len(messages) < 2 or messages[-1].get("role") != "assistant":
            raise ValueError("'messages' must be a list that ends with a message of the role 'assistant'")
        return {"messages": messages}
    if data.prompt in row or data.completion in row:
        return {"prompt": _text(row, data.prompt), "completion": _text(row, data.completion)}
    if data.text in row:
        return {"text": _text(row, data.text)}
    raise ValueError(
        f"neither {data.prompt!r} and {data.completion!r}, nor 'messages', nor {data.text!r} among its fields:"
        f" {', '.join(map(repr, row)) or 'none'}"
    )


def _leaks(rows: dict[str, list[Row]]) -> Iterator[str]:
    """Inputs that stand in two splits flatter every candidate."""

    def inputs(split: str) -> set[str]:
        return {json.dumps(row.get("text") or row.get("prompt") or row.get("messages")) for row in rows[split]}

    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        both = len(inputs(first) & inputs(second))
        if both:
            yield f"{both} inputs stand in both {first} and {second}: the scores will be too good"
