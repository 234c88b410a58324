"""Studies against adapters made by hand: the data set that is built, and the report. Arms take minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from autopeft.benchmarks.handmade import arms, report, returns
from autopeft.benchmarks.handmade.arms import Verified
from autopeft.search_space.spaces.rules import left_out
from autopeft.studies.config.problem import space_for
from autopeft.testing.spaces import encoder

SOURCE = '''
def opens(name) -> "bool":
    """Say whether the {n} door with this name is open.

    Returns: a truth value.
    """

def count(items) -> int:
    """Count the {n} items that are left in a drawer."""

def either(items) -> int | None:
    """Return the {n} number of any thing, or nothing at all."""

def short() -> str:
    """Too short."""
'''
PLACES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


def test_rows_are_docstrings_and_what_is_returned(tmp_path: Path) -> None:
    for i, place in enumerate(PLACES):
        (tmp_path / "torch").mkdir(exist_ok=True)
        words = " ".join(f"{place}{k}" for k in "abcdefgh"[: i + 1])
        (tmp_path / "torch" / f"{place}.py").write_text(SOURCE.replace("{n}", words))
    splits = returns.build(tmp_path)
    rows = [row for split in splits.values() for row in split]
    assert {row.label for row in rows} == {"truth value", "number"}
    assert not [row for row in rows if "Returns" in row.text or "either" in row.text or "Too short" in row.text]
    assert [len(split) for split in splits.values()] == [len(rows) // 2, len(rows) // 4, len(rows) // 4]
    assert splits == returns.build(tmp_path)


def test_the_space_contains_the_rules(tmp_path: Path) -> None:
    settings = arms.settings_of("topics", 3, "now", tmp_path)
    assert (settings.seed, settings.goal, settings.search.keep) == (3, "cheapest_as_good", "auto")
    assert arms.settings_of("topics", 3, "before", tmp_path).goal == "front"
    assert not left_out(space_for(settings, encoder()))


def verified(arm: str, seed: int, test: float, num_params: float) -> Verified:
    return Verified(
        data="topics", rows="", seed=seed, arm=arm, minutes=5, took_s=300, trainings=20, candidate="lora", key=arm,
        num_params=num_params, test=(test - 0.01, test + 0.01),
    )  # fmt: skip


def test_an_arm_is_compared_with_the_better_rule() -> None:
    found = [
        *(verified("sweep: lora-all-linear", seed, 0.6 + 0.01 * seed, 8000) for seed in range(4)),
        *(verified("sweep: lora-r8-qv", seed, 0.615, 2000) for seed in range(4)),
        *(verified("now", seed, 0.61, 500) for seed in range(4)),
    ]
    (one,) = report.comparisons(found)
    # The better rule is q/v at seeds 0 and 1, all linears at 2 and 3: 61.5, 61.5, 62, 63.
    assert one.differences == pytest.approx((-0.005, -0.005, -0.01, -0.02))
    assert one.ratios == pytest.approx((0.25, 0.25, 0.0625, 0.0625))
    text = report.to_markdown(found)
    assert "| now | topics | 4 | 3 of 4 (30% to 95%) | 0 | -1.0 (" in text
    assert report.to_dict(found)["comparisons"][0]["arm"] == "now"


def test_results_are_kept(tmp_path: Path) -> None:
    found = [verified("now", 0, 0.5, 100), verified("tpe", 0, 0.5, 100)]
    report.append(tmp_path / "results.jsonl", found)
    assert report.read(tmp_path / "results.jsonl") == found
