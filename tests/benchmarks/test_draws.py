"""`draws`: a study with several seeds, compared with a baseline; what has ended is not run again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autopeft.benchmarks import draws
from autopeft.benchmarks.__main__ import main
from autopeft.search_space.problem import METRICS
from autopeft.studies.analysis.statistics import Estimate

from ..support.tiny_study import save_study


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    assert ended.value.code == 0, captured.err
    return captured.out


@pytest.mark.slow
def test_each_seed_is_a_study_and_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_study(
        tmp_path / "study",
        search={"searcher": "random", "trials": 2, "batch": 2},
        training={"learning_rate": 1.0e-2, "epochs": 2, "batch_size": 8},
    )
    words = ("draws", path, "--seeds", "3,4", "--output", tmp_path / "draws", "--json")
    found = json.loads(printed(capsys, *words))
    assert [one["seed"] for one in found] == [3, 4]
    for one in found:
        gap = one["quality"] - one["baseline_quality"]
        assert one["validation_difference"]["value"] == pytest.approx(gap)
        assert one["test_difference"]["value"] == pytest.approx(one["test"] - one["baseline_test"])
        assert one["as_good"] == (one["validation_difference"]["low"] >= -0.01)
    ledgers = sorted((tmp_path / "draws").glob("*/ledger.db"))
    times = [ledger.stat().st_mtime_ns for ledger in ledgers]
    assert len(ledgers) == 2
    assert json.loads(printed(capsys, *words)) == found
    assert [ledger.stat().st_mtime_ns for ledger in ledgers] == times, "ended studies are only read"
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words), "--baseline", "full"])
    assert ended.value.code == 2
    assert "the study has head, lora-r8-qv" in capsys.readouterr().err


def test_the_table_counts() -> None:
    near = Estimate(value=0.004, std_err=0.005, low=-0.006, high=0.014, num_seeds=3)
    far = Estimate(value=-0.03, std_err=0.01, low=-0.05, high=-0.01, num_seeds=3)
    made = [
        draws.Draw(
            seed=seed,
            candidate="lora 1",
            num_params=size,
            quality=0.6,
            test=0.55,
            baseline_num_params=73_728,
            baseline_quality=0.59,
            baseline_test=0.54,
            margin=0.01,
            validation_difference=gap,
            test_difference=None,
        )
        for seed, size, gap in ((0, 1_000, near), (1, 9_000, far), (2, 3_000, near))
    ]
    text = draws.to_markdown(made, METRICS["accuracy"], "lora-r8-qv")
    assert "| 0 | lora 1 | 1,000 | 0.600 | +0.4 points (95 % interval -0.6 to +1.4) | 0.550 | – |" in text
    assert text.endswith(
        "2 of 3 recommended candidates are shown to be within 1.0 points of lora-r8-qv (73,728 parameters). They have"
        " 3,000 parameters in the median, from 1,000 to 9,000.\n"
    )
