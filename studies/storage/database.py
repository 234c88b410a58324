"""The database of a ledger: opened against races, read record by record, with errors that say what to do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import optuna
import sqlalchemy.exc
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from autopeft.studies.errors import ConfigurationError, UnusableEnvironmentError
from autopeft.studies.urls import without_password

#: What to do after an error of the disk or of the database.
GO_ON = "finished trials are safe, and `autopeft resume` goes on once this is mended"


def connect(url: str) -> optuna.storages.RDBStorage:
    """Open a database. Raises ConfigurationError for what is no URL of one, and UnusableEnvironmentError."""
    try:
        return _opened(url)
    except (sqlalchemy.exc.ArgumentError, ImportError, ValueError) as error:
        shown = without_password(url)
        said = str(error).splitlines()[0].replace(url, shown)
        raise ConfigurationError(f"storage {shown!r}: {said}") from error
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, RuntimeError) as error:
        raise UnusableEnvironmentError(
            f"the ledger {without_password(url)} cannot be used: {_reason(error)}"
        ) from error


def _opened(url: str, tries: int = 3) -> optuna.storages.RDBStorage:
    """Connect to the database, again after a failure.

    Two processes that open a new database at once (`run`, and `status` beside it) both try to create its tables. The
    slower one fails in one of several ways and finds the tables at the next attempt.
    """
    try:
        return optuna.storages.RDBStorage(url)
    except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.OperationalError):
        if tries == 1:
            raise
        time.sleep(0.2)
        return _opened(url, tries - 1)


def names_in(storage: optuna.storages.RDBStorage, url: str) -> list[str]:
    """Return the names of all studies, those of other programs included. Raises UnusableEnvironmentError."""
    with readable_errors(url, "read"):
        return optuna.get_all_study_names(storage)


@contextmanager
def readable_errors(url: str, what: str) -> Iterator[None]:
    """Raise UnusableEnvironmentError with the database's message: a full disk, a broken file, a server that is gone."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise UnusableEnvironmentError(
            f"the ledger {without_password(url)} cannot be {what}: {_reason(error)}; {GO_ON}"
        ) from error


def _reason(error: BaseException) -> str:
    """Return the database's message from below the layers of libraries."""
    while getattr(error, "orig", None) is None and error.__cause__ is not None:
        error = error.__cause__
    return str(getattr(error, "orig", None) or error).splitlines()[0]


def one_by_one(storage: BaseStorage, study_id: int) -> Iterator[FrozenTrial | None]:
    """Yield the trials of a study by their numbers; None for those whose records are no JSON."""
    for number in count():
        try:
            trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
        except KeyError:
            return
        try:
            yield storage.get_trial(trial_id)
        except ValueError:
            yield None
