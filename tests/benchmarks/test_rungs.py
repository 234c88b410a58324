"""Rules for the rungs over recorded trainings."""

from __future__ import annotations

import pytest

from autopeft.benchmarks import rungs
from autopeft.benchmarks.race.table import SHIPPED, read


@pytest.fixture(scope="module")
def found() -> dict[str, rungs.Summary]:
    return {one.rule: one for one in rungs.summaries(read(SHIPPED), replays=40)}


def test_who_trains_all_loses_nobody(found: dict[str, rungs.Summary]) -> None:
    every = found["all"]
    assert (every.best_kept, every.cheapest_kept, every.share, every.tried) == (1, 1, 1, 40)


def test_half_of_a_batch_has_its_share_of_the_steps(found: dict[str, rungs.Summary]) -> None:
    """Eight for 15 %, four for another 25 %, two for the rest."""
    assert found["keep: 0.5"].share == pytest.approx(0.15 + 0.25 / 2 + 0.6 / 4)
    assert found["keep: 0.5"].tried == 88  # 11 batches of 8 cost 37.4 whole trainings, and one more would be above 40


def test_racing_keeps_both_ends(found: dict[str, rungs.Summary]) -> None:
    """The figures of docs/searchers.md, roughly: there are 300 replays."""
    half, auto = found["keep: 0.5"], found["keep: auto"]
    assert half.best_kept < 0.5 < 0.7 < auto.best_kept
    assert half.cheapest_kept < 0.6 < 0.7 < auto.cheapest_kept
    assert auto.share < 0.8
    assert auto.best > half.best


def test_the_report(found: dict[str, rungs.Summary]) -> None:
    text = rungs.to_markdown(list(found.values()))
    assert "| all | 100% | 100% | 100% | 40 |" in text
    assert {row["rule"] for row in rungs.to_dict(list(found.values()))} == set(rungs.RULES)
