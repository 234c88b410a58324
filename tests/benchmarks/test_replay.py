"""Replays of recorded searches: exact without a perturbation, whatever happened; and what last digits change."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from uuid import uuid4

import pytest
from typing_extensions import override

from autopeft.benchmarks import __main__ as cli
from autopeft.benchmarks.contest import SilentWatcher
from autopeft.benchmarks.replay import Recording, Stability, stability, to_dict, to_markdown
from autopeft.evaluators.base import Costs, Evaluator, OnOutcome, Outcome, Progress, Request, Select
from autopeft.search_space import AdapterChoice, Candidate, Choice, Float, Objective, Problem, SearchSpace
from autopeft.search_space.limits import Limits
from autopeft.search_space.problem import COPY, SEARCH, Measurement, declared_costs
from autopeft.searchers import SEARCHERS
from autopeft.studies.engine.plan import StudyPlan
from autopeft.studies.engine.study_loop import StudyLoop
from autopeft.studies.storage.ledger import Ledger, StudyRecord
from autopeft.testing.spaces import SMALL

BEFORE = Path(__file__).parents[1] / "studies" / "before" / "folders"
ERROR = 0.03


class Formula(Evaluator):
    """Values by a formula and noise of the candidate's own; some trainings fail, the worse half stops at a rung."""

    name = "formula"

    @override
    def costs(self, candidate: Candidate, measured: frozenset[str] = frozenset()) -> Costs:
        values = declared_costs(candidate.architecture, SMALL)
        return Costs(values={**values, **dict.fromkeys(measured, 0.001 + values["num_params"] / 1e6)})

    @override
    def num_steps(self, request: Request) -> int:
        return 8

    @override
    def evaluate(
        self,
        requests: Sequence[Request],
        progress: Progress | None = None,
        *,
        ended: OnOutcome | None = None,
        select: Select | None = None,
    ) -> list[Outcome]:
        losses = [self.loss(request.candidate) for request in requests]
        at_rung = [{"loss": loss + 0.2, "accuracy": 0.9 - loss / 2} for loss in losses]
        alive = range(len(requests)) if select is None else select(0.5, list(enumerate(at_rung)))
        outcomes = []
        for place, (request, loss) in enumerate(zip(requests, losses, strict=True)):
            fields = {"values": at_rung[place], "share": 0.5}
            if place in alive:
                values = {"loss": loss, "accuracy": 1 - loss / 2}
                fields = {"values": values, "std_err": dict.fromkeys(values, ERROR)}
            outcome = Outcome(measurement=Measurement(**fields, rungs=((0.5, at_rung[place]),)))
            if Random(request.candidate.key).random() < 0.2:
                outcome = Outcome(failure="failed", reason="the loss became nan")
            outcomes.append(outcome)
            if ended is not None:
                ended(place, outcome)
        return outcomes

    def loss(self, candidate: Candidate) -> float:
        size = candidate.architecture.num_params(SMALL)
        rate = candidate.training["learning_rate"]
        return 1.2 - size / (size + 400) / 2 + abs(rate - 0.01) + Random(candidate.key).gauss(0, ERROR)


def recorded(folder: Path, searcher: str, trials: int = 24) -> Recording:
    """A study of a small space, in which searchers repeat themselves, under limits, with rungs and start points."""
    lora = AdapterChoice(kind="lora", fields={"rank": Choice.of([0, 1, 2, 4, 8])}, vary={"rank": "layer"})
    training = {"learning_rate": Float(low=1e-3, high=1e-1, log=True)}
    space = SearchSpace(backbone=SMALL, adapters={"lora": lora}, training=training)
    objectives = tuple(map(Objective.of, ("loss", "num_params")))
    problem = Problem(
        space=space,
        objectives=objectives,
        num_trials=trials,
        limits=Limits({"num_params": 1500, "step_s": 0.002}),
        start=(space.smallest(), space.smallest()),
    )
    plan = StudyPlan(study=searcher, output_folder=folder, batch=4, rungs=(0.5,), keep=0.5,
                     baselines=("head", "lora-r8-qv"), learning_rates=(1e-2,))  # fmt: skip
    record = StudyRecord(objectives=objectives, backbone=SMALL, labels=None, settings="", fingerprint={})
    ledger = Ledger.create(f"sqlite:///{folder / uuid4().hex}.db", searcher, record)
    loop = StudyLoop(problem, Formula(), SEARCHERS[searcher], ledger, None, plan)
    loop._evaluate_planned("baseline", (), loop._baselines(), SilentWatcher())
    loop._search((), SilentWatcher())
    return Recording(
        study=searcher,
        problem=problem,
        plan=plan,
        searcher=SEARCHERS[searcher],
        baselines=tuple(t for t in ledger.trials() if t.role.kind == "baseline"),
        trials=tuple(t for t in ledger.trials() if t.role in (SEARCH, COPY)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("searcher", ["random", "tpe", "nsga2", "evolution", "linas", "bo"])
def test_without_a_perturbation_all_trials_are_kept(searcher: str, tmp_path: Path) -> None:
    recording = recorded(tmp_path, searcher)
    assert recording.kept() == len(recording.trials) > 24
    # A replay has met everything that a search can meet.
    assert {"complete", "pruned", "failed", "infeasible"} == {trial.state for trial in recording.trials}
    assert any(trial.role == COPY for trial in recording.trials)
    if searcher != "random":
        assert recording.perturbed(0.3, 1).kept() < len(recording.trials), "outcomes do decide"


def test_a_measured_limit_ends_a_trial_in_the_replay_too(tmp_path: Path) -> None:
    """Only the ledger knows what was measured of a candidate that was ruled out by it."""
    recording = recorded(tmp_path, "nsga2")
    assert recording.kept() == len(recording.trials)
    measured = [trial for trial in recording.trials if trial.error and "step_s" in trial.error]
    assert measured
    assert all(trial.measurement is None for trial in measured)


@pytest.mark.slow
def test_last_digits_change_no_trial_because_observations_are_rounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = stability(recorded(tmp_path, "linas", 16), by=1e-5, repeats=3)
    assert found.perturbed == (len(found.trials),) * 3
    monkeypatch.setattr("autopeft.searchers.base.rounded", tuple)
    found = stability(recorded(tmp_path, "linas", 16), by=1e-5, repeats=3)
    assert found.unperturbed == len(found.trials)
    assert min(found.perturbed) < len(found.trials), "else this test would show nothing"


def test_perturbations_are_small_seeded_and_spare_costs(tmp_path: Path) -> None:
    recording = recorded(tmp_path, "random", 8)
    again, other = recording.perturbed(1e-3, 0), recording.perturbed(1e-3, 1)
    assert recording.perturbed(1e-3, 0) == again != other
    for before, after in zip(recording.trials, again.trials, strict=True):
        if before.measurement is None:
            assert after == before
            continue
        assert after.measurement is not None
        assert after.values["num_params"] == before.values["num_params"]
        assert after.values["loss"] != before.values["loss"]
        assert after.values == pytest.approx(before.values, rel=1e-3)
        assert dict(after.measurement.rungs)[0.5] == pytest.approx(dict(before.measurement.rungs)[0.5], rel=1e-3)
        assert after.measurement.rungs != before.measurement.rungs
    assert recording.perturbed(0.0, 0) == recording


def test_report() -> None:
    found = [
        Stability(study="a", trials=(2, 3, 5, 6), unperturbed=4, perturbed=(4, 2)),
        Stability(study="b", trials=(0, 1), unperturbed=1, perturbed=(1, 1)),
    ]
    text = to_markdown(found, 1e-6)
    assert "| a | 4 | all | all | to 5 |" in text
    assert "Without a perturbation, b came out otherwise" in text
    assert "came out otherwise" not in to_markdown(found[:1], 1e-6)
    first = to_dict(found, 1e-6)["studies"][0]  # type: ignore[index]
    assert first["perturbed"] == [{"kept": 4, "first_other": None}, {"kept": 2, "first_other": 5}]


# The command


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """The study of an earlier version: neither its model nor its data are here."""
    text = {path.name: path.read_text().replace("@FOLDER@", str(tmp_path)) for path in BEFORE.iterdir()}
    (tmp_path / "study.yaml").write_text(text["study.yaml"])
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    with sqlite3.connect(folder / "ledger.db") as ledger:
        ledger.executescript(text["ledger.sql"])
    ledger.close()
    return tmp_path


def invoked(*words: object) -> int:
    with pytest.raises(SystemExit) as exited:
        cli.main(["perturb", *map(str, words)])
    return int(exited.value.code or 0)


def test_the_command_replays_an_old_ledger(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (study / "runs" / "tiny" / "ledger.db").read_bytes()
    assert invoked(study, "--repeats", 2, "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["studies"]
    assert found["unperturbed"] == {"kept": found["trials"], "first_other": None}
    assert len(found["perturbed"]) == 2
    assert (study / "runs" / "tiny" / "ledger.db").read_bytes() == before
    assert invoked(study / "study.yaml", "--repeats", 1) == 0
    assert "| tiny | " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("seed=4", "seed: was 0, is 4"),
        ("output=elsewhere", "has no study to replay; `autopeft run` makes one"),
        ("search.searcher=proxy", "proxy starts from scores that a model gives"),
    ],
)
def test_studies_that_cannot_be_replayed(
    change: str, error: str, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoked(study, "--set", change) == 2
    assert error in capsys.readouterr().err


def test_a_search_that_goes_on(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with sqlite3.connect(study / "runs" / "tiny" / "ledger.db") as ledger:
        ledger.execute("DELETE FROM trial_user_attributes WHERE key = 'autopeft.result' AND trial_id = 4")
        ledger.execute("UPDATE trials SET state = 'RUNNING' WHERE trial_id = 4")
    ledger.close()
    assert invoked(study) == 2
    assert "its search has not ended: `autopeft resume` ends it" in capsys.readouterr().err


def test_replaced_trials_are_the_recorded_ones(tmp_path: Path) -> None:
    """A recording of another search departs at once, and the number is that of the ledger."""
    recording = recorded(tmp_path, "tpe", 12)
    trials = recording.trials
    other = replace(recording, trials=(*trials[:6], trials[7], *trials[7:]))
    found = stability(other, by=0.0, repeats=1)
    assert found.first_other(found.unperturbed) == trials[7].number
