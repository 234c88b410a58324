"""What a user sees where a training step does not fit into the memory: in `plan` and `run`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autopeft.evaluators.costs import pack_sizing

from ...support.slow import slow
from ...support.tiny_study import save_study
from .test_families import SHORT


@pytest.mark.parametrize("command", ["plan", slow("run")])
def test_what_is_done_for_the_memory_is_said_with_its_order(
    cli: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.setattr(pack_sizing, "free_bytes", lambda device: 20_000)
    code, _, errors = cli(command, save_study(tmp_path, **SHORT))
    assert code == 0, errors
    assert errors.count("warning: a training step of the largest candidate with whole minibatches would take") == 1
    assert "micro-batches of 1 and checkpointed layers, 1 at a time, with the same results up to rounding" in errors
    assert "Tried in this order: fewer candidates at a time, whole minibatches and checkpointed layers" in errors
