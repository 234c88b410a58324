"""Suggestions for misspelt names, for every error message that can offer one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

#: More names than these are not listed.
MOST_LISTED = 20


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" if a known name is close, else the list of known names unless it is long."""
    names = sorted(known)
    close = get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if 0 < len(names) <= MOST_LISTED else ""
