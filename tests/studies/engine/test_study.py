"""A whole study over a tiny model: phases, ledger, front, resumption, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from autopeft.evaluators.backbones import load_backbone
from autopeft.evaluators.base import Costs
from autopeft.evaluators.data.splits import DataConfig, load_splits
from autopeft.evaluators.training.base import TrainingEvaluator
from autopeft.evaluators.training.train import TrainEvaluator
from autopeft.search_space.architecture import Candidate
from autopeft.search_space.declaration import AdapterChoice
from autopeft.search_space.domains import Choice
from autopeft.search_space.problem import Objective, Problem, Trial, declared_costs
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.searchers import SEARCHERS
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.cli.running import interruptible
from autopeft.studies.config.loading import load_study
from autopeft.studies.config.problem import problem_for
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.check import check
from autopeft.studies.engine.plan import StudyPlan, plan_of, weights_path
from autopeft.studies.engine.scheduled_trials import baselines, num_evaluations
from autopeft.studies.engine.session import open_ledger, open_study, read_snapshot, was_started
from autopeft.studies.engine.study_loop import MOST_BEYOND_LIMITS, StudyLoop
from autopeft.studies.errors import ConfigurationError, NoFeasibleCandidateError
from autopeft.studies.recipes.build import recipe_of
from autopeft.studies.recipes.pick import pick
from autopeft.studies.recipes.recipe import Recipe
from autopeft.studies.storage.ledger import Ledger, StudyRecord

from ...support.slow import mostly_slow, slow
from ...support.tiny_study import LABELS, ROWS, save_data, save_model, save_study


class Quiet:
    """A watcher that counts; `stop_after` evaluations it interrupts, as Ctrl-C does, amid the next batch, or
    half through the stage ahead of the search that begins with `stop_at_stage`.
    """

    def __init__(self, stop_after: int | None = None, stop_at_stage: str = "") -> None:
        self.stop_at_stage = stop_at_stage
        self.ended: list[Trial] = []
        self.planned = 0
        self.stop_after = stop_after

    def plan(self, evaluations: int, done: int) -> None:
        self.planned = evaluations

    def begin(self, trials: Sequence[Trial]) -> None:
        self.running = trials

    def stage(self, name: str, done: int, total: int) -> None:
        if self.stop_at_stage and name.startswith(self.stop_at_stage) and done > total / 2:
            raise KeyboardInterrupt

    def step(self, done: int, total: int) -> None:
        assert 1 <= done <= total
        if self.stop_after is not None and len(self.ended) >= self.stop_after and total / 4 < done < total:
            raise KeyboardInterrupt

    def end(self, trial: Trial, snapshot: Snapshot) -> None:
        self.ended.append(trial)


def run(settings: StudyFile, *, resume: bool = False, watcher: Quiet | None = None) -> Snapshot:
    splits, _, _ = check(settings)
    with open_study(settings, splits, resume=resume) as study:
        return study.run(watcher or Quiet())


@dataclass(frozen=True, eq=False)
class Measured:
    """The numbers of a measurement, equal to others up to rounding.

    What is left of a batch that was interrupted is a smaller pack, and on some machines a matrix product of another
    size rounds otherwise.
    """

    numbers: dict[str, tuple[float, ...]]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Measured) or self.numbers.keys() != other.numbers.keys():
            return False
        return all(
            numbers == pytest.approx(other.numbers[name], rel=1e-5, abs=1e-6) for name, numbers in self.numbers.items()
        )


def measured(trial: Trial) -> Measured | None:
    found = trial.measurement
    if found is None:
        return None
    values = {name: (value,) for name, value in found.values.items()}
    return Measured({"": found.losses, **values, **{f"of {name}": row for name, row in found.per_example.items()}})


def facts(trials: list[Trial]) -> list[tuple]:
    """What must be equal between two runs of one study: everything but times."""
    return [
        (
            t.number, t.role, t.candidate.key, t.seed, t.of, t.state, t.error, dict(t.genes),
            measured(t),
        )
        for t in trials
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyFile, Snapshot, Quiet]:
    settings = load_study(save_study(tmp_path_factory.mktemp("finished") / "study"))
    watcher = Quiet()
    return settings, run(settings, watcher=watcher), watcher


def test_phases(finished) -> None:
    settings, snapshot, watcher = finished
    roles = [str(trial.role) for trial in snapshot.trials]
    searched = [t for t in snapshot.trials if t.role.kind == "search" and t.state == "complete"]
    assert roles[:2] == ["baseline:head", "baseline:lora-r8-qv"]
    assert len(searched) == settings.search.trials
    finalists = [t for t in snapshot.trials if t.role.kind == "finalist"]
    assert roles[-len(finalists) :] == ["finalist"] * len(finalists), "the final front comes last"
    assert {t.seed for t in finalists} == {1, 2}
    assert all(t.measurement.test and t.measurement.test_per_example for t in finalists)
    assert not any(t.measurement.test for t in searched), "the search never sees the test split"
    trained = [t.number for t in snapshot.trials if t.state == "complete"]
    assert sorted(t.number for t in watcher.ended) == trained, "what is rejected needs no evaluation"
    assert len(trained) <= num_evaluations(plan_of(settings), problem_for(settings, snapshot.backbone))
    assert [t.number for t in snapshot.trials] == list(range(len(snapshot.trials)))


def test_empty_candidates_are_rejected_before_training(finished) -> None:
    _, snapshot, _ = finished
    for trial in snapshot.search_trials:
        assert bool(trial.candidate.architecture) == (trial.state != "infeasible")


def test_nothing_is_evaluated_twice(finished) -> None:
    _, snapshot, _ = finished
    keys = [t.candidate.key for t in snapshot.trials if t.role.kind == "search"]
    assert len(keys) == len(set(keys))


def test_front_and_recommendation(finished) -> None:
    _, snapshot, _ = finished
    rows = snapshot.rows()
    members = [row for row in rows if row.on_front]
    assert members
    assert sum(row.recommended for row in rows) == 1
    assert any(str(row.role) == "baseline:head" for row in members), "nothing is cheaper than the head alone"
    assert all(row.std_err["accuracy"] > 0 for row in members)
    assert all(snapshot.entry(row.trial).repeats for row in members), "fresh seeds alone decide"
    for row in members:
        worse = [r for r in members if r.values["num_params"] > row.values["num_params"]]
        assert all(r.values["accuracy"] > row.values["accuracy"] for r in worse)
    curve = snapshot.hypervolume()
    assert curve == sorted(curve)
    assert curve[-1] > 0


def test_baselines_take_the_study_training(finished) -> None:
    settings, snapshot, _ = finished
    planned = list(baselines(plan_of(settings), problem_for(settings, snapshot.backbone).space))
    assert [p.candidate.training["learning_rate"] for p in planned] == [1e-2, 1e-2]
    assert all(p.candidate.training["batch_size"] == 8 for p in planned)


def test_the_ledger_alone_gives_the_same_snapshot(finished) -> None:
    settings, snapshot, _ = finished
    read = read_snapshot(settings, open_ledger(settings))
    assert facts(list(read.trials)) == facts(list(snapshot.trials))
    assert read.rows() == snapshot.rows()


def test_picks(finished) -> None:
    _, snapshot, _ = finished
    members = [row for row in snapshot.rows() if row.on_front]
    best = max(members, key=lambda row: row.values["accuracy"])
    assert pick(snapshot, "best") == best.trial
    assert pick(snapshot, "trial:1") == 1
    assert pick(snapshot, "recommended") == next(row.trial for row in members if row.recommended)
    limit = min(row.values["num_params"] for row in members)
    assert pick(snapshot, f"num_params<={limit:.0f}") in {row.trial for row in members}
    for wish, message in (("trial:99", "no complete trial"), ("cheapest", "use recommended"), ("size<=3", "size")):
        with pytest.raises(ConfigurationError, match=message):
            pick(snapshot, wish)
    with pytest.raises(NoFeasibleCandidateError):
        pick(snapshot, "num_params<=-1")


def test_recipe_promises_what_was_measured(finished, tmp_path: Path) -> None:
    settings, snapshot, _ = finished
    number = pick(snapshot, "recommended")
    recipe = recipe_of(settings, open_ledger(settings), snapshot, number)
    recipe.save(tmp_path / "recipe.yaml")
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    promised = recipe.measured["accuracy"]
    tests = [t.measurement.test["accuracy"] for t in snapshot.trials if t.of == number and t.role.kind == "finalist"]
    assert promised.split == "test"
    assert promised.seeds == (1, 2)
    assert promised.low <= min(tests) <= max(tests) <= promised.high
    assert promised.value == pytest.approx(sum(tests) / 2)
    assert recipe.candidate.key == snapshot.entry(number).trial.candidate.key
    assert weights_path(settings.output_folder, number).is_file()


def test_an_interrupted_study_ends_as_an_uninterrupted_one(finished, tmp_path: Path) -> None:
    _, whole, _ = finished
    settings = load_study(save_study(tmp_path / "study"))
    for resume, stop_after in ((False, 0), (True, 2), (True, 3)):
        with pytest.raises(KeyboardInterrupt):
            run(settings, resume=resume, watcher=Quiet(stop_after))
    running = [t for t in open_ledger(settings).trials() if t.state == "running"]
    assert len(running) == 3, "the batch that was under way is still there"
    snapshot = run(settings, resume=True)
    assert facts(list(snapshot.trials)) == facts(list(whole.trials))


@pytest.mark.slow
def test_sigkill_in_mid_trial(finished, tmp_path: Path) -> None:
    """Killed as no handler can catch it, twice at different moments; then resumed to the end."""
    _, whole, _ = finished
    path = save_study(tmp_path / "study")
    settings = load_study(path)
    for ended, command in ((2, "run"), (5, "resume")):
        process = subprocess.Popen(
            [sys.executable, "-m", "autopeft.studies.cli.app", command, str(path)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for_ended(settings, ended, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    ended_trials = [trial for trial in open_ledger(settings).trials() if trial.state != "running"]
    assert len(ended_trials) < len(whole.trials), "killed too late to say anything"
    snapshot = run(settings, resume=True)
    assert facts(list(snapshot.trials)) == facts(list(whole.trials))


def wait_for_ended(settings: StudyFile, count: int, process: subprocess.Popen, limit_s: float = 120) -> None:
    """Until so many evaluations have ended and others are under way."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and process.poll() is None:
        if was_started(settings):
            states = [trial.state for trial in open_ledger(settings).trials()]
            if len(states) - states.count("running") >= count and "running" in states:
                return
        time.sleep(0.02)
    raise AssertionError(f"the study did not come to {count} evaluations")


def test_sigint_is_polite(tmp_path: Path) -> None:
    path = save_study(tmp_path / "study", search={"searcher": "random", "trials": 300, "batch": 3})
    settings = load_study(path)
    process = subprocess.Popen(
        [sys.executable, "-m", "autopeft.studies.cli.app", "run", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_ended(settings, 2, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "autopeft resume" in errors
    assert "Traceback" not in errors


def test_a_signal_is_not_lost_where_exceptions_are(tmp_path: Path) -> None:
    class Dying:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    settings = load_study(save_study(tmp_path / "study"))
    with pytest.raises(SystemExit) as ended, interruptible(settings) as stop_if_asked:
        stop_if_asked()
        Dying()
        stop_if_asked()
        raise AssertionError("it went on")
    assert ended.value.code == 130
    with pytest.raises(SystemExit), interruptible(settings) as stop_if_asked:
        stop_if_asked()
        for _ in range(2):  # the second one does not wait for a step
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on")
    with pytest.raises(SystemExit), interruptible(settings):  # nor does the first one while there are none
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on")


def test_a_study_that_was_killed_while_it_was_made_begins_anew(tmp_path: Path, monkeypatch) -> None:
    settings = load_study(save_study(tmp_path / "study", search={"searcher": "random", "trials": 2}))

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("autopeft.studies.storage.records.pack", killed)  # between the first attribute and the last
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    assert not was_started(settings)
    assert run(settings).search_trials


def test_more_trials_may_be_asked_for(finished, tmp_path: Path) -> None:
    path = save_study(tmp_path / "study", finalists={"seeds": 1, "most": 1})
    first = run(load_study(path, ["search.trials=3"]))
    second = run(load_study(path, ["search.trials=5"]), resume=True)
    complete = [t for t in second.search_trials if t.state == "complete"]
    assert len(complete) == 5
    assert facts(list(second.trials))[: len(first.trials)] == facts(list(first.trials))


@pytest.mark.slow
def test_a_bound_keeps_candidates_off_the_front(tmp_path: Path) -> None:
    objectives = ["accuracy", {"name": "num_params", "bound": 400}]
    settings = load_study(save_study(tmp_path / "study", objectives=objectives))
    snapshot = run(settings)
    assert all(row.values["num_params"] <= 400 for row in snapshot.rows() if row.on_front)
    assert any(t.violation > 0 and t.state == "complete" for t in snapshot.search_trials)


@pytest.mark.slow
def test_measured_objectives(tmp_path: Path) -> None:
    objectives = ["loss", "num_params", "peak_memory_bytes", "latency_s"]
    changes = {"objectives": objectives, "search": {"searcher": "nsga2", "trials": 2}}
    snapshot = run(load_study(save_study(tmp_path / "study", **changes, finalists={"seeds": 1, "most": 1})))
    trial = next(t for t in snapshot.search_trials if t.state == "complete")
    assert trial.measurement.values["peak_memory_bytes"] > 0
    assert trial.measurement.spread["latency_s"] >= 0
    assert snapshot.quality == "loss"


def test_a_candidate_that_cannot_be_measured_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = TrainingEvaluator.costs

    def breaking(self, candidate, measured=frozenset()):
        if measured and {spec.size for _, spec in candidate.architecture} == {2}:
            raise ValueError("no such kernel")
        return costs(self, candidate, measured)

    monkeypatch.setattr(TrainingEvaluator, "costs", breaking)
    changes = {
        "objectives": ["loss", "peak_memory_bytes"],
        "search": {"searcher": "grid", "trials": 3, "batch": 3},
        "space": {"adapters": {"lora": {"rank": [1, 2, 4]}}},
        "training": {"epochs": 1, "batch_size": 8},
        "baselines": {"names": ["head"]},
    }
    snapshot = run(load_study(save_study(tmp_path / "study", **changes, finalists={"seeds": 1, "most": 1})))
    found = {t.candidate.architecture.adapters[0][1][0].size: (t.state, t.error) for t in snapshot.search_trials}
    assert found.pop(2) == ("failed", "ValueError: no such kernel")
    assert set(found.values()) == {("complete", None)}


@pytest.mark.parametrize(
    "searcher", mostly_slow(("bo", "random", "qmc", "nsga2", "evolution", "linas", "grid"), "bo", "random")
)
def test_every_searcher_runs_a_study(searcher: str, tmp_path: Path) -> None:
    changes = {
        "search": {"searcher": searcher, "trials": 2},
        "space": {"adapters": {"lora": {"rank": [1, 2]}}},
        "baselines": {"names": ["head"], "learning_rates": [1e-2]},
        "finalists": {"seeds": 1, "most": 1},
    }
    snapshot = run(load_study(save_study(tmp_path / "study", **changes)))
    assert len([t for t in snapshot.search_trials if t.state == "complete"]) == 2


def test_an_exhausted_grid_ends_the_search(tmp_path: Path) -> None:
    changes = {
        "search": {"searcher": "grid", "trials": 50},
        "space": {"adapters": {"lora": {"rank": [1, 2]}}},
        "training": {"learning_rate": 1e-2, "epochs": 1, "batch_size": 8},
        "finalists": {"seeds": 1, "most": 1},
    }
    snapshot = run(load_study(save_study(tmp_path / "study", **changes)))
    assert len(snapshot.search_trials) == 2


def test_json_on_stdout_alone(finished, capfd: pytest.CaptureFixture) -> None:
    from autopeft.studies.cli.app import main

    settings, _, _ = finished
    for command in ("pareto", "status"):
        with pytest.raises(SystemExit) as exit_:
            main([command, str(settings.path), "--json"])
        assert exit_.value.code == 0
        printed = json.loads(capfd.readouterr().out)
        if command == "pareto":
            assert {"trial", "key", "values", "std_err", "recommended"} <= printed[0].keys()
        else:
            assert printed["study"] == "tiny"
            assert printed["trials"]["complete"] > 0
            assert printed["hypervolume"] > 0


@pytest.mark.parametrize("searcher", ["tpe", slow("bo")])
def test_halving_prunes_and_resumes(searcher: str, tmp_path: Path) -> None:
    """A batch of six, half of it goes on at each of two rungs; interrupted in mid-batch it ends the same."""
    search = {"searcher": searcher, "trials": 12, "batch": 6, "rungs": [0.25, 0.5], "keep": 0.5}
    changes = {"search": search, "finalists": {"seeds": 1, "most": 1}}
    whole = run(load_study(save_study(tmp_path / "whole", **changes)))
    states = [t.state for t in whole.search_trials if t.state != "infeasible"]
    assert states.count("pruned") == 8
    assert states.count("complete") == 4
    pruned = [t for t in whole.search_trials if t.state == "pruned"]
    assert {t.measurement.share for t in pruned} == {0.25, 0.5}
    assert all("of the steps" in t.error for t in pruned)
    assert not any(row.trial == t.number for row in whole.rows() for t in pruned), "no pruned candidate on the front"
    settings = load_study(save_study(tmp_path / "stopped", **changes))
    for resume, stop_after in ((False, 2), (True, 0)):  # in the search, which is recorded batch by batch
        with pytest.raises(KeyboardInterrupt):
            run(settings, resume=resume, watcher=Quiet(stop_after))
    assert facts(list(run(settings, resume=True).trials)) == facts(list(whole.trials))


@pytest.mark.slow
def test_racing_at_the_rungs_prunes_and_resumes(tmp_path: Path) -> None:
    """With `keep: auto`, all of the first batch end, and later ones are compared with them; a stop changes nothing."""
    search = {"searcher": "bo", "trials": 18, "batch": 6, "rungs": [0.5], "keep": "auto"}
    changes = {"search": search, "finalists": {"seeds": 1, "most": 1}, "baselines": {"names": ["head"]}}
    whole = run(load_study(save_study(tmp_path / "whole", **changes)))
    states = [t.state for t in whole.search_trials if t.state != "infeasible"]
    assert states[:6] == ["complete"] * 6
    assert "pruned" in states[6:]
    settings = load_study(save_study(tmp_path / "stopped", **changes))
    with pytest.raises(KeyboardInterrupt):
        run(settings, watcher=Quiet(9))
    assert facts(list(run(settings, resume=True).trials)) == facts(list(whole.trials))


def test_one_by_one_and_packed_find_the_same(finished, tmp_path: Path) -> None:
    """The evaluator is no setting of what is found."""
    _, whole, _ = finished
    settings = load_study(save_study(tmp_path / "study", evaluation={"evaluator": "train"}))
    for ours, theirs in zip(run(settings).trials, whole.trials, strict=True):
        assert (ours.candidate.key, ours.seed, ours.state) == (theirs.candidate.key, theirs.seed, theirs.state)
        if ours.measurement and theirs.measurement:
            assert ours.measurement.values == pytest.approx(theirs.measurement.values, rel=1e-4)


def test_a_study_of_python_parts_alone(tmp_path: Path) -> None:
    """Without a study file: a space, a problem, an evaluator, a searcher, a ledger and a plan."""
    save_data(tmp_path)
    loaded = load_backbone(str(save_model(tmp_path / "model")), task="classification", labels=LABELS)
    files = {split: f"{split}.jsonl" for split in ROWS}
    splits = load_splits(DataConfig(source="files", **files, folder=tmp_path), "classification")
    adapters = {"lora": AdapterChoice(kind="lora", at=("attn.q",), fields={"rank": Choice.of([1, 2, 4])})}
    space = SearchSpace(
        backbone=loaded.backbone, adapters=adapters, training={"learning_rate": 1e-2, "batch_size": 8, "epochs": 1}
    )
    objectives = (Objective.of("accuracy"), Objective.of("num_params"))
    about = StudyRecord(
        objectives=objectives, backbone=space.backbone, labels=splits.labels, domains=None, settings="", fingerprint={}
    )
    study = StudyLoop(
        Problem(space=space, objectives=objectives, num_trials=2),
        TrainEvaluator(loaded, "classification", splits, max_length=16),
        SEARCHERS["random"],
        Ledger.create(f"sqlite:///{tmp_path / 'ledger.db'}", "parts", about),
        tracker=None,
        plan=StudyPlan(study="parts", output_folder=tmp_path, baselines=("head",), learning_rates=(1e-2,)),
    )
    snapshot = study.run(Quiet())
    assert [str(trial.role) for trial in snapshot.trials[:2]] == ["baseline:head", "search"]
    assert len([trial for trial in snapshot.search_trials if trial.state == "complete"]) == 2
    finalists = [trial for trial in snapshot.trials if trial.seed == 1]
    assert len(finalists) == 2, "the baseline and the best candidate"
    assert weights_path(tmp_path, next(row.trial for row in snapshot.rows() if row.recommended)).is_file()


@pytest.mark.slow
def test_a_limit_that_nothing_meets_ends_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A measured cost is known after its measurement alone, so candidates are proposed and ruled out, one by one."""
    limits = {"latency_s": 1e-9}
    settings = load_study(
        save_study(tmp_path, constraints=limits, search={"searcher": "random", "trials": 4, "batch": 3})
    )
    monkeypatch.setattr(TrainingEvaluator, "costs", slow_costs)
    with pytest.raises(NoFeasibleCandidateError, match="latency_s"):
        run(settings)
    ruled_out = [trial for trial in open_ledger(settings).trials() if trial.state == "infeasible"]
    assert MOST_BEYOND_LIMITS <= len(ruled_out) <= 3 * MOST_BEYOND_LIMITS


def slow_costs(self: TrainingEvaluator, candidate: Candidate, measured: frozenset[str] = frozenset()) -> Costs:
    values = declared_costs(candidate.architecture, self.backbone)
    return Costs(values={**values, **dict.fromkeys(measured, 1.0)}, spread=dict.fromkeys(measured, 0.1))
