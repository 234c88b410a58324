"""`promises`: finalists of a finished study are trained again, and their scores counted against the intervals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from autopeft.benchmarks import promises
from autopeft.benchmarks.__main__ import main
from autopeft.studies.config.loading import load_study
from autopeft.studies.engine.check import check
from autopeft.studies.engine.session import open_study

from ..studies.engine.test_study import Quiet
from ..support.tiny_study import save_study


@pytest.mark.slow
def test_finalists_are_trained_with_seeds_that_the_study_has_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_study(tmp_path / "study", search={"searcher": "random", "trials": 2, "batch": 2})
    settings = load_study(path)
    splits, _, _ = check(settings)
    with open_study(settings, splits, resume=False) as study:
        snapshot = study.run(Quiet())
    with pytest.raises(SystemExit) as ended:
        main(["promises", str(path), "--json"])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row.label: row for row in snapshot.rows() if row.test is not None}
    assert [one["candidate"] for one in found] == [row.label for row in snapshot.best_first(rows.values())]
    for one in found:
        row = rows[one["candidate"]]
        assert one["seed"] == max(row.seeds) + 1
        assert row.test is not None
        assert (one["low"], one["high"]) == pytest.approx((row.test.low, row.test.high))
        assert one["inside"] == (one["low"] <= one["found"] <= one["high"])


def test_shares_are_counted() -> None:
    kept = promises.Kept(
        study="one", candidate="head", metric="accuracy", seed=3, promised=0.5, low=0.4, high=0.6, found=0.45
    )
    broken = replace(kept, candidate="full", found=0.39)
    text = promises.to_markdown([kept, broken, replace(kept, study="two", metric="loss")])
    assert "| one | accuracy | 2 | 2 | 1 | 0.200 |" in text
    assert "| **all** | accuracy, loss | 3 | 3 | 2 |  |" in text
