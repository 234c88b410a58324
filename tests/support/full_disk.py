"""A disk that fills up: after a number of writes, each further one fails, by files, folders and SQLite's statements."""

from __future__ import annotations

import errno
import os
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_STATEMENTS = ("INSERT", "UPDATE", "DELETE", "CREATE", "ALTER", "DROP")


class _Disk:
    """What is written while `watched`. `end`: the number of writes that succeed, or a part of the first that fails."""

    def __init__(self) -> None:
        self.watched, self.is_full = False, False
        self.end: int | str | None = None
        self.writes: list[str] = []

    def write(self, what: str, error: Exception) -> None:
        if not self.watched:
            return
        self.is_full |= self.end in what if isinstance(self.end, str) else self.end == len(self.writes)
        if self.is_full:
            raise error
        self.writes.append(what)

    def on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Handle an audit event of Python: every file that is opened for writing, and every new folder."""
        if not self.watched or not (
            (event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES) or event == "os.mkdir"
        ):
            return
        path = arguments[0]
        if isinstance(path, (str, os.PathLike)) and str(path).startswith(tempfile.gettempdir()):
            self.write(f"{event} {path}", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)))

    def on_statement(self, cursor: Any, statement: str, *arguments: Any) -> None:
        if statement.lstrip().upper().startswith(_STATEMENTS):
            self.write(statement[:60], sqlite3.OperationalError("database or disk is full"))


_DISK = _Disk()
sys.addaudithook(_DISK.on_event)  # it cannot be removed
sqlalchemy.event.listen(sqlalchemy.Engine, "do_execute", _DISK.on_statement)
sqlalchemy.event.listen(sqlalchemy.Engine, "do_executemany", _DISK.on_statement)


@contextmanager
def full_from(end: int | str | None) -> Iterator[list[str]]:
    """Let the disk be full from a write on, counted from 0, or the first with this part; yield those that succeed.

    None: it is never full.
    """
    _DISK.writes, _DISK.end, _DISK.is_full, _DISK.watched = [], end, False, True
    try:
        yield _DISK.writes
    finally:
        _DISK.watched = False
