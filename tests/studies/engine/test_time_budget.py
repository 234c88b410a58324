"""What fits into `minutes`, its record in the ledger, and what more time would buy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from autopeft.search_space import AdapterChoice, Choice, SearchSpace
from autopeft.search_space.problem import SEARCH, Problem, Trial
from autopeft.searchers.bo.bayesian import Bayesian
from autopeft.studies.cli.app import app
from autopeft.studies.config.loading import load_study, study_from_mapping
from autopeft.studies.config.problem import space_for
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.check import check
from autopeft.studies.engine.plan import plan_of
from autopeft.studies.engine.session import as_started, open_ledger, open_study, read_snapshot, recorded_settings
from autopeft.studies.engine.time_budget import MOST_TRIALS, Pace, fitted, is_over, outlook_of
from autopeft.studies.errors import ConfigurationError
from autopeft.studies.reports.report import front_notes
from autopeft.testing.spaces import SMALL

from ...support.tiny_study import save_study
from ...support.tracked_study import OBJECTIVES as OBJECTIVES_OF_TRIALS
from ...support.tracked_study import TRIALS, snapshot
from .test_study import Quiet, run

PACE = Pace(step_s=0.1, steps_s=10.0, validation_s=1.0, test_s=1.0)
NUM_BASELINES = 6
runner = CliRunner()


def study(**settings: Any) -> StudyFile:
    adapters = {"lora": {"kind": "lora", "at": ["attn.q"], "rank": [1, 2]}}
    return study_from_mapping(
        {"study": "s", "space": {"adapters": adapters}, "baselines": {"names": ["head", "lora-r8-qv"]}, **settings}
    )


def planned_s(found: StudyFile, per_finalist: int = 1) -> float:
    """Seconds of the whole study, in the obvious way; racing takes 0.7 of the steps in replays (docs/searchers.md)."""
    share = found.search.share * (0.7 if found.search.keep == "auto" else 1.0)
    finals = found.finalists.seeds * (found.finalists.most + len(found.baselines.names)) * per_finalist
    return NUM_BASELINES * 11 + found.search.trials * (share * 10 + 1) + finals * 12


OBJECTIVES = (
    ["accuracy", "num_params"],
    ["loss", "latency_s"],
    ["accuracy", "loss"],
    ["accuracy", {"name": "num_params", "direction": "maximise"}],
)
SEARCHES = st.fixed_dictionaries(
    {},
    optional={
        "share": st.sampled_from([0.3, 1.0]),
        "initial": st.integers(1, 60),
        "start": st.just([{"lora.rank": 1}] * 12),
        "trials": st.integers(61, 90),
        "batch": st.integers(1, 16),
        "rungs": st.just([0.2]),
    },
)
FINALISTS = st.fixed_dictionaries({}, optional={"seeds": st.integers(1, 6), "most": st.integers(1, 12)})


@given(
    minutes=st.floats(1, 300),
    objectives=st.sampled_from(OBJECTIVES),
    search=SEARCHES,
    finalists=FINALISTS,
    per_finalist=st.sampled_from([1, 4]),
)
def test_the_study_fills_its_minutes_and_does_not_exceed_them(
    minutes: float, objectives: list, search: dict, finalists: dict, per_finalist: int
) -> None:
    own = {"objectives": objectives, "search": search, "finalists": finalists}
    try:
        found = fitted(study(minutes=minutes, **own), PACE, NUM_BASELINES, per_finalist)
    except ConfigurationError as error:
        needed = float(str(error).split("; about ")[1].split(" ")[0])
        assert minutes < needed + 0.05
        return
    assert planned_s(found, per_finalist) <= 60 * minutes
    decided = "trials" not in search and "most" not in finalists and found.finalists.most < 8
    if decided and found.search.trials < MOST_TRIALS:
        assert planned_s(found, per_finalist) > 60 * minutes - 11, "time for a further trial is left"
    asked = study(minutes=minutes, **own)
    for section, values in (("search", search), ("finalists", finalists)):
        for name in values:
            assert getattr(getattr(found, section), name) == getattr(getattr(asked, section), name)
    # It is in the ledger, and read again by every command.
    again = study_from_mapping(found.model_dump(mode="json", exclude_none=True))
    assert again.model_dump() == found.model_dump()


def test_what_the_file_sets_stays() -> None:
    own = study(minutes=30, search={"trials": 9, "batch": 3}, finalists={"seeds": 5})
    found = fitted(own, PACE, NUM_BASELINES)
    assert (found.search.trials, found.search.batch, found.finalists.seeds) == (9, 3, 5)
    found = fitted(study(minutes=30, search={"trials": 12}), PACE, NUM_BASELINES)
    assert found.search.batch == 3, "a quarter of the trials, whoever decides them"
    assert fitted(study(), PACE, NUM_BASELINES).model_dump() == study().model_dump(), "without minutes nothing changes"


def test_a_time_that_is_too_short_names_what_would_do() -> None:
    with pytest.raises(ConfigurationError, match=r"minutes: 1 is too short.*the 6 of the baselines.*would do"):
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

    def changed(**search: Any) -> StudyFile:
        return settings.model_copy(update={"search": settings.search.model_copy(update=search)})

    asked = as_started(changed(trials=trials + 5))
    assert (asked.search.trials, asked.minutes) == (trials + 5, None), "more trials are asked for without a limit"
    assert as_started(settings).minutes == 20
    assert as_started(changed(searcher="nsga2")).search.searcher == "nsga2", "only what was decided comes back"
    with pytest.raises(ConfigurationError, match="minutes: was 20 when the study was started, is 40"):
        as_started(settings.model_copy(update={"minutes": 40.0}))
    status = runner.invoke(app, ["status", str(settings.path)])
    assert f" of {trials} trials" in status.stdout


def test_the_search_ends_in_time_for_the_finalists() -> None:
    settings = study(minutes=10, finalists={"most": 2, "seeds": 2})
    plan, space = plan_of(settings), space_for(settings, SMALL)

    def trials(wall_s: float, state: str = "complete") -> list[Trial]:
        one = TRIALS[0]
        return [replace(one, role=SEARCH, state=state, measurement=replace(one.measurement, wall_s=wall_s))]

    # 8 runs of finalists: 2 of the search and 2 baselines, with 2 seeds each.
    one = trials(wall_s=30.0)
    assert not is_over(plan, space, one, {"study": 299.0}, more=2)
    assert is_over(plan, space, one, {"study": 301.0}, more=2)
    assert not is_over(plan, space, trials(wall_s=30.0, state="pruned"), {"study": 539.0}, more=2)
    assert not is_over(replace(plan, minutes=None), space, one, {"study": 1e9, "search": 1e9}, more=2)


def test_no_training_is_begun_that_would_exceed_the_limit_of_the_search() -> None:
    settings = study(search={"timeout_s": 100})
    plan, space = plan_of(settings), space_for(settings, SMALL)
    ended = [replace(one, role=SEARCH, measurement=replace(one.measurement, wall_s=s)) for one, s in (
        (TRIALS[0], 10.0), (TRIALS[1], 30.0))]  # fmt: skip
    used = {"search": 35.0, "study": 1e9}
    assert [is_over(plan, space, ended, used, more) for more in (3, 4)] == [False, True], "20 s each"
    assert [is_over(plan, space, [], used, more, PACE) for more in (5, 6)] == [False, True], "11 s, as measured"
    halved = replace(plan, rungs=(0.5,), keep=0.5)
    assert [is_over(halved, space, [], used, more, PACE) for more in (7, 8)] == [False, True], "8.5 s with a rung"
    assert not is_over(plan, space, ended, used, more=0), "the first training has its chance"
    assert is_over(plan, space, ended, used | {"search": 101.0}, more=0)


def test_texts_are_part_of_every_training_and_of_the_rungs_that_generate_them() -> None:
    """A text takes a second: of 20 validation rows, 12 at a rung, and 30 test rows."""
    pace = Pace(step_s=0.1, steps_s=10.0, validation_s=21.0, test_s=31.0, texts_s=20.0, rung_s=12.0)
    plan = plan_of(study(search={"rungs": [0.2, 0.5]}))
    assert pace.run_s() == 31.0
    assert pace.final_s == 62.0
    assert pace.trial_s(plan) == 31.0, "no candidate is compared at a rung"
    assert replace(pace, at_rungs=True).trial_s(plan) == 31.0 + 24.0
    halved = replace(plan, keep=0.5)
    assert pace.trial_s(halved) == pytest.approx(10 * (0.2 + 0.3 / 2 + 0.5 / 4) + 21 + 12 * 1.5)
    assert pace.trial_s(replace(plan, keep="auto")) == pytest.approx(7.0 + 21.0 + 24.0)
    without = replace(pace, validation_s=1.0, texts_s=0.0, rung_s=0.0, test_s=1.0)
    asked = study(minutes=60, search={"rungs": []})
    few, many = (fitted(asked, one, NUM_BASELINES).search.trials for one in (pace, without))
    assert few < many / 2, "texts take more than half of a training here"


@pytest.mark.slow
def test_the_time_of_the_search_is_kept_over_resumes(tmp_path: Path) -> None:
    """Each step takes a second of this clock; baselines and finalists are not the search's time."""
    limits = {"searcher": "random", "trials": 40, "batch": 4}
    settings = load_study(save_study(tmp_path / "study", search=limits | {"timeout_s": 1000}))
    splits, _, _ = check(settings)

    class Clock(Quiet):
        now_s = 0.0

        def step(self, done: int, total: int) -> None:
            type(self).now_s += 1.0
            super().step(done, total)

    def go(settings: StudyFile, *, resume: bool, stop_after: int | None = None) -> tuple[int, float]:
        """The number of trials of the search, and the seconds of the search by the ledger."""
        with open_study(settings, splits, resume=resume) as loop:
            loop.time.clock = lambda: Clock.now_s
            loop.pace = None  # no estimate: only what has passed counts
            if stop_after is None:
                loop.run(Clock())
            else:
                with pytest.raises(KeyboardInterrupt):
                    loop.run(Clock(stop_after=stop_after))
            return loop._num_searched(), loop.ledger.used_s["search"]

    num, used_s = go(settings, resume=False, stop_after=10)
    before_s = Clock.now_s
    assert 0 < used_s < before_s, "the baselines came before"
    timed = load_study(settings.path, [f"search.timeout_s={used_s + 1}"])
    more, now_s = go(timed, resume=True)
    assert more <= num + limits["batch"], "the batch that was interrupted, and no other"
    assert now_s < Clock.now_s - before_s + used_s, "the finalists came after"
    assert go(timed, resume=True) == (more, pytest.approx(now_s)), "a further resume adds nothing"
    assert go(load_study(settings.path, ["search.trials=13"]), resume=True)[0] == max(more, 13)


@pytest.mark.slow
def test_reports_say_what_more_time_would_buy(tmp_path: Path) -> None:
    settings = load_study(
        save_study(tmp_path / "study", search={"searcher": "bo", "trials": 8, "batch": 4, "initial": 4})
    )
    found = run(settings)
    front = found.front()
    assert found.outlook is not None
    assert found.outlook.recommended == front.recommendation.recommended
    assert found.outlook.trials == 4
    assert 0 <= found.outlook.chance <= 1
    assert found.outlook.sentence in front_notes(found, front)
    read = read_snapshot(settings, open_ledger(settings))
    assert read.outlook == found.outlook
    for changed in (
        replace(found, outlook=replace(found.outlook, recommended=-1)),
        replace(found, outlook=replace(found.outlook, after=7)),
        replace(found, within=found.outlook.margin / 2),
    ):
        notes = front_notes(changed, changed.front())
        assert not any(note.startswith("More time") for note in notes), "it is about another moment"


def test_no_outlook_on_a_best_that_the_search_does_not_know() -> None:
    """A baseline outside of the space may be better than all that the model has seen."""

    class Sure(Bayesian):
        def chance_of_cheaper(self, count: int, cost: float) -> tuple[int, float]:
            return count, 0.5

    lora = {"lora": AdapterChoice(kind="lora", fields={"rank": Choice.of([1, 2])})}
    problem = Problem(space=SearchSpace(backbone=SMALL, adapters=lora), objectives=OBJECTIVES_OF_TRIALS, num_trials=4)
    study = snapshot(TRIALS)
    members = {study.front().recommendation.best, study.front().recommendation.recommended}
    searched = {trial.number for trial in study.search_trials}
    assert (outlook_of(Sure(problem, 0), study, 4) is not None) == (members <= searched)
    alone = replace(study, trials=tuple(t for t in study.trials if t.role.kind == "baseline"))
    assert alone.front().recommendation is not None
    assert outlook_of(Sure(problem, 0), alone, 4) is None


def test_a_rough_pace_says_so() -> None:
    assert list(PACE.notes()) == []
    (few,) = replace(PACE, share=0.25).notes()
    assert "from 25% of its rows" in few
    (rough,) = replace(PACE, spread=0.5).notes()
    assert "spread by 50%" in rough
