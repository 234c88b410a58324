"""The searcher `proxy`, alone and in a study: scores, their audit, what is trained of them, kills and failures."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from autopeft.evaluators.proxies.supernet import Supernet
from autopeft.evaluators.training.record import TrainingFailedError
from autopeft.search_space.limits import Limits
from autopeft.search_space.problem import SEARCH, Measurement, Objective, Problem, ScoredPoint, Trial, declared_costs
from autopeft.searchers.scored.proxied import LEAST_AUDITED, Proxied
from autopeft.studies.analysis.diagnostics import diagnostics
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.cli.app import main
from autopeft.studies.config.loading import load_study
from autopeft.studies.config.source import StudyFileError
from autopeft.studies.engine.proxy_scores import ScoreTable, architectures_only
from autopeft.studies.errors import NoFeasibleCandidateError
from autopeft.studies.tracking.mlflow_sync import _Runs

from ...studies.engine.test_study import Quiet, facts, run
from ...support.slow import slow
from ...support.tiny_study import save_study
from ..bo.test_bayesian import layered_space, quality

SUBNETS = 40


# Alone


def problem_of(noise: float, trials: int = 32) -> Problem:
    """Scores that know the quality up to some noise."""
    space, rng = layered_space(), Random(0)
    middle = {"training.learning_rate": 1e-2}
    points = {}
    for _ in range(200):
        genes = {**space.sample(rng), **middle}
        points[space.decode(genes).key] = genes
    scored = tuple(
        ScoredPoint(
            genes=genes,
            score=-quality(genes) + rng.gauss(0, noise),
            costs=declared_costs(space.decode(genes).architecture, space.backbone),
        )
        for genes in points.values()
        if space.decode(genes).architecture
    )
    return Problem(
        space=space,
        objectives=(Objective.of("accuracy"), Objective.of("num_params")),
        num_trials=trials,
        scored=scored,
    )


def driven(problem: Problem, count: int, failing: int = 0) -> list[Trial]:
    """The first `count` trials, of which the first `failing` come to nothing."""
    searcher, trials = Proxied(problem, 0), list[Trial]()
    while len(trials) < count:
        searcher.update(trials)
        (suggestion,) = searcher.suggest(1)
        candidate = problem.space.decode(suggestion.genes)
        values = {"accuracy": quality(suggestion.genes)}
        values |= declared_costs(candidate.architecture, problem.space.backbone)
        trials.append(
            Trial(
                number=len(trials),
                role=SEARCH,
                candidate=candidate,
                genes=suggestion.genes,
                state="complete" if len(trials) >= failing else "failed",
                measurement=Measurement(values=values) if len(trials) >= failing else None,
                searcher_state=suggestion.state,
            )
        )
    return trials


def phases(trials: list[Trial]) -> list[str]:
    return [trial.searcher_state["diagnostics"]["phase"] for trial in trials]


@pytest.mark.slow
def test_good_scores_are_followed() -> None:
    problem = problem_of(noise=0.05)
    trials = driven(problem, 32)
    told = phases(trials)
    assert told[:LEAST_AUDITED] == ["audit"] * LEAST_AUDITED
    assert told[LEAST_AUDITED:20] == ["proxy"] * 12
    assert not {"audit", "proxy"} & set(told[20:])
    audit = diagnostics(trials)[-1].audit
    assert audit["num"] == LEAST_AUDITED
    assert audit["tau"] > 0.5
    # What is picked is better than what is audited: the front, from one end to the other.
    scores = [-quality(trial.genes) for trial in trials]
    assert min(scores[8:20]) <= min(scores[:8])
    params = [trial.values["num_params"] for trial in trials[8:20]]
    assert max(params) > 3 * min(params)


@pytest.mark.slow
def test_poor_scores_are_not_followed() -> None:
    trials = driven(problem_of(noise=50.0), 16)
    told = phases(trials)
    assert told[:LEAST_AUDITED] == ["audit"] * LEAST_AUDITED
    assert "proxy" not in told
    last = diagnostics(trials)[-1]
    assert "bo proposes without them" in last.note
    assert last.audit["tau"] < 0.3


def test_the_audit_covers_all_scores() -> None:
    problem = problem_of(noise=0.05)
    scores = {problem.space.decode(entry.genes).key: entry.score for entry in problem.scored}
    ranked = sorted(scores.values())
    audited = driven(problem, LEAST_AUDITED)
    places = sorted(ranked.index(scores[trial.candidate.key]) / len(ranked) for trial in audited)
    for i, place in enumerate(places):
        assert i / LEAST_AUDITED - 0.02 <= place <= (i + 1) / LEAST_AUDITED + 0.02


def test_scores_that_no_audit_could_see_are_not_followed() -> None:
    told = phases(trials := driven(problem_of(noise=0.05), 14, failing=LEAST_AUDITED - 2))
    assert told[:LEAST_AUDITED] == ["audit"] * LEAST_AUDITED
    assert "proxy" not in told
    assert "too few trainings of the audit" in diagnostics(trials)[-1].note


def test_an_audit_with_a_failure_counts_when_it_is_over() -> None:
    trials = driven(problem_of(noise=0.05), 10, failing=1)
    assert phases(trials)[LEAST_AUDITED:] == ["proxy"] * 2
    assert diagnostics(trials)[-1].audit["num"] == LEAST_AUDITED - 1


def test_nothing_is_picked_while_the_audit_is_under_way() -> None:
    problem = problem_of(noise=0.05)
    trials = driven(problem, LEAST_AUDITED)
    searcher = Proxied(problem, 0)
    searcher.update(trials[:5], trials[5:])
    (suggestion,) = searcher.suggest(1)
    assert suggestion.state["diagnostics"]["phase"] not in ("audit", "proxy")


def test_what_is_known_to_break_a_limit_takes_no_part() -> None:
    problem = problem_of(noise=0.05)
    most = float(np.median([entry.costs["num_params"] for entry in problem.scored]))
    limited = replace(problem, limits=Limits({"num_params": most}))
    bounded = replace(problem, objectives=(problem.objectives[0], replace(problem.objectives[1], bound=most)))
    for other in (limited, bounded):
        trials = driven(other, 20)
        scored = [t for t, phase in zip(trials, phases(trials), strict=True) if phase in ("audit", "proxy")]
        assert len(scored) > LEAST_AUDITED
        assert max(trial.values["num_params"] for trial in scored) <= most


@pytest.mark.parametrize("known", [LEAST_AUDITED, 4])
def test_more_trials_do_not_ask_for_another_audit(known: int) -> None:
    problem = problem_of(noise=0.05)
    trials = driven(problem, known)
    longer = Proxied(replace(problem, num_trials=64), 0)
    longer.update(trials)
    audited = {trial.candidate.key for trial in trials}
    assert audited <= longer._audited.keys()
    assert len(longer._audited) == LEAST_AUDITED
    phase = longer.suggest(1)[0].state["diagnostics"]["phase"]
    assert phase == ("proxy" if known == LEAST_AUDITED else "audit")


@pytest.mark.slow
def test_without_scores_it_is_bo() -> None:
    problem = problem_of(noise=0.0)
    bare = Problem(space=problem.space, objectives=problem.objectives, num_trials=32)
    assert set(phases(driven(bare, 12))) <= {"initial", "model", "evolution"}


def test_the_search_over_scores_keeps_the_bounds_of_what_is_reported() -> None:
    """Else it scores what may not be trained. A cost without a bound is not measured for it, nor is a quality."""
    bound = Objective.of("stored_bytes", bound=4000.0)
    reported = (bound, Objective.of("latency_s"), Objective.of("loss", bound=0.1))
    inner = architectures_only(replace(problem_of(noise=0.0), reported=reported), 8)
    assert inner.reported == (bound,)
    assert inner.violation({"loss": 9.0, "num_params": 10.0, "stored_bytes": 5000.0}) == pytest.approx(0.25)


@pytest.mark.slow
def test_replay() -> None:
    problem = problem_of(noise=0.05)
    trials = driven(problem, 26)
    for known in (3, 8, 12, 20, 25):
        again = Proxied(problem, 0)
        again.update(trials[:known])
        assert again.suggest(1)[0].genes == trials[known].genes


# In a study


def proxy_study(folder: Path, **proxy: Any) -> Path:
    wish = {"subnets": SUBNETS, "epochs": 2.0, **proxy}
    search = {"searcher": "proxy", "trials": 12, "batch": 4, "rungs": [0.5], "keep": 0.5}
    return save_study(
        folder,
        search=search,
        proxy=wish,
        baselines={"names": ["head"], "learning_rates": [1e-2]},
        finalists={"seeds": 1, "most": 1},
        space={
            "adapters": {
                "lora": {"at": ["attn.q", "attn.v"], "rank": [0, 1, 2, 4], "vary": {"rank": "layer"}},
                "mlp": {"kind": "bottleneck", "size": [0, 2, 4], "vary": {"size": "layer"}},
            }
        },
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Snapshot]:
    path = proxy_study(tmp_path_factory.mktemp("proxy"))
    return path, run(load_study(path))


def test_a_study(finished: tuple[Path, Snapshot]) -> None:
    path, snapshot = finished
    searched = [trial for trial in snapshot.search_trials if trial.state != "infeasible"]
    audited = [trial for trial in searched if trial.searcher_state.get("whole")]
    assert len(audited) == LEAST_AUDITED
    assert all(trial.state == "complete" for trial in audited), "no rung takes them off"
    assert any(trial.state == "pruned" for trial in searched)
    assert len(searched) == 12
    with (load_study(path).output_folder / "subnets.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["key"] for row in rows}) == len(rows) == SUBNETS
    assert all(json.loads(row["genes"]) for row in rows)
    assert audited[0].candidate.architecture.key in {row["key"] for row in rows}


def test_status_tells_the_audit(finished: tuple[Path, Snapshot], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["status", str(finished[0])])
    assert "scores against 8 trainings: Kendall's tau" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("stage", [slow("training the supernet"), "scoring"])
def test_killed_ahead_of_the_search_it_goes_on(
    finished: tuple[Path, Snapshot], tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_study(proxy_study(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run(settings, watcher=Quiet(stop_at_stage=stage))
    trained: list[int] = []
    train = Supernet.train

    def watched(self: Supernet, *args: Any, **options: Any) -> Any:
        def progress(done: int, total: int) -> None:
            trained.append(done)

        return train(self, *args, **{**options, "progress": progress})

    monkeypatch.setattr(Supernet, "train", watched)
    snapshot = run(settings, resume=True)
    assert facts(list(snapshot.trials)) == facts(list(finished[1].trials))
    if stage == "scoring":
        assert not trained, "the supernet was complete"


@pytest.mark.slow
def test_a_supernet_that_diverges_does_not_take_the_study_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(self: Supernet, *args: Any, **options: Any) -> None:
        raise TrainingFailedError("the supernet's loss became nan")

    monkeypatch.setattr(Supernet, "train", diverge)
    snapshot = run(load_study(proxy_study(tmp_path)))
    assert len([trial for trial in snapshot.search_trials if trial.state in ("complete", "pruned")]) == 12


@pytest.mark.slow
@pytest.mark.parametrize("proxy", [{"score": "num_params"}, slow({"policy": "banded", "search": "linas"})])
def test_other_scores_and_searches(tmp_path: Path, proxy: dict[str, Any]) -> None:
    snapshot = run(load_study(proxy_study(tmp_path, **proxy)))
    assert any(row.on_front for row in snapshot.rows())


def test_no_time_is_left_for_trials(tmp_path: Path) -> None:
    search = {"searcher": "proxy", "trials": 12, "batch": 4, "timeout_s": 0.01}
    settings = load_study(proxy_study(tmp_path), [f"search={json.dumps(search)}"])
    with pytest.raises(NoFeasibleCandidateError, match=r"timeout_s \(0\.01 s\) is too short: it ran out"):
        run(settings)


def test_mlflow_has_the_audit_as_it_grows() -> None:
    def trial(number: int, num: int) -> Any:
        audit = {"num": num, "tau": 0.1 * num, "top_tau": 0.0, "regret": {1: 0.5}}
        return SimpleNamespace(number=number, searcher_state={"diagnostics": {"phase": "proxy", "audit": audit}})

    runs = SimpleNamespace(_written=lambda name: {8})
    snapshot = SimpleNamespace(trials=[trial(8, 8), trial(9, 8), trial(16, 10), trial(17, 10)])
    points = _Runs._audit(cast(Any, runs), cast(Any, snapshot))
    assert [(point.key, point.step) for point in points] == [
        ("audit/tau", 16),
        ("audit/top_tau", 16),
        ("audit/regret_at_1", 16),
    ]


def test_half_a_line_of_the_table_is_dropped(tmp_path: Path, finished: tuple[Path, Snapshot]) -> None:
    folder = load_study(finished[0]).output_folder
    for name in ("subnets.csv", "subnets.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    key = json.loads((tmp_path / "subnets.json").read_text())["settings"]
    text = (tmp_path / "subnets.csv").read_text()
    (tmp_path / "subnets.csv").write_text(text[: text.rindex(",") + 3])
    assert len(ScoreTable(tmp_path / "subnets.csv", key).scores) in (SUBNETS - 1, SUBNETS)
    assert not ScoreTable(tmp_path / "subnets.csv", "another").scores


@pytest.mark.parametrize(
    ("proxy", "wrong"),
    [
        ({"score": "snipp"}, "unknown score 'snipp'; did you mean 'snip'"),
        ({"policy": "sandwhich"}, "unknown policy 'sandwhich'; did you mean 'sandwich'"),
        ({"search": "proxy"}, "unknown searcher 'proxy'"),
        ({"policy": "uniform", "distil": True}, "needs the largest subnet in every step"),
        ({"filter": "size"}, "unknown proxy 'size'"),
        ({"policy": "sorted", "filter": "snip"}, "proxy.policy sorted draws no random subnets to filter"),
    ],
)
def test_bad_settings(tmp_path: Path, proxy: dict[str, Any], wrong: str) -> None:
    with pytest.raises(StudyFileError, match=wrong):
        load_study(proxy_study(tmp_path, **proxy))
