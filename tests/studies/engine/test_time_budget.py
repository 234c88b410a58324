"""What fits into `minutes`, its record in the ledger, and what more time would buy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.studies.analysis.outlook import Outlook
from autopeft.studies.config.loading import load_study, study_from_mapping
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.check import check
from autopeft.studies.engine.session import as_started, open_ledger, open_study, read_snapshot, recorded_settings
from autopeft.studies.engine.time_budget import LEAST_TRIALS, MOST_TRIALS, RACING_SHARE, Pace, fitted
from autopeft.studies.errors import ConfigurationError
from autopeft.studies.reports.report import front_notes

from ...support.tiny_study import save_study
from .test_study import Quiet, run

PACE = Pace(step_s=0.1, steps_s=10.0, validation_s=1.0, test_s=1.0)
NUM_BASELINES = 6


def study(**settings: Any) -> StudyFile:
    adapters = {"lora": {"kind": "lora", "at": ["attn.q"], "rank": [1, 2]}}
    return study_from_mapping(
        {"study": "s", "space": {"adapters": adapters}, "baselines": {"names": ["head", "lora-r8-qv"]}, **settings}
    )


def planned_s(found: StudyFile) -> float:
    """Seconds of the whole study, in the obvious way."""
    share = RACING_SHARE if found.search.keep == "auto" else 1.0
    finals = found.finalists.seeds * (found.finalists.most + 2)
    return NUM_BASELINES * 11 + found.search.trials * (share * 10 + 1) + finals * 12


@given(minutes=st.floats(2, 300))
def test_the_study_fills_its_minutes_and_does_not_exceed_them(minutes: float) -> None:
    try:
        found = fitted(study(minutes=minutes), PACE, NUM_BASELINES)
    except ConfigurationError as error:
        needed = float(str(error).split("the least is ")[1].split(",")[0])
        assert minutes < needed + 0.05
        minutes = needed + 0.1
        found = fitted(study(minutes=minutes), PACE, NUM_BASELINES)
    assert planned_s(found) <= 60 * minutes
    if found.search.trials < MOST_TRIALS:
        assert planned_s(found) > 60 * minutes - 11, "time for a further trial is left"
    assert found.search.trials >= LEAST_TRIALS
    assert (found.search.keep == "auto") == bool(found.search.rungs)


def test_what_the_file_sets_stays() -> None:
    own = study(minutes=30, search={"trials": 9, "batch": 3}, finalists={"seeds": 5})
    found = fitted(own, PACE, NUM_BASELINES)
    assert (found.search.trials, found.search.batch, found.finalists.seeds) == (9, 3, 5)
    assert fitted(study(), PACE, NUM_BASELINES).model_dump() == study().model_dump(), "without minutes nothing changes"


def test_a_time_that_is_too_short_names_what_would_do() -> None:
    with pytest.raises(ConfigurationError, match=r"minutes: 1 is too short.*the 6 of the baselines.*the least is"):
        fitted(study(minutes=1), PACE, NUM_BASELINES)


def test_a_study_keeps_what_its_minutes_decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_study(save_study(tmp_path / "study", minutes=20, search={"searcher": "bo"}, finalists={"most": 2}))
    splits, _, _ = check(settings)

    def at(steps_s: float) -> None:
        pace = Pace(step_s=1.0, steps_s=steps_s, validation_s=1.0, test_s=1.0)
        monkeypatch.setattr(Pace, "measured", classmethod(lambda *_: pace))

    at(40.0)
    with open_study(settings, splits, resume=False) as loop, pytest.raises(KeyboardInterrupt):
        trials, plan = loop.problem.num_trials, loop.plan
        loop.run(Quiet(stop_after=3))
    assert trials == recorded_settings(settings, open_ledger(settings)).search.trials
    at(4.0)  # as on a faster machine: the study goes on as it was started
    with open_study(settings, splits, resume=True) as loop:
        assert (loop.problem.num_trials, loop.plan) == (trials, plan)
    more = settings.model_copy(update={"search": settings.search.model_copy(update={"trials": trials + 5})})
    assert as_started(more).search.trials == trials + 5, "a number that the user sets counts"


def test_reports_say_what_more_time_would_buy(tmp_path: Path) -> None:
    settings = load_study(
        save_study(tmp_path / "study", search={"searcher": "bo", "trials": 8, "batch": 4, "initial": 4})
    )
    snapshot = run(settings)
    front = snapshot.front()
    assert snapshot.outlook is not None
    assert snapshot.outlook.recommended == front.recommendation.recommended
    assert snapshot.outlook.trials == 4
    assert 0 <= snapshot.outlook.chance <= 1
    assert snapshot.outlook.sentence in front_notes(snapshot, front)
    read = read_snapshot(settings, open_ledger(settings))
    assert read.outlook == snapshot.outlook
    other = Outlook(recommended=-1, trials=4, minutes=1, chance=0.5)
    changed = replace(snapshot, outlook=other)
    assert not any(note.startswith("More time") for note in front_notes(changed, front)), "it is about another member"
