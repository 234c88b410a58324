"""Rows of a data set: their source, the names of their columns, and the reading and checking of single fields."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

EMBEDDED = "embedded"
EMBEDDED_DOMAINS = "embedded-domains"
EMBEDDED_FUNCTIONS = "embedded-functions"
#: Retained rows alone: no split of a task.
EMBEDDED_PROSE = "embedded-prose"
#: The packages that hold the files of the embedded sources of a task's rows.
EMBEDDED_IN = {
    EMBEDDED: "autopeft.evaluators.data.topics",
    EMBEDDED_DOMAINS: "autopeft.evaluators.data.domains",
    EMBEDDED_FUNCTIONS: "autopeft.evaluators.data.functions",
}
FILES = "files"

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The source of the rows and the names of their fields.

    `source`: a name of `EMBEDDED_IN`, "files" or the id of a hub data set.
    `train`, `validation`, `test`: files (JSONL, an array in JSON, CSV, Parquet; relative to `folder`) or split names on
    the hub.
    `text_pair`: the field of a second text that is read together with the first, or None.
    `labels`: the field of a list of labels, in place of `label`; it makes the rows multi-label. This is a setting and
    not inferred from the rows, because a list in a single row by mistake must raise an error and not change the loss.
    `domain`: the field with the data set or task of a row, for rows from several.
    `messages`: the field of a conversation. `system`: the field of its system prompt, or None. `train_on_turns`: the
    assistant's turns of a conversation that have a loss, all of them or the last.
    `tests`: the field with the tests of a program, or None.
    `max_train_rows`: the size of a random training subset, which is always the same and includes every label and every
    domain. `max_eval_rows`: the same of the validation rows, and of the test rows.
    """

    source: str = EMBEDDED
    revision: str | None = None
    train: str = "train"
    validation: str = "validation"
    test: str = "test"
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    labels: str | None = None
    domain: str | None = None
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    system: str | None = None
    train_on_turns: Literal["all", "last"] = "all"
    tests: str | None = None
    max_length: int = 64
    max_train_rows: int | None = None
    max_eval_rows: int | None = None
    folder: Path = Path(".")

    @property
    def domain_field(self) -> str | None:
        """`domain`, or the domain field of the embedded data with domains."""
        return self.domain or ("domain" if self.source == EMBEDDED_DOMAINS else None)


class MissingFieldError(ValueError):
    """A row lacks a field, or the field is empty: rows reach a task without their empty fields."""

    def __init__(self, name: str, row: Row) -> None:
        self.name = name
        super().__init__(f"field {name!r} is missing; this row has {field_names(row)}")


def field_names(row: Row) -> str:
    """Return the names of a row's fields as a text for messages."""
    return ", ".join(map(repr, row)) or "none"


def value_of(row: Row, name: str) -> Any:
    """Return the value of a field. Raises MissingFieldError, a ValueError."""
    if name not in row:
        raise MissingFieldError(name, row)
    return row[name]


def text_of(row: Row, name: str) -> str:
    """Return the text in a field. Raises ValueError for other types and for blank texts."""
    value = value_of(row, name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field {name!r} must be a non-empty text, got {value!r:.40}")
    return value


def name_of(row: Row, name: str, what: str) -> str:
    """Return the name of a label or domain in a field. `what` names its kind in errors. Raises ValueError."""
    found = _as_name(value := value_of(row, name))
    if found is None:
        raise ValueError(f"field {name!r} must be a {what} (a text or a whole number), got {value!r:.40}")
    return found


def names_of(row: Row, name: str, what: str) -> list[str]:
    """Return the distinct names in the list of a field, which may be empty. Raises ValueError."""
    values = value_of(row, name)
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"field {name!r} must be a list of {what}s, got {values!r:.40}")
    found = dict.fromkeys(map(_as_name, values))
    if None in found:
        raise ValueError(f"field {name!r} must be a list of {what}s (texts or whole numbers), got {values!r:.40}")
    return [each for each in found if each is not None]


def check_values(row: Row) -> None:
    """Raise ValueError for what JSON can hold but nothing else: half of a surrogate pair in a text, or deep nesting."""
    for text in _texts_in(row):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half, before = text[error.start], text[max(error.start - 10, 0) : error.start]
            raise ValueError(
                f"has half of a character, {half!r} after {before!r}: a text was cut inside an emoji or the like;"
                " remove the half or restore the character"
            ) from None


#: Lists and objects inside each other in a row, such as those of a tool's JSON schema.
MOST_DEPTH = 50


def _texts_in(value: Any, depth: int = 0) -> Iterator[str]:
    if depth > MOST_DEPTH:
        raise ValueError(f"has values that are nested deeper than {MOST_DEPTH}")
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(entry, depth + 1)


def named_classes(feature: Any, value: Any) -> Any:
    """Replace class numbers by class names if `feature`, a column's type in `datasets`, numbers its classes.

    A number becomes a name, or None if it is -1 (missing); a list of numbers becomes a list of names. Other values are
    returned unchanged.
    """
    if hasattr(feature, "int2str"):
        return None if value in (None, -1) else feature.int2str(value)
    several: Any = getattr(feature, "feature", None)
    if hasattr(several, "int2str") and value is not None:
        return [several.int2str(number) for number in value]
    return value


def _as_name(value: Any) -> str | None:
    if not isinstance(value, (str, int, float)) or value != value or not str(value).strip():
        return None
    # A column of whole numbers becomes a column of floats if a value is missing.
    return str(int(value) if isinstance(value, float) and math.isfinite(value) and value == int(value) else value)
