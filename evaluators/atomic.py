"""Atomic writes of files and folders, by a rename, and errors of the disk in the words of every library that writes.

They are here because evaluators are the lowest layer that writes files.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from glob import escape
from pathlib import Path
from socket import gethostname
from stat import S_IMODE
from uuid import uuid4
from zlib import crc32

#: Errors of the disk itself: it is full, a quota or the largest size of a file is reached, it is broken or read-only.
_OF_THE_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})
#: The same in the words of libraries that raise other exceptions: safetensors, SQLite and those that wrap them.
_IN_WORDS = {
    **{os.strerror(number): number for number in _OF_THE_DISK},
    "database or disk is full": errno.ENOSPC,
    "disk I/O error": errno.EIO,
    "attempt to write a readonly database": errno.EROFS,
}

#: End of the name of a folder that is being replaced.
OLD = ".old"


def disk_error(error: BaseException) -> OSError | None:
    """Return the error of the disk that caused an exception; None if it has another cause.

    It is the fault of the environment: what failed by it succeeds once there is space.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _OF_THE_DISK:
            return cause
        for words, number in _IN_WORDS.items():
            if words in str(cause):
                return OSError(number, os.strerror(number))
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


@contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise every error of the disk in the block, whatever a library makes of it, as an OSError that names `path`."""
    try:
        yield
    except Exception as error:
        found = disk_error(error)
        if found is None:
            raise
        found.filename, found.filename2 = str(path), None
        if found is error:
            raise
        raise found from error


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file name beside `path`; rename that file to `path` when the block ends.

    A reader sees the old file or the new one, never a part; among concurrent writers, the last to finish wins. After
    an exception in the block, including KeyboardInterrupt, `path` is unchanged and the temporary file is removed. As
    with `open(path, "w")`, links are followed, and permissions come from the existing file or else from the umask. The
    data is not flushed to the disk: a power failure can leave a damaged file. Errors of the disk are raised as
    `disk_errors` raises them.
    """
    target = Path(os.path.realpath(path))
    temporary = _beside(target)
    try:
        with disk_errors(path):
            temporary.touch()
            mode = (target if target.exists() else temporary).stat().st_mode
            yield temporary
            temporary.chmod(S_IMODE(mode))  # safetensors creates files that only their owner can read
            os.replace(temporary, target)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` in UTF-8, as `atomic_write` does. Raises OSError."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `folder`; replace `folder` by it when the block ends.

    After an exception, `folder` is unchanged and the temporary folder is removed. Between two renames, `folder` does
    not exist for a moment, because a rename cannot replace a folder that contains files. Raises errors of the disk as
    `disk_errors` does.
    """
    temporary = _beside(folder)
    try:
        with disk_errors(folder):
            temporary.mkdir()
            yield temporary
            if not folder.exists():
                temporary.rename(folder)
                return
            aside = temporary.with_name(temporary.name + OLD)
            folder.rename(aside)
            try:
                temporary.rename(folder)
            except BaseException:
                aside.rename(folder)
                raise
            shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(path: Path) -> Path:
    """Return an unused name in the same folder, which is the same file system; hidden, it matches no pattern.

    What a killed process of this machine left there is removed; other writers of the same file keep theirs.
    """
    machine = _machine()
    for left in path.parent.glob(f".{escape(path.name)}.{machine}-*"):
        owner = left.name.removeprefix(f".{path.name}.{machine}-").partition("-")[0]
        if not owner.isdecimal() or _is_alive(int(owner)):
            continue
        with suppress(OSError):  # another writer was faster, or it belongs to another user
            if left.name.endswith(OLD) and not path.exists():  # killed between the two renames
                left.rename(path)
            elif left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()
    return path.with_name(f".{path.name}.{machine}-{os.getpid()}-{uuid4().hex[:12]}")


@cache
def _machine() -> str:
    """Return a name for all processes that see the same numbers of processes, in eight characters."""
    namespace = ""
    with suppress(OSError):  # containers with one host name may have numbers of their own
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{crc32(f'{gethostname()} {namespace}'.encode()):08x}"


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # there, this would interrupt the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user, or not ours
        return True
    return True
