"""The benchmark of generated texts: every arm does the work of transformers' `generate`, in an order that rotates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autopeft.benchmarks.speed import texts
from autopeft.benchmarks.speed.texts import ADAPTERS, SLOTS, TextsRow, measure_texts, num_runs, to_markdown
from autopeft.evaluators.costs.timing import Spread
from autopeft.studies.config.loading import load_study
from autopeft.studies.engine.check import check
from autopeft.studies.engine.session import evaluator_for

from ...studies.engine.test_texts_study import study_in


def test_every_arm_generates_as_much_for_a_candidate_as_generate_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_study(study_in(tmp_path / "study"))
    splits, _, _ = check(settings)
    evaluator = evaluator_for(settings, splits)
    passed = 0

    def count(_: Any, __: Any, kwargs: Any) -> None:
        """A clock that counts the rows of the model's passes."""
        nonlocal passed
        passed += len(kwargs["input_ids"])

    monkeypatch.setattr(texts, "now", lambda _: float(passed))
    evaluator.model.register_forward_pre_hook(count, with_kwargs=True)
    runs = []
    rows = measure_texts(evaluator, 2, lambda: runs.append(passed))
    assert len(runs) == num_runs(2)
    assert [(row.adapter, row.slots) for row in rows] == [("", 1), *((name, k) for name in ADAPTERS for k in SLOTS)]
    for row in rows:
        assert (row.ratio.low, row.ratio.median, row.ratio.high) == (1.0, 1.0, 1.0)
        assert row.seconds == 12 * texts.NEW_TOKENS, "12 validation rows, a pass for each new token"


def test_the_table_has_a_line_per_arm() -> None:
    rows = [
        TextsRow(adapter="", slots=1, ratio=Spread.of([1.0]), seconds=2.0),
        TextsRow(adapter="LoRA", slots=4, ratio=Spread.of([0.5, 0.75, 1.0]), seconds=1.5),
    ]
    lines = to_markdown(rows).splitlines()
    assert lines[-2] == "| `generate` | 1 | 1 | 2.0 |"
    assert lines[-1] == "| LoRA | 4 | 0.75 (0.50 to 1.00) | 1.5 |"
