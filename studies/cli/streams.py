"""Output that fits its stream: signs that it cannot encode are replaced, and a closed pipe swallows the rest."""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from typing_extensions import Buffer, override

#: What stands for the signs of reports where the encoding lacks them; all others are escaped: é becomes \xe9.
SIGNS = {"±": "+/-", "–": "-", "…": "...", "µ": "u", "≤": "<=", "≥": ">=", "×": "x", "→": "->", "━": "-", "•": "*"}
REPLACED = "autopeft.signs"


def _replaced(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    sign = SIGNS.get(error.object[error.start])
    if sign is None:
        return codecs.backslashreplace_errors(
            UnicodeEncodeError(error.encoding, error.object, error.start, error.start + 1, error.reason)
        )
    return sign, error.start + 1


codecs.register_error(REPLACED, _replaced)


class _Unbroken(io.RawIOBase):
    """A raw stream that swallows what is written after its reader has gone: `run | head` must not end the study.

    Another failure, such as a full disk, raises OSError once.
    """

    def __init__(self, raw: io.RawIOBase) -> None:
        self.raw = raw
        self.broken = False

    @override
    def write(self, data: Buffer, /) -> int | None:
        if self.broken:
            return memoryview(data).nbytes
        try:
            return self.raw.write(data)
        except OSError as error:
            self.broken = True
            # Windows says EINVAL.
            if error.errno != errno.EPIPE and not (os.name == "nt" and error.errno == errno.EINVAL):
                raise
            return memoryview(data).nbytes

    @override
    def writable(self) -> bool:
        return True

    @override
    def fileno(self) -> int:
        return self.raw.fileno()

    @override
    def isatty(self) -> bool:
        return self.raw.isatty()


@contextmanager
def adapted_streams() -> Iterator[None]:
    """Replace `sys.stdout` and `sys.stderr` by streams that take every text, also where their reader has gone.

    A stream that was closed before the start is replaced by one that swallows all. Streams that are not files, such as
    those of tests and notebooks, stay as they are. Raises OSError if the last text cannot be written.
    """
    before = sys.stdout, sys.stderr
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        sys.stdout, sys.stderr = (_adapted(stream or nowhere) for stream in before)
        try:
            yield
        finally:
            mine = sys.stdout, sys.stderr
            sys.stdout, sys.stderr = before
            for stream in mine:
                stream.flush()


def _adapted(stream: TextIO) -> TextIO:
    raw = getattr(getattr(stream, "buffer", None), "raw", None) or getattr(stream, "buffer", None)
    if not isinstance(stream, io.TextIOWrapper) or not isinstance(raw, io.RawIOBase):
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Unbroken(raw)),
        encoding=stream.encoding,
        errors=REPLACED,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def echo(text: str = "", *, err: bool = False) -> None:
    """Print a line on stdout, or on stderr.

    Not `typer.echo`: it writes UTF-8 where the stream is ASCII.
    """
    print(text, file=sys.stderr if err else sys.stdout, flush=True)


def is_unicode() -> bool:
    """Return whether stdout takes every character."""
    return (sys.stdout.encoding or "").lower().replace("_", "-").startswith("utf")


def on_stdout(text: str) -> str:
    """Return a text as stdout shows it, for layouts that count its characters."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, REPLACED).decode(encoding)


def printable(text: str) -> str:
    """Return a text of a row or of a model without signs that a terminal obeys."""
    return "".join(sign if sign.isprintable() or sign == "\n" else repr(sign)[1:-1] for sign in text)
