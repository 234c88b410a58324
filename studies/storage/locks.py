"""Locks against a second process on the same results, and the note whose results a folder holds."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sqlalchemy import make_url

from autopeft.evaluators.atomic import atomic_write_text
from autopeft.search_space.architecture import digest
from autopeft.studies.errors import ConfigurationError, UnusableEnvironmentError

#: In the output folder: the lock, and the identity of the study whose results are there.
LOCK_FILE, OWNER_FILE = ".lock", ".study"
#: `is_held` holds a lock for a moment, and a study that starts in that moment waits.
TIMEOUT_S = 0.5


def lock_paths(output_folder: Path, storage_url: str, study: str) -> list[Path]:
    """Return the lock files of a study: of its output folder, and of the study in its storage.

    The latter is beside the database. For a server it is in the folder for temporary files: it excludes processes of
    this account on this machine that name the server alike.
    """
    url = make_url(storage_url)
    if not url.drivername.startswith("sqlite"):
        name = digest([url.host, url.port, url.database, sorted(map(str, url.query.items()))])
        beside = Path(tempfile.gettempdir()) / f"autopeft-{os.getuid()}-{name}.{study}.lock"
    else:
        database = Path(os.path.realpath((url.database or "").removeprefix("file:")))
        beside = database.with_name(f".{database.name}.{study}.lock")
    return [output_folder / LOCK_FILE, *([beside] if beside.parent.is_dir() else [])]


@contextmanager
def locked(output_folder: Path, storage_url: str, study: str) -> Iterator[None]:
    """Hold the locks. Raises ConfigurationError if another process holds one, UnusableEnvironmentError on the disk."""
    from filelock import FileLock, Timeout

    with ExitStack() as held:
        for path in lock_paths(output_folder, storage_url, study):
            lock = FileLock(path)
            try:
                lock.acquire(timeout=TIMEOUT_S)
            except Timeout:
                raise ConfigurationError(
                    f"{output_folder}: another process is running this study, or one with the same output folder: wait"
                    " until it ends"
                ) from None
            except OSError as error:
                raise UnusableEnvironmentError(f"{path}: cannot be locked: {error.strerror}") from error
            held.callback(lock.release)
        yield


def is_held(lock: Path) -> bool:
    """Return whether a process holds a lock; True where the file system cannot tell.

    It requests a shared lock on the file, opened for reading, and releases it at once: it neither creates nor writes
    the file, and two calls at the same moment do not meet each other.
    """
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def check_owner(output_folder: Path, study_id: str | None) -> None:
    """Raise ConfigurationError if the folder holds another study's results. `study_id`: None for a new study.

    Two studies in one storage may have one output folder by mistake, and would overwrite each other's weights.
    """
    note = output_folder / OWNER_FILE
    if note.is_file() and note.read_text(encoding="utf-8") != study_id:
        raise ConfigurationError(
            f"{output_folder} holds the results of another study, whose identity is in {OWNER_FILE}: set output to"
            " another folder, or delete this one to begin anew"
        )


def claim(output_folder: Path, study_id: str) -> None:
    """Note that the folder holds a study's results."""
    atomic_write_text(output_folder / OWNER_FILE, study_id)
