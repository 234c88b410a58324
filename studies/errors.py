"""Errors that a user can repair: a clear text on stderr, no traceback, an exit code for each kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A failure at run time; its text says how to repair it."""

    exit_code = 1


class ConfigurationError(UserError):
    """A study file, an option or an argument is wrong."""

    exit_code = 2


class NoFeasibleCandidateError(UserError):
    """No candidate of the space, or none that was evaluated, meets the constraints."""

    exit_code = 3


class RepeatedError(UserError):
    """Trainings of a study fail with the same error, which is thus not the fault of single candidates."""


def cause(error: BaseException) -> str:
    """Return an exception in one line, for a message about what it kept from being made."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = next(iter(str(error).strip().splitlines()), "")
    return text if isinstance(error, UserError) and text else f"{type(error).__name__}: {text}".rstrip(": ")


class UnusableEnvironmentError(UserError):
    """This machine lacks something that the command needs: a package, a GPU, a writable folder."""

    exit_code = 4


@contextmanager
def file_errors(then: str = "") -> Iterator[None]:
    """Turn an OSError into an UnusableEnvironmentError that names the file. `then`: what is safe, and how to go on."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise UnusableEnvironmentError(f"{where}{error.strerror or error}{then and f'; {then}'}") from error
