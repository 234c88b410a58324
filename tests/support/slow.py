"""Parameters of which a few are enough for `make test`; the others are slow tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

#: Where a test trains models of several families, this one does it for `make test`: a decoder with rotary positions,
#: whose head reads the last token that is no padding.
QUICK_FAMILY = "llama"


def slow(*values: Any) -> Any:
    """One case that is a slow test."""
    return pytest.param(*values, marks=pytest.mark.slow)


def mostly_slow(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Return the values, of which all but `quick` are slow tests."""
    return [value if value in quick else slow(value) for value in values]


def mostly_slow_cases(cases: Mapping[str, Any], quick: Iterable[str]) -> list[Any]:
    """Return the cases under their names, of which all but `quick` are slow tests."""
    chosen = set(quick)
    assert chosen <= cases.keys(), f"no such cases: {sorted(chosen - cases.keys())}"
    return [
        pytest.param(case, id=name, marks=[pytest.mark.slow] * (name not in chosen)) for name, case in cases.items()
    ]
