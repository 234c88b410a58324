"""URLs of databases and tracking stores: where they are, and how they may be shown."""

from __future__ import annotations

import re
from pathlib import Path

#: `user:password@` of a server, by the rule of URLs: neither part has a slash.
_OF_SERVER = re.compile(r"(?<=://)([^/:]*):([^/]*)@")
#: The same of a database, by SQLAlchemy's rule: a password may have slashes.
_OF_DATABASE = re.compile(r"(?<=://)([^/:@]*):([^@]*)@")
_IN_QUERY = re.compile(r"(?<=[?&])(password|passwd|pwd|odbc_connect)=[^&]*", re.IGNORECASE)
#: Schemes whose path is a file.
_FILES = re.compile(r"(sqlite(?:\+\w+)?:///)(?!file:)(.+)|(file:)(?!/)(.+)")


def without_password(text: str) -> str:
    """Return a URL, or a text with one, with stars for its password: for messages, logs and reports."""
    rule = _OF_SERVER if re.search(r"https?://", text, re.IGNORECASE) else _OF_DATABASE
    return _IN_QUERY.sub(r"\1=***", rule.sub(r"\1:***@", text))


def located(uri: str, folder: Path) -> str:
    """Return a URI whose path counts from `folder` if it is relative: an SQLite file, `file:` or a path alone."""
    found = _FILES.fullmatch(uri)
    if found is not None:
        scheme, path = (found[1], found[2]) if found[1] else (found[3], found[4])
        return f"{scheme}{folder / Path(path).expanduser()}"
    return uri if ":" in uri else str(folder / Path(uri).expanduser())


def keeps_nothing(url: str) -> bool:
    """Return whether an SQLite database is in memory."""
    scheme, _, rest = url.partition("://")
    path, _, query = rest.partition("?")
    in_memory = path.lstrip("/") in ("", ":memory:", "file::memory:") or "mode=memory" in query.split("&")
    return scheme.split("+")[0] == "sqlite" and in_memory
