"""URLs of databases and servers, as they may be shown."""

from __future__ import annotations

import re

#: What stands between `user:` and `@host` in a URL.
_PASSWORD = re.compile(r"(?<=://)([^/@:]*):([^/@]*)@")


def without_password(url: str) -> str:
    """Return a URL with stars for its password, for messages, logs and reports."""
    return _PASSWORD.sub(r"\1:***@", url)
