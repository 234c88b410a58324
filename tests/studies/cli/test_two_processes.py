"""A study that runs refuses every second start of it, and trains everything once."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest

from autopeft.studies.cli.app import main
from autopeft.studies.config.loading import load_study
from autopeft.studies.engine.session import is_running, open_ledger
from autopeft.studies.errors import ConfigurationError
from autopeft.studies.notebook import Study

from ...support.tiny_study import save_study

#: Long enough for all attempts.
LONG = {"search": {"searcher": "random", "trials": 4, "batch": 2}, "finalists": {"seeds": 1, "most": 1},
        "training": {"learning_rate": [0.03, 0.1], "epochs": 100, "batch_size": 8}}  # fmt: skip


@pytest.mark.slow
def test_a_second_process_is_refused_however_it_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_study(tmp_path / "study", storage=f"sqlite:///{tmp_path}/shared.db", **LONG)
    settings = load_study(path)
    (tmp_path / "linked").symlink_to(path.parent)
    (tmp_path / "link.db").symlink_to(tmp_path / "shared.db")
    first = os.fork()
    if not first:
        try:
            main(["run", str(path)])
        except SystemExit as ended:
            os._exit(int(ended.code or 0))
        os._exit(1)
    try:
        until = time.monotonic() + 60
        while not ((tmp_path / "shared.db").exists() and is_running(settings)) and time.monotonic() < until:
            time.sleep(0.05)
        monkeypatch.chdir(path.parent)
        moved = ["--set", "output=other"]
        for words in (
            ["run", str(path)], ["run", ".", "--resume"], ["resume", "."], ["resume", str(tmp_path / "linked")],
            ["resume", ".", *moved], ["run", ".", "--resume", *moved], ["run", ".", *moved],
            ["resume", ".", *moved, "--set", "storage=sqlite:///../link.db"],
        ):  # fmt: skip
            with pytest.raises(SystemExit) as ended:
                main(words)
            assert (ended.value.code, "another process is running" in capsys.readouterr().err) == (2, True), words
        with pytest.raises(ConfigurationError, match="another process is running"):
            Study.load(path).run(progress=False)
        assert is_running(settings), "all attempts fell into its run"
    finally:
        _, status = os.waitpid(first, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    trials = open_ledger(settings).trials()
    assert not any(trial.state == "running" for trial in trials)
    searched = Counter(
        trial.candidate.key for trial in trials if str(trial.role) == "search" and trial.state == "complete"
    )
    assert sum(searched.values()) == 4
    assert set(searched.values()) == {1}
