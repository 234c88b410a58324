"""The tracking store: opened for the first time, artifacts kept with the study, and errors that last told apart."""

from __future__ import annotations

import errno
import logging
import os
import shlex
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from autopeft.evaluators.atomic import atomic_write, disk_error
from autopeft.studies.urls import without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from sqlalchemy import Engine

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
#: Another process that makes the same database takes seconds, on a busy machine more.
LOCK_TIMEOUT_S = 120.0
#: MLflow's codes of errors that come again at every attempt, until a person does something.
_LASTING_CODES = frozenset(
    {"BAD_REQUEST", "INVALID_PARAMETER_VALUE", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED",
     "ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED"}
)  # fmt: skip
#: The same without a code of their own: another version's database, another kind of file, the folder store, a server
#: that is no MLflow.
_LASTING_WORDS = (
    "database schema", "locate revision", "not a database", "unable to open database file", "maintenance mode",
    "valid JSON",
)  # fmt: skip
_LASTING_ERRNOS = frozenset({errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM})


class DeletedExperimentError(Exception):
    """The experiment was deleted in MLflow, which accepts no runs in it and no other experiment of its name."""


def lasting(error: BaseException) -> str | None:
    """Return the reason of an error that comes again until a person does something; None for one of the moment."""
    from requests.exceptions import InvalidSchema, InvalidURL
    from sqlalchemy.exc import ArgumentError

    if disk_error(error) is not None:
        return None
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        if isinstance(cause, ModuleNotFoundError):
            return f"the package {cause.name} is missing"
        if (
            isinstance(cause, (DeletedExperimentError, ArgumentError, InvalidURL, InvalidSchema))
            or getattr(cause, "error_code", None) in _LASTING_CODES
            or any(words in text for words in _LASTING_WORDS)
            or (isinstance(cause, OSError) and cause.errno in _LASTING_ERRNOS)
        ):
            return without_password(text.strip().splitlines()[0])
        cause = cause.__cause__ or cause.__context__
    return None


def reason(error: BaseException, uri: str) -> str:
    """Return the first line of the innermost error, which MLflow wraps in pages of text. `uri`: that of the store."""
    if (of_the_disk := disk_error(error)) is not None:
        return f"{of_the_disk.filename or without_password(uri)}: {of_the_disk.strerror}"
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    lines = str(error).strip().splitlines()
    return without_password((lines[0] if lines else type(error).__name__)[:200])


def connect(uri: str, experiment: str, artifacts: Path) -> tuple[MlflowClient, str]:
    """Return a client and the id of the experiment, which is made if it is missing.

    `artifacts`: the folder of the study's artifacts, unless a server stores them. Raises DeletedExperimentError and the
    many errors of MLflow and of databases.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    with _opening(uri):
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            # Without a server, MLflow would put artifacts into ./mlruns; that folder changes its own default store.
            location = None if uri.startswith("http") else artifacts.as_uri()
            # For an experiment of this kind the UI opens the table of runs.
            tags = {"mlflow.experimentKind": "custom_model_development"}
            try:
                return client, client.create_experiment(experiment, artifact_location=location, tags=tags)
            except MlflowException:  # by another study in the meantime, on a server
                found = client.get_experiment_by_name(experiment)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            raise DeletedExperimentError(
                f"tracking.experiment: {experiment!r} was deleted in MLflow:"
                f" `MLFLOW_TRACKING_URI={shlex.quote(without_password(uri))} mlflow experiments restore"
                f" --experiment-id {found.experiment_id}` brings it back, or set tracking.experiment to another name"
            )
        return client, found.experiment_id


@contextmanager
def _opening(uri: str) -> Iterator[None]:
    """Make a database file whole before MLflow opens it, in one process at a time.

    MLflow makes the tables in place, in dozens of steps, and refuses for good what a killed process left of them. So
    the database is made aside. What holds nothing yet is made anew.
    """
    path = _database_file(uri)
    if path is None:
        _check_reachable(uri)
        yield
        return
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_TIMEOUT_S):
        if _holds_nothing(path):
            with atomic_write(path) as temporary:
                _make(temporary)
        yield


def _database_file(uri: str) -> Path | None:
    import sqlalchemy

    if not uri.startswith("sqlite"):
        return None
    database = sqlalchemy.make_url(uri).database or ""
    return None if database.startswith("file:") else Path(database)


def _holds_nothing(path: Path) -> bool:
    """Return whether a database has no experiment, as all have that MLflow has opened once, and nothing of others."""
    # Opened for writing, SQLite first undoes what a killed process began, so that no journal is left for another file.
    with closing(sqlite3.connect(path, timeout=LOCK_TIMEOUT_S)) as database:
        found = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        tables = {name for (name,) in found if not name.startswith(("alembic_", "sqlite_"))}
        if "experiments" in tables:
            tables.discard("workspaces")  # MLflow's tables begin with a row there, before there is any experiment
        return not any(database.execute(f'SELECT 1 FROM "{name}" LIMIT 1').fetchone() for name in tables)


def _make(path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(f"sqlite:///{path}", "./mlruns")  # the latter is MLflow's default for its own experiment
    store.engine.dispose()


def _engine(uri: str) -> Engine:
    import sqlalchemy

    options: dict[str, Any] = {}
    if uri.startswith(("postgresql", "mysql")):
        options["connect_args"] = {"connect_timeout": 2}
    return sqlalchemy.create_engine(sqlalchemy.make_url(uri), poolclass=sqlalchemy.NullPool, **options)


def _check_reachable(uri: str) -> None:
    """Raise at once if a database cannot be opened, which MLflow would try for almost two minutes."""
    if uri.startswith(DATABASES):
        _engine(uri).connect().close()


def keep_artifacts(uri: str, artifacts: Path, runs: Iterable[Run]) -> None:
    """Let the artifacts of a study's runs lie in its folder `artifacts`, where it is now.

    MLflow remembers absolute paths: those of a study that was moved, or of the study that made a shared experiment. A
    run whose artifacts are elsewhere, and not here, keeps its place. For databases; servers have places of their own.
    """
    import sqlalchemy
    from mlflow.tracking._tracking_service import utils

    if not uri.startswith(DATABASES):
        return
    moved = []
    for run in runs:
        here, remembered = artifacts / run.info.run_id / "artifacts", _local(run.info.artifact_uri)
        if remembered is not None and remembered != here and (here.is_dir() or not remembered.is_dir()):
            moved.append({"place": here.as_uri(), "run": run.info.run_id})
    if moved:
        with _engine(uri).begin() as database:
            database.execute(sqlalchemy.text("UPDATE runs SET artifact_uri = :place WHERE run_uuid = :run"), moved)
        for row in moved:
            utils._artifact_repos_cache.pop(row["run"], None)


def _local(uri: str) -> Path | None:
    """Return the path of a `file:` URI or of a path alone; None for places elsewhere, such as object stores."""
    parsed = urlparse(uri)
    return Path(url2pathname(parsed.path)) if parsed.scheme in ("", "file") else None


@contextmanager
def mlflow_settings() -> Iterator[None]:
    """Keep MLflow from sending telemetry, printing to stdout and logging errors that it also raises."""
    with environment(MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT="true"):
        import mlflow  # noqa: F401  (it sets the level of its logger as it is imported)

        logger = logging.getLogger("mlflow")
        level = logger.level
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set environment variables inside the block, except those that the user has set."""
    mine = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)
