"""From a finished study to other hands: export, train and verify, by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from autopeft.studies.cli.app import main
from autopeft.studies.config.loading import load_study
from autopeft.studies.engine.session import open_ledger, read_snapshot
from autopeft.studies.recipes.recipe import Recipe

from ...support.fresh import FreshProcess
from ...support.tiny_study import save_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_study(tmp_path_factory.mktemp("handover"), search={"searcher": "tpe", "trials": 4})
    assert call("run", path) == 0
    return path


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return int(exit_.value.code or 0)


def recommended(study: Path):
    settings = load_study(study)
    snapshot = read_snapshot(settings, open_ledger(settings))
    return snapshot, next(row for row in snapshot.rows() if row.recommended)


def test_peft_gives_the_scores_of_the_study(study: Path, tmp_path: Path, fresh: FreshProcess) -> None:
    """The exported adapter, loaded by peft alone, has the accuracy that the study measured for these weights."""
    snapshot, _ = recommended(study)
    # On this toy the head alone may be as good, and peft has no format for that.
    entry = next(entry for entry in snapshot.entries() if entry.trial.role.kind == "search" and entry.repeats)
    pick = f"trial:{entry.trial.number}"
    assert call("export", study, "--pick", pick, "--to", "peft", "--out", tmp_path / "peft") == 0
    run = entry.runs[0]
    rows = [json.loads(line) for line in (study.parent / "test.jsonl").read_text().splitlines()]
    labels = sorted({r["label"] for r in rows})
    logits = torch.tensor(fresh.read("readme", folder=tmp_path / "peft", texts=[[r["text"]] for r in rows]))
    targets = torch.tensor([labels.index(r["label"]) for r in rows])
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    expected = torch.tensor(run.measurement.test_per_example["loss"])
    assert torch.allclose(losses, expected, atol=2e-4), "the ledger keeps four digits"
    assert (logits.argmax(-1) == targets).float().mean().item() == pytest.approx(run.measurement.test["accuracy"])


def test_train_repeats_the_study_run(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The recipe's own seed gives the very run that the study made, away from the study and its ledger."""
    assert call("export", study, "--to", "native", "--out", tmp_path / "native") == 0
    capsys.readouterr()
    assert call("train", tmp_path / "native" / "recipe.yaml", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    snapshot, row = recommended(study)
    run = snapshot.entry(row.trial).runs[0]
    assert printed["seed"] == run.seed
    assert printed["test"] == pytest.approx(dict(run.measurement.test), abs=1e-6)
    assert printed["kept"] == {"accuracy": True}
    assert (tmp_path / "native" / "trained" / "adapter.safetensors").is_file()
    assert json.loads((tmp_path / "native" / "trained" / "metrics.json").read_text()) == printed
    assert call("train", tmp_path / "native" / "recipe.yaml") == 1, "it does not write over an earlier run"


def test_verify_takes_new_seeds_and_judges(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert call("export", study, "--to", "native", "--out", tmp_path / "native") == 0
    path = tmp_path / "native" / "recipe.yaml"
    recipe = Recipe.load(path)
    for low, high, code in ((0.0, 1.0, 0), (1.01, 1.02, 1)):
        promised = recipe.measured["accuracy"].model_copy(update={"low": low, "high": high})
        changed = recipe.model_copy(update={"measured": {**recipe.measured, "accuracy": promised}})
        changed.save(path)
        capsys.readouterr()
        assert call("verify", path, "--json") == code
        printed = json.loads(capsys.readouterr().out)
        assert printed["kept"] == {"accuracy": code == 0}
        assert [run["seed"] for run in printed["runs"]] == [3, 4], "the study used 0, 1 and 2"


def test_a_recipe_without_a_promise(study: Path, tmp_path: Path) -> None:
    assert call("export", study, "--pick", "trial:0", "--to", "native", "--out", tmp_path / "native") == 0
    path = tmp_path / "native" / "recipe.yaml"
    recipe = Recipe.load(path)
    recipe.model_copy(update={"measured": {}}).save(path)
    assert call("verify", path) == 1


def test_the_file_may_change_after_the_run(study: Path, tmp_path: Path) -> None:
    """What is exported are the settings of the run, which the ledger keeps."""
    assert call("export", study, "--set", "data.max_length=99", "--to", "native", "--out", tmp_path / "native") == 0
    assert Recipe.load(tmp_path / "native" / "recipe.yaml").data.max_length == 16
