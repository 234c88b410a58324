"""What comes after expensive work may fail: nothing that was trained is lost, and one line says what is missing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autopeft.evaluators.base import Costs, Outcome
from autopeft.evaluators.training.base import TrainingEvaluator
from autopeft.evaluators.training.train import TrainEvaluator
from autopeft.search_space.architecture import Candidate
from autopeft.studies.cli import results
from autopeft.studies.cli.app import main
from autopeft.studies.cli.progress import ProgressView
from autopeft.studies.config.loading import load_study
from autopeft.studies.engine import retraining, study_loop
from autopeft.studies.exporters.native import Native
from autopeft.studies.reports import page, pictures, report
from autopeft.studies.tracking import mlflow_sync

from ...support.slow import slow
from ...support.tiny_study import save_study
from .test_study import run

Command = Callable[..., tuple[int, str, str]]
SHORT = {
    "search": {"searcher": "random", "trials": 3, "batch": 3},
    "finalists": {"seeds": 2, "most": 1},
    "baselines": {"names": ["head"], "learning_rates": [1.0e-2]},
}


class InjectedError(RuntimeError):
    """An error that no code expects."""


def broken(*_: Any, **__: Any) -> Any:
    raise InjectedError("injected\nwith a second line")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that has ended; to resume it takes all steps after the trainings again."""
    path = save_study(tmp_path_factory.mktemp("after") / "study", **SHORT)
    run(load_study(path))
    return path


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Command:
    """Run a command; return its exit code, stdout and stderr with what is logged there."""

    def command(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        caplog.clear()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        found = capfd.readouterr()
        assert "Traceback" not in found.err
        return int(ended.value.code or 0), found.out, "\n".join((found.err, *caplog.messages))

    return command


@pytest.mark.parametrize(
    ("place", "name", "said"),
    [
        (page, "front_html", "front.html: cannot be made (InjectedError: injected)"),
        slow(pictures, "front_png", "front.png: cannot be made"),
        slow(pictures, "curves_png", "curves.png: cannot be made"),
        slow(pictures, "hypervolume_png", "hypervolume.png: cannot be made"),
        slow(report, "front_notes", "front.html: cannot be made"),
        slow(report, "front_data", "front.json: cannot be made"),
        slow(report, "_write_csv", "front.csv: cannot be made"),
        slow(report, "verdicts", "report: cannot be made"),
        slow(results, "print_front", "the table of the front cannot be shown (InjectedError: injected)"),
        (study_loop, "outlook_of", "what more time would buy"),
    ],
)
def test_no_report_ends_a_study(
    study: Path, command: Command, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, said: str
) -> None:
    folder = study.parent / "runs" / "tiny" / "report"
    for file in folder.glob("*"):
        file.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(place, name, broken)
        code, _, err = command("resume", study)
    assert code == 0, err
    assert err.count(said) == 1
    assert err.count("injected") == err.count("warning: ") + err.count("more time") >= 1, "a line for each step"
    missing = {Path(line.split(": ")[1]).name for line in err.splitlines() if "cannot be made" in line}
    if "report" not in missing:
        whole = {"front.html", "front.png", "front.json", "front.csv", "curves.png", "hypervolume.png"}
        assert {file.name for file in folder.iterdir()} == whole - missing, "all others are there"
    assert command("pareto", study, "--json")[0] == 0
    assert command("export", study, "--to", "native", "--force")[0] == 0
    assert (command("resume", study)[0], (folder / "front.html").is_file()) == (0, True)


@pytest.mark.slow
def test_a_picture_that_fails_does_not_keep_results_from_mlflow(
    study: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked = ("--set", "tracking.enabled=true", "--set", "tracking.uri=sqlite:///ml.db")
    sent: list[str] = []
    monkeypatch.setattr(pictures, "front_png", broken)
    original = mlflow_sync.write_report

    def write_report(snapshot: Any, folder: Path) -> Any:
        found = original(snapshot, folder)
        sent.extend(file.name for file in found.files)
        return found

    monkeypatch.setattr(mlflow_sync, "write_report", write_report)
    code, _, err = command("resume", study, *tracked)
    assert code == 0
    assert "cannot be reached" not in err
    assert "front.json" in sent
    assert "front.png" not in sent


@pytest.mark.slow
def test_a_line_that_fails_stops_no_study(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a measured cost that fails ends that trial alone."""
    path = save_study(tmp_path, **SHORT, objectives=["accuracy", "num_params", "peak_memory_bytes"])
    monkeypatch.setattr(ProgressView, "_line", broken)
    costs, measured_candidates = TrainingEvaluator.costs, []

    def once(self: TrainingEvaluator, candidate: Candidate, measured: frozenset[str] = frozenset()) -> Costs:
        if measured and candidate.architecture:
            measured_candidates.append(candidate)
            if len(measured_candidates) == 1:
                raise InjectedError("no memory can be measured")
        return costs(self, candidate, measured)

    monkeypatch.setattr(TrainingEvaluator, "costs", once)
    code, _, err = command("run", path)
    assert code == 0, err
    assert "failed (its line cannot be shown: InjectedError: injected)" in err
    assert (tmp_path / "runs" / "tiny" / "report" / "front.json").is_file()
    states = json.loads(command("status", path, "--json")[1])["trials"]
    assert states["failed"] == 1
    code, out, err = command("plan", path)
    assert (code, "memory " in out) == (0, True)
    monkeypatch.setattr(TrainingEvaluator, "costs", lambda self, candidate, measured=frozenset(): (
        broken() if measured else costs(self, candidate, measured)))  # fmt: skip
    monkeypatch.setattr(TrainingEvaluator, "pace", lambda *_: broken())
    code, out, err = command("plan", path)
    assert (code, "memory " in out, "time  " in out, "parameters" in out) == (0, False, False, True)
    assert err.count("cannot be measured: InjectedError: injected") == 2
    assert command("plan", path, "--json")[0] == 0


def test_an_error_in_the_search_says_how_to_go_on(
    study: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_loop, "num_evaluations", broken)
    code, _, err = command("resume", study)
    assert code == 1
    assert "finished work is saved" in err
    assert err.count("InjectedError") == 1


def test_weights_are_kept_if_their_export_fails(
    study: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("export", study, "--to", "native", "--out", tmp_path / "made")[0] == 0
    recipe = tmp_path / "made" / "recipe.yaml"
    with monkeypatch.context() as patched:
        patched.setattr(Native, "write", broken)
        code, _, err = command("train", recipe, "--out", tmp_path / "trained")
    kept = tmp_path / "trained-weights.safetensors"
    assert code == 1
    assert err.count("InjectedError: injected\n") == 1
    assert "the training has ended (test loss" in err
    assert f"its weights are in {kept}" in err
    assert kept.stat().st_size > 0
    assert command("train", recipe, "--out", tmp_path / "trained")[0] == 0

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("trained in vain")

    monkeypatch.setattr(retraining, "retrain", never)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine", encoding="utf-8")
    code, _, err = command("train", recipe, "--out", tmp_path / "mine", "--force")
    assert (code, "has no earlier export to replace" in err) == (1, True), "said before the training"
    code, _, err = command("train", recipe, "--out", recipe)
    assert (code, "is a file, not a folder" in err) == (1, True)


def test_verify_says_what_the_other_seeds_reached(
    study: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("export", study, "--to", "native", "--out", tmp_path / "made")[0] == 0
    evaluate = TrainEvaluator.evaluate

    def second_fails(self: TrainEvaluator, requests: Any, *more: Any, **named: Any) -> list[Outcome]:
        return [evaluate(self, requests[:1], *more, **named)[0], Outcome(failure="failed", reason="diverged")]

    monkeypatch.setattr(TrainEvaluator, "evaluate", second_fails)
    code, _, err = command("verify", tmp_path / "made" / "recipe.yaml")
    assert code == 1
    assert re.search(r"training with seed 4 failed: diverged\nseed 3: test loss \d", err), err
