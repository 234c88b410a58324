"""Suggestions for misspelt names, for every error message that can offer one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

#: Longer lists of known names are left out of a message.
MAX_LISTED = 20


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for a close name, else the known names unless there are many."""
    names = sorted(known)
    close = get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if 0 < len(names) <= MAX_LISTED else ""
