"""The simulations of intervals and recommendations: their model is as stated, and the shares are counted right."""

from __future__ import annotations

import json

import numpy as np
import pytest

from autopeft.benchmarks import coverage as simulated
from autopeft.benchmarks import metric_coverage
from autopeft.benchmarks.__main__ import main
from autopeft.benchmarks.coverage import Candidate, Choices, Coverage, Examples, Setting, Situation
from autopeft.studies.analysis.statistics import Estimate


@pytest.mark.parametrize(("metric", "quality"), [("accuracy", 0.7), ("loss", -1.2)])
def test_the_true_quality_is_the_mean_over_examples_and_seeds(metric: str, quality: float) -> None:
    candidate = Candidate(quality=quality, seed_sd=0.1)
    rng = np.random.default_rng(0)
    means = []
    for _ in range(400):
        examples = Examples(rng, 300, metric)
        means.append(examples.runs(candidate, examples.interactions(), 2).mean())
    assert np.mean(means) == pytest.approx(quality, abs=4 * np.std(means) / 20)


def test_intervals_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(metric="accuracy", quality=0.6, num_examples=200, num_seeds=3, spreads="unequal")
    found = simulated.coverage(setting, simulations=120)
    for share in (found.mean, found.difference, found.new_run):
        assert 0.88 <= share <= 1
    # Intervals of no width contain nothing.
    nothing = Estimate(value=0.0, std_err=0.0, low=0.0, high=0.0, num_seeds=1)
    monkeypatch.setattr(simulated, "estimate", lambda *_, **__: nothing)
    monkeypatch.setattr(simulated, "predictive_interval", lambda *_, **__: (0.0, 0.0))
    empty = simulated.coverage(setting, simulations=3)
    assert (empty.mean, empty.new_run) == (0.0, 0.0)


def test_recommendations_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clear = Situation(front="one step", num_examples=2000, num_seeds=3)
    found = simulated.choices(clear, simulations=20)
    assert (found.cheaper, found.wrong, found.worse, found.cost) == (0.0, 0.0, 0.0, 1.0)
    assert found.runs == 2.0, "nothing is left to decide, so there is no second look"
    # A rule that always takes the cheapest is wrong, and is counted as such.
    monkeypatch.setattr(simulated, "_study", lambda *_: (0, 3, 8))
    found = simulated.choices(clear, simulations=20)
    assert (found.cheaper, found.wrong, found.worse, found.cost) == (1.0, 1.0, 1.0, pytest.approx(1 / 64))


def test_the_command_prints_all_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated, "INTERVAL_SCENARIOS", simulated.INTERVAL_SCENARIOS[:1])
    monkeypatch.setattr(simulated, "CHOICE_SCENARIOS", simulated.CHOICE_SCENARIOS[:1])
    monkeypatch.setattr(metric_coverage, "METRIC_SCENARIOS", metric_coverage.METRIC_SCENARIOS[:1])
    monkeypatch.setattr(metric_coverage, "POPULATION", 1000)
    for words in (["--json"], []):
        with pytest.raises(SystemExit) as ended:
            main(["coverage", "--simulations", "2", *words])
        assert ended.value.code == 0
        text = capsys.readouterr().out
        if words:
            found = json.loads(text)
            assert found["intervals"][0]["setting"]["num_examples"] == 100
            assert found["recommendations"][0]["situation"]["front"] == "one step"
            assert found["metrics"][0]["setting"] == {"metric": "accuracy", "num_rows": 100, "domains": "one is worst"}
        else:
            assert text.count("\n| accuracy 0.6 | 100 | 2 | equal |") == 1
            assert text.count("\n| one step | 1,000 | 2 |") == 1
            assert text.count("\n| accuracy | one is worst | 100 |") == 1


def test_rows_are_formatted() -> None:
    one = Coverage(setting=simulated.INTERVAL_SCENARIOS[-1], mean=0.951, difference=0.94, new_run=1.0)
    row = Choices(situation=simulated.CHOICE_SCENARIOS[0], cheaper=0.5, wrong=0.01, worse=0.02, cost=0.25, runs=2.5)
    text = simulated.to_markdown([one], [row])
    assert "| loss 1 | 1,000 | 5 | unequal | 95.1 | 94.0 | 100.0 |" in text
    assert "| one step | 1,000 | 2 | 50.0 | 1.0 | 2.0 | 0.25 | 2.5 |" in text
