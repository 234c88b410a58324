"""A study knows what it reads by its contents: a change is refused at `resume`, and reports use what the ledger has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autopeft.search_space.problem import FINALIST
from autopeft.studies.cli import app as cli
from autopeft.studies.config.fingerprint import changes
from autopeft.studies.config.loading import load_study
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine import session
from autopeft.studies.engine.exporting import export_trial
from autopeft.studies.engine.retraining import retrain
from autopeft.studies.engine.session import open_ledger, read_snapshot, recorded_settings
from autopeft.studies.errors import ConfigurationError
from autopeft.studies.exporters.base import ExportError
from autopeft.studies.recipes.build import recipe_of
from autopeft.studies.recipes.recipe import Recipe

from ...support.slow import mostly_slow
from ...support.tiny_study import save_model, save_study
from .test_study import run

SHORT = {
    "search": {"searcher": "random", "trials": 2, "batch": 2},
    "baselines": {"names": ["lora-r8-qv"], "learning_rates": [1e-2]},
    "finalists": {"seeds": 1, "most": 1},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contents") / "study"
    run(load_study(save_study(folder, **SHORT)))
    return folder


@pytest.fixture
def settings(finished: Path, tmp_path: Path) -> StudyFile:
    return load_study(shutil.copytree(finished, tmp_path / "study"))


def edit_rows(folder: Path, split: str, edit: Callable[[list[dict[str, str]]], object]) -> None:
    path = folder / f"{split}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    edit(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def other_label(folder: Path) -> None:
    for split in ("train", "validation", "test"):
        edit_rows(folder, split, lambda rows: [row.update(label="mild") for row in rows if row["label"] == "warm"])


def other_weights(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    state = load_file(path)
    state["encoder.layer.1.output.dense.weight"][0, 0] += 1
    save_file(state, path, metadata={"format": "pt"})


def other_tokenizer(folder: Path) -> None:
    path = folder / "model" / "tokenizer.json"
    path.write_text(path.read_text().replace('"w1": 8', '"w1": 9').replace('"w2": 9', '"w2": 8'))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "fewer rows": (
        lambda folder: edit_rows(folder, "validation", lambda rows: rows.pop()),
        "validation rows: 29 now, 30 at the start",
    ),
    "a text": (
        lambda folder: edit_rows(folder, "test", lambda rows: rows[0].update(text="hot")),
        "test rows: the 30 rows have other contents or another order now",
    ),
    "labels": (other_label, "labels: cold, hot, mild now, cold, hot, warm at the start"),
    "layers": (
        lambda folder: save_model(folder / "model", num_hidden_layers=4),
        "model.config.num_hidden_layers: was 3, is 4",
    ),
    "weights": (
        other_weights,
        "model: it has other weights now, or another version of transformers names them otherwise",
    ),
    "tokenizer": (other_tokenizer, "tokenizer: it makes other inputs of the same rows now"),
}


def commands(settings: StudyFile, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The outputs of `pareto`, `status` and `export` to the format that needs neither rows nor model."""
    found = []
    for command, *options in (["pareto"], ["status"], ["export", "--to", "native", "--force"]):
        with pytest.raises(SystemExit) as ended:
            cli.main([command, str(settings.folder), *options, "--json"])
        out, err = capsys.readouterr()
        assert ended.value.code == 0, err
        found.append(out)
    return found


@pytest.mark.parametrize("what", mostly_slow(CHANGES, "weights"))
def test_a_change_is_refused_and_reports_go_on(
    what: str, settings: StudyFile, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = commands(settings, capsys)
    change, said = CHANGES[what]
    change(settings.folder)
    with pytest.raises(ConfigurationError) as refused:
        run(settings, resume=True)
    assert f"\n  {said}\nrestore it" in str(refused.value)
    assert commands(settings, capsys) == shown
    recipe = Recipe.load(settings.output_folder / "exports" / f"trial-{exported(shown)}-native" / "recipe.yaml")
    assert recipe.labels == ("cold", "hot", "warm")


def exported(shown: list[str]) -> int:
    return int(json.loads(shown[2])["trial"])


def test_no_change_is_none(settings: StudyFile) -> None:
    rows = settings.folder / "validation.jsonl"
    rows.write_text("".join(f"{line}\n\n" for line in rows.read_text().splitlines()))
    save_model(settings.folder / "model")
    assert len(run(settings, resume=True).search_trials) == 2


def test_another_device_is_refused(settings: StudyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "torch_device", lambda requested: "cuda")
    with pytest.raises(ConfigurationError, match="device: cuda now, cpu at the start"):
        run(settings, resume=True)


def test_other_pretrained_loras_are_seen() -> None:
    assert changes({"given": ["a", "b"]}, {"given": ["a", "c"]}) == [
        "given: the pretrained LoRAs have other contents now"
    ]
    assert changes({}, {"given": ["a"]}) == [], "a ledger of an earlier version"


def test_an_export_that_needs_the_model_says_that_it_differs(settings: StudyFile, tmp_path: Path) -> None:
    ledger = open_ledger(settings)
    recorded = recorded_settings(settings, ledger)
    snapshot = read_snapshot(recorded, ledger)
    number = next(t.of for t in snapshot.trials if t.role == FINALIST)
    assert number is not None
    export_trial(recorded, ledger, snapshot, number, "merged", tmp_path / "before")
    other_weights(settings.folder)
    for target in ("merged", "peft"):
        with pytest.raises(ExportError, match="the model differs from the one that the study trained"):
            export_trial(recorded, ledger, snapshot, number, target, tmp_path / target, allow_lossy=True)
        assert not (tmp_path / target).exists()
    shutil.rmtree(settings.folder / "model")
    export_trial(recorded, ledger, snapshot, number, "native", tmp_path / "native")


def test_a_study_that_moved_is_exported_with_its_model(settings: StudyFile, finished: Path) -> None:
    ledger = open_ledger(settings)
    assert ledger.backbone.id == str(finished / "model")
    snapshot = read_snapshot(settings, ledger)
    recipe = recipe_of(settings, ledger, snapshot, snapshot.front().members[0].trial)
    assert recipe.backbone.id == str(settings.folder / "model")


def test_an_export_with_rows_says_that_they_differ(settings: StudyFile, tmp_path: Path) -> None:
    ledger = open_ledger(settings)
    snapshot = read_snapshot(settings, ledger)
    number = next(row.trial for row in snapshot.rows() if row.on_front)
    export_trial(settings, ledger, snapshot, number, "trl-script", tmp_path / "before", allow_lossy=True)
    change, said = CHANGES["fewer rows"]
    change(settings.folder)
    with pytest.raises(ExportError, match=f"the data has changed: {said}"):
        export_trial(settings, ledger, snapshot, number, "trl-script", tmp_path / "after", allow_lossy=True)


@pytest.mark.parametrize("what", ["fewer rows", "weights"])
def test_a_recipe_knows_what_its_study_read(what: str, settings: StudyFile, tmp_path: Path) -> None:
    ledger = open_ledger(settings)
    snapshot = read_snapshot(settings, ledger)
    export_trial(settings, ledger, snapshot, snapshot.front().members[0].trial, "native", tmp_path / "export")
    recipe = Recipe.load(tmp_path / "export" / "recipe.yaml")
    assert recipe.contents is not None
    retrain(recipe, [5])
    change, said = CHANGES[what]
    change(settings.folder)
    with pytest.raises(ConfigurationError) as refused:
        retrain(recipe, [5])
    assert said in str(refused.value)
    assert retrain(recipe.model_copy(update={"contents": None}), [5])[0].test


def test_settings_of_a_newer_version_are_refused(settings: StudyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = open_ledger(settings)
    newer = ledger.settings + "brand_new: 1\n"
    monkeypatch.setattr(type(ledger), "settings", property(lambda self: newer))
    with pytest.raises(ConfigurationError, match="made by a newer version of autopeft: upgrade"):
        recorded_settings(settings, ledger)


def test_hashing_is_cheap() -> None:
    """A tenth of a second for 90 MB; the bound leaves room for a busy machine."""
    import time

    from autopeft.evaluators.contents import of_weights

    module = torch.nn.Linear(4096, 5500)
    started = time.process_time()
    of_weights(module)
    assert time.process_time() - started < 2.0
