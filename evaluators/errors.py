"""Errors in the user's model and data."""

from __future__ import annotations

from collections.abc import Sequence


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, or its name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class ModelError(ValueError):
    """A model that cannot be loaded; the message says why."""


class MissingPackageError(ModelError):
    """A model needs an optional package that is not installed; the message has the command that installs it."""


class DataError(ValueError):
    """All problems with the data, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))
