"""Atomic writes of files and folders, by a rename; here because evaluators are the lowest layer that writes files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_IMODE
from uuid import uuid4


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file name beside `path`; rename that file to `path` when the block ends.

    A reader sees the old file or the new one, never a part; among concurrent writers, the last to finish wins. After
    an exception in the block, including KeyboardInterrupt, `path` is unchanged and the temporary file is removed. As
    with `open(path, "w")`, links are followed, and permissions come from the existing file or else from the umask. The
    data is not flushed to the disk: a power failure can leave a damaged file.
    """
    target = Path(os.path.realpath(path))
    temporary = _beside(target)
    try:
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
    not exist for a moment, because a rename cannot replace a folder that contains files.
    """
    temporary = _beside(folder)
    temporary.mkdir()
    try:
        yield temporary
        if not folder.exists():
            temporary.rename(folder)
            return
        aside = temporary.with_name(f"{temporary.name}.old")
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
    # The same folder is the same file system; a hidden name matches no pattern for results.
    return path.with_name(f".{path.name}.{uuid4().hex}")
