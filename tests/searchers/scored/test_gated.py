"""The searcher `gates`, alone and in a study: what the gates propose, then `bo`; kills, failures, limits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from autopeft.evaluators.proxies import TRAINED
from autopeft.evaluators.proxies.gates import Gates
from autopeft.evaluators.training.record import TrainingFailedError
from autopeft.search_space.problem import Problem, ScoredPoint, Trial, declared_costs
from autopeft.search_space.spaces.genes import Assignment
from autopeft.searchers import SEARCHERS
from autopeft.searchers.scored.gated import Gated
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.config.loading import load_study
from autopeft.studies.config.problem import problem_for
from autopeft.studies.config.source import StudyFileError
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine import proxy_scores
from autopeft.studies.engine.proxy_scores import PENALTIES, PROPOSALS
from autopeft.testing.searchers import ended, exact, problem_of
from autopeft.testing.searchers import run as drive
from autopeft.testing.spaces import mixed_space

from ...studies.engine.test_study import Quiet, facts, run
from ...support.slow import slow
from ...support.tiny_study import save_study

#: For tiny studies: some of the penalties, and as many passes as it takes until adapters are of use. Where they are of
#: none, gates with any penalty close all of them.
TRIED, EPOCHS = (0.003, 0.03, 0.3), 32
MIDDLE = {"training.learning_rate": 1e-2}


# Alone


def proposing(num: int = 4, trials: int = 16) -> Problem:
    space, rng = mixed_space(), Random(3)
    drawn = [genes for genes in (space.sample(rng) for _ in range(3 * num)) if space.decode(genes).architecture]
    scored = tuple(
        ScoredPoint(
            genes=genes,
            score=float(place),
            costs=declared_costs(space.decode(genes).architecture, space.backbone),
        )
        for place, genes in enumerate(drawn[:num])
    )
    return replace(problem_of(space, num_trials=trials), scored=scored)


def phase(trial: Trial) -> str:
    return trial.searcher_state["diagnostics"]["phase"]


def test_proposals_come_first_and_in_order() -> None:
    problem = proposing()
    trials = drive(SEARCHERS["gates"](problem, 0), 9)
    assert exact(trials[:4]) == exact(problem.scored)
    assert [phase(trial) for trial in trials[:4]] == ["gates"] * 4
    assert {phase(trial) for trial in trials[4:]} <= {"initial", "model", "evolution"}


@pytest.mark.slow
def test_then_it_is_bo_with_all_trials() -> None:
    problem = proposing()
    trials = drive(Gated(problem, 0), 9)
    for length in range(4, 9):
        bo = SEARCHERS["bo"](problem, 0)
        bo.update(trials[:length])
        assert exact(bo.suggest()) == exact([trials[length]])


def test_one_that_is_known_is_not_proposed_again() -> None:
    """Whatever came of it, and also while it is under way."""
    problem = proposing()
    points = [entry.genes for entry in problem.scored]
    fields = {"state": "infeasible", "measurement": None, "violation": 0.5}
    searcher = Gated(problem, 0)
    searcher.update(
        [ended(problem, 0, points[1], **fields)],
        [ended(problem, 1, points[0], state="running", measurement=None)],
    )
    assert [suggestion.genes for suggestion in searcher.suggest(3)][:2] == points[2:]


@pytest.mark.slow
def test_replay_and_batches() -> None:
    problem = proposing()
    trials = drive(Gated(problem, 5), 8)
    for known in range(8):
        again = Gated(problem, 5)
        again.update(trials[:known])
        assert exact(again.suggest()) == exact([trials[known]])
    batch = Gated(problem, 5).suggest(6)
    pending = []
    for number, suggestion in enumerate(batch):
        again = Gated(problem, 5)
        again.update([], pending)
        assert exact(again.suggest()) == exact([suggestion])
        pending.append(ended(problem, number, suggestion.genes, state="running", measurement=None))


@pytest.mark.slow
def test_without_proposals_it_is_bo() -> None:
    problem = problem_of(mixed_space(), num_trials=12)
    assert exact(drive(SEARCHERS["gates"](problem, 0), 8)) == exact(drive(SEARCHERS["bo"](problem, 0), 8))


# In a study


def gated_study(folder: Path, **changes: Any) -> Path:
    sections = {
        "search": {"searcher": "gates", "trials": 10, "batch": 4, "rungs": [0.5], "keep": 0.5},
        "baselines": {"names": ["head"], "learning_rates": [1e-2]},
        "finalists": {"seeds": 1, "most": 1},
        "proxy": {"epochs": EPOCHS},
    }
    return save_study(folder, **(sections | changes))


def proposals_of(settings: StudyFile) -> list[Assignment]:
    return json.loads((settings.output_folder / PROPOSALS).read_text())["found"]


def of_gates(snapshot: Snapshot) -> list[Trial]:
    own = [t for t in snapshot.trials if t.role.kind in ("search", "copy")]
    return [t for t in own if t.searcher_state.get("diagnostics", {}).get("phase") == "gates"]


@pytest.fixture(scope="module", autouse=True)
def few_penalties() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proxy_scores, "PENALTIES", TRIED)
        yield


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[float]]:
    """The penalties of every sweep that is trained."""
    found: list[Sequence[float]] = []
    sweep = Gates.sweep

    def watched(self: Gates, penalties: Sequence[float], *args: Any) -> Any:
        found.append(penalties)
        return sweep(self, penalties, *args)

    monkeypatch.setattr(Gates, "sweep", watched)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyFile, Snapshot]:
    settings = load_study(gated_study(tmp_path_factory.mktemp("gates")))
    return settings, run(settings)


@pytest.mark.slow
def test_a_study(finished: tuple[StudyFile, Snapshot]) -> None:
    settings, snapshot = finished
    proposals = proposals_of(settings)
    space = problem_for(settings, snapshot.backbone).space
    sizes = [space.decode(genes).architecture.num_params(snapshot.backbone) for genes in proposals]
    assert len(sizes) == len(TRIED)
    assert sizes == sorted(sizes, reverse=True)
    assert [trial.genes for trial in of_gates(snapshot)] == proposals
    searched = [trial for trial in snapshot.trials if trial.role.kind in ("search", "copy")]
    assert searched[: len(proposals)] == of_gates(snapshot), "they come first"
    assert len([trial for trial in snapshot.search_trials if trial.state in ("complete", "pruned")]) == 10
    assert {trial.state for trial in of_gates(snapshot)} == {"complete"}, "no rung takes them off"
    assert all(trial.genes["training.learning_rate"] == pytest.approx(1e-2) for trial in of_gates(snapshot))
    assert any(row.on_front for row in snapshot.rows())


@pytest.mark.slow
def test_killed_it_goes_on_with_what_was_proposed(
    finished: tuple[StudyFile, Snapshot], tmp_path: Path, sweeps: list[Sequence[float]]
) -> None:
    settings = load_study(gated_study(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run(settings, watcher=Quiet(stop_after=2))
    assert sweeps == [TRIED]
    snapshot = run(settings, resume=True)
    assert sweeps == [TRIED], "no second training of the gates"
    assert facts(list(snapshot.trials)) == facts(list(finished[1].trials))


@pytest.mark.slow
def test_killed_amid_the_gates(finished: tuple[StudyFile, Snapshot], tmp_path: Path) -> None:
    settings = load_study(gated_study(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run(settings, watcher=Quiet(stop_at_stage="training gates"))
    assert not (settings.output_folder / PROPOSALS).exists()
    snapshot = run(settings, resume=True)
    assert facts(list(snapshot.trials)) == facts(list(finished[1].trials))


@pytest.mark.parametrize("text", ['{"settings": "another", "found": []}', slow("[]"), slow('{"settings"')])
def test_proposals_of_other_settings_are_not_taken(tmp_path: Path, sweeps: list[Sequence[float]], text: str) -> None:
    settings = load_study(gated_study(tmp_path, proxy={"epochs": 1}))
    settings.output_folder.mkdir(parents=True)
    (settings.output_folder / PROPOSALS).write_text(text)
    snapshot = run(settings)
    assert len(sweeps) == 1
    (nothing,) = of_gates(snapshot)  # the gates had too little time to find a use for any adapter
    assert [nothing.genes] == proposals_of(settings)
    assert (nothing.state, nothing.candidate.architecture.num_params(snapshot.backbone)) == ("infeasible", 0)


@pytest.mark.slow
def test_one_beyond_a_limit_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest is, and nothing is trained of it."""
    on = {f"lora.rank.on.layers.{n}": True for n in range(3)}
    smallest, largest = ({**on, **{f"lora.rank.layers.{n}": rank for n in range(3)}, **MIDDLE} for rank in (1, 4))
    monkeypatch.setattr(Gates, "sweep", lambda *args: [largest, smallest])
    snapshot = run(load_study(gated_study(tmp_path, constraints={"num_params": 500})))
    first, second = of_gates(snapshot)
    assert (first.genes, first.state) == (largest, "infeasible")
    assert (second.genes, second.state) == (smallest, "complete")


@pytest.mark.slow
def test_gates_that_diverge_do_not_take_the_study_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def diverge(*args: Any) -> None:
        raise TrainingFailedError("the loss with gates became nan")

    monkeypatch.setattr(Gates, "sweep", diverge)
    snapshot = run(load_study(gated_study(tmp_path)))
    assert "the loss with gates became nan" in caplog.text
    assert not of_gates(snapshot)
    assert len([trial for trial in snapshot.search_trials if trial.state in ("complete", "pruned")]) == 10


@pytest.mark.slow
def test_a_space_without_gates_is_searched_by_bo(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    space = {"adapters": {"prefix": {"placement": "layer", "length": [1, 2]}}}
    snapshot = run(load_study(gated_study(tmp_path, space=space)))
    assert "the score `gates` does not support the adapter 'prefix'" in caplog.text
    assert not of_gates(snapshot)
    assert any(trial.state == "complete" for trial in snapshot.search_trials)


def test_the_penalties_ascend() -> None:
    assert list(PENALTIES) == sorted(set(PENALTIES))


def test_bad_settings(tmp_path: Path) -> None:
    with pytest.raises(StudyFileError, match=r"gates needs evaluation\.evaluator: packed"):
        load_study(gated_study(tmp_path, evaluation={"evaluator": "train"}))
    for name in ("gates", "proxy"):
        with pytest.raises(StudyFileError, match=f"unknown searcher '{name}'"):
            load_study(gated_study(tmp_path, proxy={"search": name}))
    with pytest.raises(StudyFileError, match="unknown searcher 'gate'; did you mean 'gates'"):
        load_study(gated_study(tmp_path, search={"searcher": "gate", "trials": 3}))


def test_names() -> None:
    """The searcher is named after the proxy whose gates it has."""
    assert Gated.name == Gates.name
    assert Gates.name in TRAINED
