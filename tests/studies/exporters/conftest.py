"""Fresh processes that read exports: one without autopeft, one for our own format."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ...support.fresh import FreshProcess, fresh_process


@pytest.fixture(scope="session")
def fresh() -> Iterator[FreshProcess]:
    yield from fresh_process()


@pytest.fixture(scope="session")
def fresh_own() -> Iterator[FreshProcess]:
    yield from fresh_process()
