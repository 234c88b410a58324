"""Patterns of peft's configurations, anchored as peft anchors them; others write them, so matching has a time limit.

peft 0.21: `get_pattern_key` of `peft/utils/other.py`, `check_target_module_exists` of `peft/tuners/tuners_utils.py`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from math import prod
from time import thread_time
from typing import Any

#: Limits of one pattern: its characters, and the product of its counts such as {2,8}, as many copies as a match needs.
MOST_CHARACTERS = 1000
MOST_COPIES = 1000
#: Time of the processor for all patterns of one configuration, in seconds; plain ones do not count.
MATCHING_S = 0.5
_PLAIN = re.compile(r"[\w.]{1,300}")


class PatternError(ValueError):
    """A pattern is no regular expression, or takes too long."""


class Patterns:
    """Matching of patterns within `MATCHING_S` from the first to the last."""

    def __init__(self) -> None:
        self._left_s = MATCHING_S
        self._checked: set[str] = set()

    def value(self, pattern: Mapping[str, Any], path: str, default: Any) -> Any:
        """Return the value for the module `path`: of the first pattern that matches, or the default.

        Raises PatternError.
        """
        for key, value in pattern.items():
            if path == key or path.endswith(f".{key}") or self._matches(rf"(.*\.)?({key})$", key, path):
                return value
        return default

    def names(self, modules: str | Sequence[str], path: str) -> bool:
        """Return whether `target_modules` or `exclude_modules` names the module `path`. Raises PatternError."""
        if isinstance(modules, str):
            return modules == "all-linear" or self._matches(rf"(?:{modules})\Z", modules, path)
        return any(path == name or path.endswith(f".{name}") for name in modules)

    def _matches(self, anchored: str, pattern: str, path: str) -> bool:
        import regex

        if _PLAIN.fullmatch(pattern):  # such as the names of modules, of which a configuration may have hundreds
            return re.match(anchored, path) is not None
        if pattern not in self._checked:
            _check(pattern)
            self._checked.add(pattern)
        start = thread_time()
        try:
            if self._left_s <= 0:
                raise TimeoutError
            return regex.match(anchored, path, timeout=self._left_s) is not None
        except TimeoutError:
            raise PatternError(
                f"the pattern {pattern!r:.80} takes too long to match: write it without nested * or +"
            ) from None
        except (regex.error, RecursionError) as error:
            raise PatternError(f"the pattern {pattern!r:.80} is no regular expression: {error}") from None
        finally:
            self._left_s -= thread_time() - start


def _check(pattern: str) -> None:
    """Raise PatternError for what `re`, which peft uses, does not take or `regex` reads in another way."""
    if len(pattern) > MOST_CHARACTERS:
        raise PatternError(f"a pattern has {len(pattern):,} characters; it may have {MOST_CHARACTERS:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # of a set whose meaning may change
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError, FutureWarning) as error:
        raise PatternError(f"the pattern {pattern!r:.80} is no regular expression: {error}") from None
    counts = re.findall(r"\{([^}]*)\}?", pattern)
    if not all(re.fullmatch(r"\d{1,4}(,\d{0,4})?|,\d{1,4}", count) for count in counts):
        raise PatternError(f"the pattern {pattern!r:.80} has a {{ that begins no count such as {{2,8}}")
    if prod(max(1, int(number)) for count in counts for number in re.findall(r"\d+", count)) > MOST_COPIES:
        raise PatternError(f"the pattern {pattern!r:.80} repeats its parts more than {MOST_COPIES:,} times")
