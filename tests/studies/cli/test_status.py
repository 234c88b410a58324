"""`status` and `pareto` report a study as it is: counts, interrupted evaluations, preliminary recommendations."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

from autopeft.search_space.problem import COPY, FINALIST, Trial
from autopeft.studies.cli import results
from autopeft.studies.cli.app import main
from autopeft.studies.config.loading import load_study
from autopeft.studies.engine.session import is_running
from autopeft.studies.storage.locks import LOCK_FILE

from ...support.tiny_study import save_study
from ...support.tracked_study import TRIALS, snapshot, trial

Command = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_study(tmp_path, search={"trials": 5, "batch": 2})
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command on a study with these trials, and return the text on stdout."""

    def command(name: str, trials: tuple[Trial, ...], *more: str, planned: int = 0) -> str:
        found = (load_study(folder), SimpleNamespace(planned=planned), snapshot(trials))
        monkeypatch.setattr(results, "recorded", lambda study, set_: found)
        with pytest.raises(SystemExit) as exit_:
            main([name, str(folder), *more])
        captured = capsys.readouterr()
        assert exit_.value.code == 0, captured.err
        return captured.out

    return command


REJECTED = replace(trial(6, 0.0, 64), state="infeasible", measurement=None, error="num_params")
COPIED = replace(trial(7, 0.8, 16), role=COPY, of=4)
RUNNING = replace(trial(8, 0.0, 2), state="running", measurement=None)


def test_the_search_counts_planned_trials(command: Command) -> None:
    """A rejected candidate, a copy and a baseline are not trials of the plan, and a copy is no evaluation."""
    text = command("status", (*TRIALS, REJECTED, COPIED))
    assert "evaluations: 5 complete, 1 failed\n" in text
    assert "search       5 of 5 trials; candidates rejected without training: 1\n" in text
    assert "search       5 of 8 trials" in command("status", TRIALS, "--set", "search.trials=8")
    assert "search       4 of 5 trials\n" in command("status", (*TRIALS[:5], replace(RUNNING, number=5)))


def test_the_search_never_has_more_than_all_trials(command: Command) -> None:
    """`resume --set search.trials=8` leaves the study file as it is; the ledger has what it was."""
    fewer = ("--set", "search.trials=3")
    assert "search       5 of 5 trials\n" in command("status", TRIALS, *fewer)
    assert "search       5 of 8 trials\n" in command("status", TRIALS, *fewer, planned=8)
    assert "search       5 of 9 trials\n" in command("status", TRIALS, "--set", "search.trials=9", planned=8)


def test_evaluations_are_trainings(command: Command) -> None:
    assert "time         32 s of evaluations, 77% of it in training steps\n" in command("status", TRIALS)
    assert "from 6 evaluations" in command("pareto", (*TRIALS, REJECTED, COPIED))


def test_evaluations_without_a_process_are_interrupted(command: Command, folder: Path) -> None:
    """Only the process that holds the lock is training; the lock's file stays after a kill."""
    lock, trials = FileLock(folder / "runs" / "tiny" / LOCK_FILE), (*TRIALS, RUNNING)
    for _ in range(2):
        text = command("status", trials)
        assert "evaluations: 5 complete, 1 failed, 1 interrupted\n" in text
        assert f"`autopeft resume {load_study(folder).words}` trains them again" in text
        found = json.loads(command("status", trials, "--json"))
        assert (found["interrupted"], found["trials"]["running"]) == (1, 1)
        with lock:
            assert "evaluations: 5 complete, 1 failed, 1 running\n" in command("status", trials)
            assert json.loads(command("status", trials, "--json"))["interrupted"] == 0


def test_asking_for_the_lock_leaves_it(folder: Path) -> None:
    settings = load_study(folder)
    file = folder / "runs" / "tiny" / LOCK_FILE
    assert not is_running(settings)
    assert not file.exists()
    with FileLock(file):
        assert is_running(settings)
        assert is_running(settings)
    assert not is_running(settings)
    with FileLock(file, timeout=0):
        pass


def test_a_front_without_fresh_seeds_is_preliminary(command: Command) -> None:
    """Fresh seeds are trained at the end of the study: until the last of them has ended, something is missing."""
    again = [replace(trial(number, 0.76, 16), role=FINALIST, of=4, seed=number) for number in (6, 7)]
    waiting = replace(again[1], state="running", measurement=None)
    for trials in (TRIALS, (*TRIALS, again[0], waiting)):
        text = " ".join(command("pareto", trials).split())
        assert "on the preliminary front" in text
        assert "(*) Recommended: " in text
        assert "recommendation is preliminary" in text
        assert "Missing: runs of the finalists with fresh seeds" in text
        assert all(row["preliminary"] is True for row in json.loads(command("pareto", trials, "--json")))
        assert "candidates (preliminary)\n" in command("status", trials)
    final = (*TRIALS, *again)
    text = command("pareto", final)
    assert "preliminary" not in text
    assert "\n* Recommended: " in text
    found = json.loads(command("pareto", final, "--json"))
    assert [(row["trial"], row["recommended"], row["preliminary"]) for row in found] == [(4, True, False)]
    assert {"trial", "key", "values", "std_err", "recommended", "summary"} <= found[0].keys()
    assert "preliminary" not in command("status", final)
