"""A disk that fills up at any write of a study: one sentence with the file, and the study goes on as if it had not."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from autopeft.evaluators.atomic import disk_error
from autopeft.evaluators.base import Request
from autopeft.evaluators.training.record import failure
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.cli.app import main
from autopeft.studies.config.loading import load_study
from autopeft.studies.engine import study_loop
from autopeft.studies.engine.exporting import export_trial
from autopeft.studies.engine.session import open_ledger, read_snapshot, was_started
from autopeft.studies.errors import UnusableEnvironmentError
from autopeft.studies.exporters.base import ExportError

from ...support.full_disk import full_from
from ...support.slow import slow
from ...support.tiny_study import save_study
from ...support.tracked_study import candidate
from .test_kills import STUDY
from .test_study import facts, run

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
CACHED = {"evaluation": {"cache_folder": "cache"}}
REPORT = {"front.html", "front.png", "front.json", "front.csv", "curves.png", "hypervolume.png"}
SHORT = {"search": {"searcher": "random", "trials": 2, "batch": 2}, "finalists": {"seeds": 1, "most": 1}}


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0), capsys.readouterr().err


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Snapshot, list[str]]:
    path = save_study(tmp_path_factory.mktemp("whole"), **STUDY, **CACHED)
    with full_from(None) as writes, pytest.raises(SystemExit) as ended:
        main(["run", str(path)])
    assert not ended.value.code
    settings = load_study(path)
    return read_snapshot(settings, open_ledger(settings)), list(writes)


def fills(whole: tuple[Snapshot, list[str]], at: int | str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Let the disk be full from a write on, then have space again; return what the user reads."""
    snapshot, writes = whole
    where = f"full at write {at}, {writes[at] if isinstance(at, int) else at}"
    path = save_study(folder, **STUDY, **CACHED)
    with full_from(at):
        code, said = command(capsys, "run", str(path))
    (line,) = [line for line in said.splitlines() if "No space left" in line or "disk is full" in line][-1:]
    assert str(folder) in line, where
    assert "Traceback" not in said
    assert "Error:" not in said, "no name of an exception"
    # When only the report is missing, the study has ended well.
    assert code == (0 if "cannot be made" in line else 4), where
    settings = load_study(path)
    started = was_started(settings)
    assert command(capsys, "resume" if started else "run", str(path))[0] == 0
    again = read_snapshot(settings, open_ledger(settings))
    assert facts(list(again.trials)) == facts(list(snapshot.trials)), where
    assert {file.name for file in (settings.output_folder / "report").iterdir()} >= REPORT
    return line


def test_all_files_are_written_aside(whole: tuple[Snapshot, list[str]]) -> None:
    opened = [Path(write.removeprefix("open ")) for write in whole[1] if write.startswith("open ")]
    assert len(opened) > 8
    probes = [path for path in opened if path.is_dir() or path.name.startswith("tmp")]  # of the folder, at the start
    aside = [path for path in opened if any(part.startswith(".") for part in path.parts)]
    assert [path for path in opened if path not in (*probes, *aside)] == []
    assert len(aside) > len(probes)


@pytest.mark.parametrize("part", [0, slow(1), slow(2)])
def test_a_disk_that_fills_changes_nothing(
    whole: tuple[Snapshot, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], part: int
) -> None:
    fills(whole, len(whole[1]) * (2 * part + 1) // 6, tmp_path / "study", capsys)


@pytest.mark.slow
def test_a_disk_that_fills_at_any_write_changes_nothing(
    whole: tuple[Snapshot, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = {}
    for at in range(len(whole[1])):
        try:
            fills(whole, at, tmp_path / str(at), capsys)
        except (AssertionError, ValueError) as error:
            failed[at, whole[1][at]] = str(error)
    assert not failed


@pytest.mark.slow
def test_the_sentence_names_the_file(
    whole: tuple[Snapshot, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fills(whole, "weights/.trial-", tmp_path / "weights", capsys)
    assert ".safetensors: No space left on device; finished trials are safe, and `autopeft resume` goes on" in line
    line = fills(whole, "front.png", tmp_path / "picture", capsys)
    assert re.search(
        r"\w\.(png|json|csv): cannot be made \(.*No space left on device\); the results are in the ledger", line
    )


@pytest.mark.parametrize("evaluator", ["packed", slow("train")])
@pytest.mark.parametrize(
    "error", [FULL, slow(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"))]
)
def test_a_full_disk_in_a_training_is_not_the_fault_of_its_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluator: str, error: Exception
) -> None:
    settings = load_study(save_study(tmp_path, **SHORT, evaluation={"evaluator": evaluator}))
    where = "autopeft.evaluators.training.base.TrainingEvaluator.final_scores"
    with monkeypatch.context() as patch:
        patch.setattr(where, raising(error))
        with pytest.raises(UnusableEnvironmentError, match="No space left on device; finished trials are safe"):
            run(settings)
    assert {trial.state for trial in open_ledger(settings).trials()} == {"running"}
    assert {trial.state for trial in run(settings, resume=True).trials} == {"complete"}


def test_another_error_in_a_training_is() -> None:
    error = OSError(errno.ENOENT, "No such file or directory", "lost")
    assert failure(Request(candidate=candidate(1), seed=0), error).failure == "failed"


@pytest.mark.slow
def test_weights_that_cannot_be_saved_leave_the_trial_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_study(save_study(tmp_path, **SHORT))
    with monkeypatch.context() as patch:
        raw = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        patch.setattr(study_loop, "save_file", raising(raw))
        with pytest.raises(UnusableEnvironmentError, match=r"weights.*\.safetensors: No space left on device"):
            run(settings)
    assert {t.state for t in open_ledger(settings).trials() if t.role.kind == "finalist"} == {"running"}
    assert not list((settings.output_folder / "weights").iterdir())
    assert {trial.state for trial in run(settings, resume=True).trials} == {"complete"}


def test_an_export_that_does_not_fit_leaves_the_one_before(tmp_path: Path) -> None:
    path = save_study(tmp_path / "study", **SHORT)
    run(settings := load_study(path))
    ledger = open_ledger(settings)
    snapshot = read_snapshot(settings, ledger)
    number = trained(snapshot)
    for target in ("native", "peft", "merged", "trl-script"):
        folder = tmp_path / target

        def export(target: str = target, folder: Path = folder, force: bool = True) -> None:
            export_trial(settings, ledger, snapshot, number, target, folder, allow_lossy=True, force=force)

        with full_from(None) as writes:
            export()
        before = {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
        for at in sampled(writes):
            with full_from(at), pytest.raises(ExportError, match=f"{folder}: cannot be written: No space left"):
                export()
            assert {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()} == before
            assert not list(tmp_path.glob(".*")), "nothing is left beside it"
        export()


@pytest.mark.slow
def test_train_writes_one_whole_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_study(tmp_path / "study", **SHORT)
    run(settings := load_study(path))
    ledger = open_ledger(settings)
    snapshot = read_snapshot(settings, ledger)
    number = trained(snapshot)
    folder, _ = export_trial(settings, ledger, snapshot, number, "native", tmp_path / "export")
    recipe, out = str(folder / "recipe.yaml"), tmp_path / "trained"
    with full_from(None) as writes:
        assert command(capsys, "train", recipe, "--out", str(out))[0] == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert before.keys() == {"adapter.safetensors", "metrics.json", "recipe.yaml"}
    for at in sampled(writes):
        with full_from(at):
            code, said = command(capsys, "train", recipe, "--out", str(out), "--force")
        assert code != 0
        assert str(tmp_path) in said
        assert "No space left" in said
        assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    (out / "recipe.yaml").unlink()
    with full_from(0):  # before the training, which would be lost
        assert "has no earlier export to replace" in command(capsys, "train", recipe, "--out", str(out), "--force")[1]


def sampled(writes: list[str]) -> list[int]:
    """Return the first write, the last, and two between."""
    return sorted({round(share * (len(writes) - 1) / 3) for share in range(4)})


def trained(snapshot: Snapshot) -> int:
    """Return a trial with adapters whose weights are saved."""
    found = (t.of for t in snapshot.trials if t.role.kind == "finalist" and t.candidate.architecture)
    number = next(found)
    assert number is not None
    return number


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*arguments: object, **keywords: object) -> None:
        raise error

    return fail


LIBRARIES = """
import json, logging, resource, sys
import matplotlib.figure, numpy, optuna, torch, sqlalchemy
from safetensors.torch import save_file
from autopeft.evaluators.atomic import atomic_write, atomic_write_text
optuna.logging.disable_default_handler()
big = torch.randn(200_000)
picture = matplotlib.figure.Figure(figsize=(8, 8), dpi=200)
picture.figimage(numpy.random.rand(900, 900))
def torch_save(path):
    with path.open("wb") as file:
        torch.save(big, file)
def sqlite(path):
    engine = sqlalchemy.create_engine(f"sqlite:///{path}")
    with engine.begin() as db:
        db.execute(sqlalchemy.text("CREATE TABLE t (x)"))
        db.execute(sqlalchemy.text("INSERT INTO t VALUES (:x)"), {"x": "x" * 900_000})
ways = {
    "safetensors": lambda path: save_file({"x": big}, path), "torch": torch_save, "sqlite": sqlite,
    "matplotlib": lambda path: picture.savefig(path, format="png"), "text": lambda path: path.write_text("x" * 900_000),
    "shutil": lambda path: __import__("shutil").copyfile("big", path),
}
open("big", "w").write("x" * 900_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
for name, way in ways.items():
    try:
        with atomic_write(f"{name}.out") as temporary:
            way(temporary)
    except OSError as error:
        print(json.dumps([name, error.filename, error.strerror]))
"""


def test_errors_of_every_library_are_recognised(tmp_path: Path) -> None:
    """With a limit on the size of files, which the kernel applies to all of them."""
    done = subprocess.run([sys.executable, "-c", LIBRARIES], cwd=tmp_path, capture_output=True, text=True, check=False)
    found = {name: (file, said) for name, file, said in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == {"safetensors", "torch", "sqlite", "matplotlib", "text", "shutil"}, done.stderr
    for name, (file, said) in found.items():
        assert file == f"{name}.out"
        assert said in (os.strerror(errno.EFBIG), os.strerror(errno.EIO))  # SQLite: "disk I/O error"
    assert os.listdir(tmp_path) == ["big"]


@pytest.mark.parametrize(
    "error", [ValueError("x"), OSError(errno.ENOENT, "gone"), RuntimeError("out of memory"), ConnectionRefusedError()]
)
def test_other_errors_are_not_of_the_disk(error: Exception) -> None:
    assert disk_error(error) is None
