"""What bad input gets: a clear line on stderr, the right exit code, nothing half-written. One test per item."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from autopeft.studies.config.loading import load_study
from autopeft.studies.engine.session import open_ledger, read_snapshot

from ...support.tiny_study import save_study, settings, write_rows

SHORT = {"baselines": {"names": ["head"], "learning_rates": [1e-2]}, "finalists": {"seeds": 1, "most": 1}}


def expect(found: tuple[int, str, str], code: int, *texts: str) -> None:
    assert found[0] == code, found
    for text in texts:
        assert text in found[2], found[2]
    assert found[1] == ""


def lora(**fields: Any) -> dict[str, Any]:
    return {"adapters": {"lora": fields}}


# The study file

DECLARED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown key": ({"serach": {"trials": 3}}, ("serach", "did you mean 'search'")),
    "unknown key inside": ({"search": {"trails": 3}}, ("search.trails", "did you mean 'trials'")),
    "unknown adapter": ({"space": {"adapters": {"x": {"kind": "lorra"}}}}, ("'lorra'", "did you mean 'lora'")),
    "unknown adapter field": ({"space": lora(rnak=[1, 2])}, ("rnak", "did you mean 'rank'")),
    "unknown searcher": ({"search": {"searcher": "tpee"}}, ("'tpee'", "did you mean 'tpe'")),
    "unknown role": ({"space": lora(at=["attn.qq"], rank=[1, 2])}, ("'attn.qq'", "did you mean 'attn.q'")),
    "a site that the model does not have": (
        {"space": lora(at=["mlp.gate"], rank=[1, 2])},
        ("no site with role 'mlp.gate'", "mlp.up"),
    ),
    "rank 0 everywhere": ({"space": lora(rank=[0])}, ("0 is the only size",)),
    "rank 0": ({"space": lora(rank=0)}, ("0 is the only size",)),
    "an empty space": ({"space": {"adapters": {}}}, ("the space is empty",)),
    "nothing to choose": (
        {"space": lora(rank=4), "training": {"learning_rate": 1e-3}},
        ("nothing to search",),
    ),
    "a model path that is not there": ({"model": {"id": "./no-such-model"}}, ("no-such-model", "no such folder")),
    "a missing data file": (
        {"data": {"source": "files", "train": "no.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}},
        ("no.jsonl", "no such file"),
    ),
}


@pytest.mark.parametrize("name", DECLARED)
@pytest.mark.parametrize("command", ["validate", "run"])
def test_declaration(name: str, command: str, cli, tmp_path: Path) -> None:
    changes, texts = DECLARED[name]
    path = save_study(tmp_path, **changes)
    expect(cli(command, path), 2, "study.yaml:", *texts)
    assert not (tmp_path / "runs").exists(), "nothing is written for a file that is wrong"


def test_all_problems_at_once(cli, tmp_path: Path) -> None:
    path = save_study(tmp_path, search={"trails": 3, "searcher": "tpee"}, seed=-1)
    found = cli("validate", path)
    expect(found, 2, "trails", "tpee", "seed")
    assert len(found[2].strip().splitlines()) == 3


# The data

DATA: dict[str, tuple[str, list[dict[str, Any]], tuple[str, ...]]] = {
    "an empty file": ("train", [], ("train.jsonl", "empty")),
    "a row without its fields": ("validation", [{"text": "cold w1"}], ("validation.jsonl:1", "'label'")),
    "labels that differ between splits": ("test", [{"text": "w1", "label": "boiling"}], ("'boiling'", "training")),
}


@pytest.mark.parametrize("name", DATA)
def test_data(name: str, cli, tmp_path: Path) -> None:
    split, rows, texts = DATA[name]
    path = save_study(tmp_path)
    write_rows(tmp_path / f"{split}.jsonl", rows)
    expect(cli("run", path), 2, *texts)
    assert not (tmp_path / "runs").exists()


# Constraints


def test_a_constraint_that_nothing_meets(cli, tmp_path: Path) -> None:
    path = save_study(tmp_path, constraints={"num_params": 3}, **SHORT)
    for command in ("validate", "run"):
        expect(cli(command, path), 3, "no candidate meets the constraints", "constraints:", "num_params", "limit 3")
    assert not (tmp_path / "runs").exists()


def test_a_bound_of_a_declared_cost_that_nothing_meets(cli, tmp_path: Path) -> None:
    """A bound does not keep a candidate from its training: without this check, the study would train all in vain."""
    path = save_study(tmp_path, objectives=["accuracy", {"name": "num_params", "bound": 3}], **SHORT)
    expect(cli("validate", path), 3, "no candidate meets the constraints", "objectives:", "limit 3")
    path = save_study(tmp_path, objectives=["accuracy", {"name": "num_params", "bound": 64}], **SHORT)
    assert cli("validate", path)[0] == 0
    report = [{"name": "stored_bytes", "bound": 3}]
    path = save_study(tmp_path, objectives=["accuracy", "num_params"], report=report, **SHORT)
    expect(cli("validate", path), 3, "no candidate meets the constraints", "report:", "limit 3")


def test_a_measured_constraint_that_nothing_meets(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autopeft.studies.engine.study_loop.MOST_REJECTIONS", 3)
    path = save_study(tmp_path, constraints={"peak_memory_bytes": 10}, **SHORT)
    code, _, errors = cli("run", path)
    assert code == 3
    assert "peak_memory_bytes" in errors
    assert "above the limit 10" in errors


def test_a_bound_that_nothing_meets(cli, tmp_path: Path) -> None:
    objectives = [{"name": "accuracy", "bound": 0.999}, "num_params"]
    path = save_study(tmp_path, objectives=objectives, **SHORT)
    code, _, errors = cli("run", path, "--set", "search.trials=2")
    assert code == 3
    assert "none of" in errors


# The folder and the ledger


def test_a_folder_that_cannot_be_written(cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    path = save_study(tmp_path / "study", output="../file/runs")
    expect(cli("run", path), 4, "cannot be written")


def test_a_read_only_folder(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_study(tmp_path)

    def refuse(**options: object) -> NoReturn:  # permissions do not stop an administrator, so the answer is acted
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    expect(cli("run", path), 4, "Read-only file system")


def test_no_disk_space_at_the_start(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_study(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda folder: SimpleNamespace(f_bavail=10, f_frsize=4096))
    expect(cli("run", path), 4, "are free on this disk")


@pytest.mark.slow
def test_no_disk_space_on_the_way(tmp_path: Path) -> None:
    """Files may grow to 150 kB here: the ledger hits that within the study. What it holds is sound and is resumed."""
    path = save_study(tmp_path, **SHORT)
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000));"
        "from autopeft.studies.cli.app import main; main(sys.argv[1:])"
    )
    found = subprocess.run([sys.executable, "-c", code, "run", str(path)], capture_output=True, text=True, timeout=120)
    assert found.returncode == 4, found.stderr
    assert "ledger" in found.stderr
    assert "Traceback" not in found.stderr
    code = "import sys; from autopeft.studies.cli.app import main; main(sys.argv[1:])"
    found = subprocess.run([sys.executable, "-c", code, "resume", str(path)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


@pytest.mark.slow
def test_a_second_run_refuses(cli, tmp_path: Path) -> None:
    path = save_study(tmp_path, **SHORT)
    assert cli("run", path, "--set", "search.trials=1")[0] == 0
    expect(cli("run", path), 2, "already holds the study 'tiny'", "autopeft resume")
    assert cli("run", path, "--resume", "--set", "search.trials=1")[0] == 0


def test_storage_of_another_study(cli, tmp_path: Path) -> None:
    path = save_study(tmp_path, output="runs/one", **SHORT)
    assert cli("run", path, "--set", "search.trials=1")[0] == 0
    expect(cli("run", path, "--set", "study=other"), 2, "holds another study, 'tiny'")
    expect(cli("resume", path, "--set", "study=other"), 2, "no study 'other' to resume", "it holds 'tiny'")


@pytest.mark.slow
def test_a_study_changed_between_run_and_resume(cli, tmp_path: Path) -> None:
    path = save_study(tmp_path, **SHORT)
    assert cli("run", path, "--set", "search.trials=1")[0] == 0
    expect(cli("resume", path, "--set", "data.max_length=8"), 2, "other settings", "data.max_length: was 16, is 8")


def test_a_corrupt_ledger(cli, tmp_path: Path) -> None:
    path = save_study(tmp_path)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "ledger.db").write_bytes(b"no database " * 500)
    for command in ("run", "resume", "status", "pareto", "export"):
        expect(cli(command, path), 4, "ledger", "not a database")


def test_a_study_that_was_never_started(cli, tmp_path: Path) -> None:
    path = save_study(tmp_path)
    for command in ("resume", "status", "pareto", "export"):
        expect(cli(command, path), 2, "autopeft run")


def test_two_processes_on_one_study(cli, tmp_path: Path) -> None:
    from filelock import FileLock

    path = save_study(tmp_path)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    with FileLock(tmp_path / "runs" / "tiny" / ".lock"):
        expect(cli("run", path), 2, "another process")


# While it runs


def run_tiny(cli, path: Path, *more: object) -> Any:
    code, _, errors = cli("run", path, *more)
    study = load_study(path)
    return code, errors, read_snapshot(study, open_ledger(study))


@pytest.mark.slow
def test_mlflow_out_of_reach(cli, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The study goes on; what was missed is written by the next sync that gets through."""
    from mlflow import MlflowClient

    from autopeft.studies.tracking.mlflow_sync import Tracker

    path = save_study(tmp_path, tracking={"enabled": True, "uri": "http://127.0.0.1:9"}, **SHORT)
    code, errors, snapshot = run_tiny(cli, path, "--set", "search.trials=2")
    assert code == 0
    assert "MLflow cannot be reached" in errors + caplog.text
    uri = f"sqlite:///{tmp_path / 'late.db'}"
    assert Tracker(uri, "late", tmp_path).sync(snapshot, final=True)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("late").experiment_id
    assert len(client.search_runs([experiment])) == 1 + len(snapshot.ended)


def test_a_nan_loss_fails_its_trial_alone(cli, tmp_path: Path) -> None:
    path = save_study(
        tmp_path,
        training={"learning_rate": [1.0e-2, 1.0e30], "epochs": 1, "batch_size": 8, "max_grad_norm": 0.0},
        space=lora(rank=[1, 2, 4]),
        **SHORT,
    )
    code, _, snapshot = run_tiny(cli, path, "--set", "search.trials=6", "--set", "search.searcher=grid")
    failed = [t for t in snapshot.search_trials if t.state == "failed"]
    assert code == 0
    assert failed
    assert any(t.state == "complete" for t in snapshot.search_trials)
    assert all("loss" in t.error for t in failed)


def test_out_of_memory_is_infeasible(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autopeft.evaluators.training import packed

    steps = packed.PackedEvaluator._steps_of

    def scarce(self, pack, *rest):
        if any(r.request.candidate.architecture.num_params(self.backbone) > 400 and r.request.seed == 0 for r in pack):
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")
        return steps(self, pack, *rest)

    monkeypatch.setattr(packed.PackedEvaluator, "_steps_of", scarce)
    code, _, snapshot = run_tiny(cli, save_study(tmp_path, **SHORT))
    states = {t.state for t in snapshot.search_trials}
    assert code == 0
    assert states == {"complete", "infeasible"}
    assert any("out of memory: tried to allocate 80 GiB" in (t.error or "") for t in snapshot.search_trials)


def test_an_unexpected_error_fails_its_trial_alone(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autopeft.evaluators.training import packed

    steps = packed.PackedEvaluator._steps_of

    def brittle(self, pack, *rest):
        searched = [run for run in pack if run.request.seed == 0 and "lora" in run.request.candidate.architecture.kinds]
        if any(run.index == 1 for run in searched):
            raise IndexError("a bug of this candidate")
        return steps(self, pack, *rest)

    monkeypatch.setattr(packed.PackedEvaluator, "_steps_of", brittle)
    code, _, snapshot = run_tiny(cli, save_study(tmp_path, **SHORT), "--set", "search.trials=3")
    assert code == 0
    assert [t.error for t in snapshot.trials if t.state == "failed"] == ["IndexError: a bug of this candidate"]


# Recipes and options


def test_options(cli, tmp_path: Path) -> None:
    path = save_study(tmp_path, **SHORT)
    assert cli("run", path, "--set", "search.trials=1")[0] == 0
    expect(cli("export", path, "--to", "pefft"), 2, "did you mean 'peft'")
    expect(cli("export", path, "--pick", "cheapest"), 2, "use recommended")
    expect(cli("export", path, "--pick", "num_params<=-1"), 3, "no member of the front")
    expect(cli("export", path, "--to", "axolotl"), 1, "does not support this recipe")
    expect(cli("train", tmp_path / "no.yaml"), 2, "no such file")
    expect(cli("run", path, "--set", "device=cuda", "--resume"), 4, "no GPU") if not torch.cuda.is_available() else None


def test_the_fixture_itself_is_sound(cli, tmp_path: Path) -> None:
    """Otherwise the tests above could pass for another reason."""
    assert settings()["study"] == "tiny"
    code, out, _ = cli("validate", save_study(tmp_path))
    assert code == 0
    assert "no problems" in out
