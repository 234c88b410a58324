"""What a searcher tells of its own state: in the status, in the lines of progress."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from autopeft.searchers import SEARCHERS, Suggestion
from autopeft.studies.analysis.diagnostics import diagnostics, num_held_out
from autopeft.studies.cli.app import main
from autopeft.studies.cli.progress import ProgressView
from autopeft.studies.config.loading import load_study

from ...support.tiny_study import save_study
from ...support.tracked_study import TRIALS, snapshot, trial
from ..engine.test_study import run

TOLD = {
    "phase": "evolution",
    "note": "no better than chance",
    "rank_correlation": {"accuracy": 0.123, "num_params": 1.0},
    "relevance": {"accuracy": {"b": 0.25, "a": 0.5, "c": 0.25}},
    "audit": {
        "num": 8,
        "tau": 0.5,
        "tau_interval": [0.1, 0.8],
        "top_tau": 0.25,
        "top_interval": [-0.3, 0.7],
        "regret": {"1": 0.02},
    },
}


def with_state(number: int, told: Any) -> Any:
    return replace(TRIALS[number], searcher_state={"diagnostics": told})


def test_the_trials_that_tell_something() -> None:
    trials = [TRIALS[0], with_state(1, {"phase": "initial"}), with_state(2, TOLD | {"unheard": 1}), TRIALS[3]]
    first, last = diagnostics(trials)
    assert (first.trial, first.phase, first.note, dict(first.relevance)) == (1, "initial", "", {})
    assert list(first.lines(0)) == [("phase", "initial (trial 1)")]
    assert last.to_dict() == {"trial": 2, **TOLD}
    assert list(last.lines(10)) == [
        ("phase", "evolution (trial 2): no better than chance"),
        ("surrogate", "rank correlation with 10 held-out trials: accuracy 0.12, num_params 1.00"),
        (
            "audit",
            "proxy scores against 8 trainings: Kendall's tau 0.50 (0.10 to 0.80), better half 0.25 (-0.30 to 0.70)",
        ),
        ("relevance", "for accuracy: a 50%, b 25%, c 25%"),
    ]


def test_a_rank_correlation_needs_ten_trials() -> None:
    (found,) = diagnostics([with_state(2, TOLD)])
    for count in (0, 3, 9):
        line = dict(found.lines(count))["surrogate"]
        assert line == f"too few trials for a rank correlation: {count}, at least 10 needed"
    assert "accuracy 0.12" in dict(found.lines(10))["surrogate"]
    assert found.to_dict()["rank_correlation"] == TOLD["rank_correlation"], "the number itself stays"


def test_held_out_trials_are_those_of_earlier_batches() -> None:
    """Trials 1 to 4 have values; trial 5 failed, and trial 0 is a baseline."""
    trials = [*TRIALS, replace(TRIALS[5], number=6, state="infeasible"), trial(7, 0.5, 1), trial(8, 0.5, 1)]
    assert [num_held_out(trials, number, 1) for number in (1, 2, 5, 6, 7, 8)] == [0, 1, 4, 4, 4, 5]
    assert [num_held_out(trials, number, 2) for number in (1, 2, 3, 4, 5, 7, 8)] == [0, 0, 2, 2, 4, 4, 5]
    assert num_held_out([replace(TRIALS[1], state="pruned"), TRIALS[2]], 2, 1) == 1


def test_a_line_of_progress_has_the_note() -> None:
    text = StringIO()
    with ProgressView(Console(file=text, width=200)) as view:
        for trial in (with_state(1, TOLD), replace(with_state(5, TOLD)), with_state(2, {"phase": "model"})):
            view.end(trial, snapshot())
    lines = [line for line in text.getvalue().splitlines() if line.startswith(" ")]
    assert [line.rstrip().endswith("[no better than chance]") for line in lines if "trial" in line] == [
        True, False, False,
    ]  # fmt: skip
    assert text.getvalue().count("[no better than chance]") == 2


@pytest.mark.slow
def test_status_shows_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    class Telling(SEARCHERS["random"]):  # type: ignore[misc,name-defined]
        def suggest(self, count: int = 1) -> list[Suggestion]:
            return [replace(s, state={**s.state, "diagnostics": TOLD}) for s in super().suggest(count)]

    def status(*more: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            main(["status", str(tmp_path), *more])
        assert exit_.value.code == 0
        return capsys.readouterr().out

    monkeypatch.setitem(SEARCHERS, "random", Telling)
    search = {"searcher": "random", "trials": 2}
    short = {"baselines": {"names": ["head"], "learning_rates": [1e-2]}, "finalists": {"seeds": 1, "most": 1}}
    found = run(load_study(save_study(tmp_path, search=search, **short)))
    last = max(t.number for t in found.trials if t.searcher_state)
    assert json.loads(status("--json"))["diagnostics"] == {"trial": last, **TOLD}
    assert f"phase        evolution (trial {last}): no better than chance" in status()
    assert "relevance    for accuracy: a 50%, b 25%, c 25%" in status()
