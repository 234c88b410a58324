"""Study files, ledgers and recipes of earlier versions: they open, go on, and say what they said.

`before/` has a folder for each of some commits: a study of four trials with its ledger as SQL, the front that it
printed, and the recipe of the recommended candidate. `@FOLDER@` stands for where it lay. `folders`: before the folders
were sorted. `contents`: before contents were fingerprinted and ledgers had a version; with the candidate's weights.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertForMaskedLM

from autopeft.evaluators.backbones import load_backbone
from autopeft.evaluators.data.splits import load_splits
from autopeft.studies.cli import app as cli
from autopeft.studies.config.loading import load_study
from autopeft.studies.engine.session import open_ledger, open_study
from autopeft.studies.recipes.recipe import Recipe

from ..support.slow import slow
from ..support.tiny_study import save_data, save_model

BEFORE = Path(__file__).parent / "before"


@pytest.fixture(params=["folders", slow("contents")])
def before(request: pytest.FixtureRequest) -> Path:
    folder: Path = BEFORE / request.param
    return folder


@pytest.fixture
def study(before: Path, tmp_path: Path) -> Path:
    save_model(tmp_path / "model")
    save_data(tmp_path)
    files = [path for path in before.iterdir() if path.suffix != ".safetensors"]
    text = {path.name: path.read_text().replace("@FOLDER@", str(tmp_path)) for path in files}
    (tmp_path / "study.yaml").write_text(text["study.yaml"])
    (tmp_path / "recipe.yaml").write_text(text["recipe.yaml"])
    weights = tmp_path / "runs" / "tiny" / "weights"
    weights.mkdir(parents=True)
    for path in before.glob("*.safetensors"):
        shutil.copy(path, weights)
    with sqlite3.connect(tmp_path / "runs" / "tiny" / "ledger.db") as ledger:
        ledger.executescript(text["ledger.sql"])
    ledger.close()
    return tmp_path / "study.yaml"


def run(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    with pytest.raises(SystemExit) as ended:
        cli.main([*map(str, words), "--json"])
    captured = capsys.readouterr()
    assert ended.value.code == 0, captured.err
    return json.loads(captured.out)


def test_an_old_ledger_has_its_front(before: Path, study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = json.loads((before / "front.json").read_text())
    for then, now in zip(old, run(capsys, "pareto", study), strict=True):
        # Standard errors are estimated in another way since: the terms of seeds and of examples are combined anew.
        assert all(0.5 < now["std_err"][name] / error < 2 for name, error in then["std_err"].items())
        assert {name: now[name] for name in ("trial", "key", "values")} == {
            name: then[name] for name in ("trial", "key", "values")
        }


def test_an_old_study_goes_on(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = run(capsys, "status", study)["trials"]["complete"]
    run(capsys, "resume", study, "--set", "search.trials=6")
    assert run(capsys, "status", study, "--set", "search.trials=6")["trials"]["complete"] >= before + 2


def test_an_old_study_trains_what_it_trained(study: Path) -> None:
    """Then, a pooler that the checkpoint lacks was frozen; in new studies it is trained with the head."""
    folder = study.parent / "model"
    BertForMaskedLM(BertConfig.from_pretrained(folder)).save_pretrained(folder)
    settings = load_study(study)
    splits = load_splits(settings.data_settings(), settings.task)
    with open_study(settings, splits, resume=True) as loop:
        assert loop.evaluator.backbone.head_modules == ("classifier",)
    new = load_backbone(str(folder), task=settings.task, labels=splits.labels).backbone
    assert new.head_modules == ("bert.pooler.dense", "classifier")


def test_an_old_study_is_exported(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its weights where they are, and without: `trl-script` needs none."""
    recommended = next(row["trial"] for row in run(capsys, "pareto", study) if row["recommended"])
    has_weights = any((study.parent / "runs" / "tiny" / "weights").iterdir())
    for target in ("native", "merged", "trl-script") if has_weights else ("trl-script",):
        made = run(capsys, "export", study, "--to", target, "--allow-lossy")
        assert made["trial"] == recommended
        recipe = Recipe.load(Path(made["folder"]) / "recipe.yaml")
        assert recipe.contents is None, "it is not known what the study read"
        assert recipe.candidate == Recipe.load(study.parent / "recipe.yaml").candidate


def test_an_old_ledger_gets_contents_and_a_version(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From its first resumption on, a change is refused."""
    settings = load_study(study)
    assert not open_ledger(settings).contents
    run(capsys, "resume", study)
    assert open_ledger(settings).contents["rows"]["validation"]["rows"] == 30
    rows = study.parent / "validation.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:20]))
    with pytest.raises(SystemExit):
        cli.main(["resume", str(study)])
    assert "validation rows: 20 now, 30 at the start" in capsys.readouterr().err


def test_an_old_recipe_loads(study: Path) -> None:
    recipe = Recipe.load(study.parent / "recipe.yaml")
    assert recipe.schema_version == 1
    assert recipe.training.learning_rate == 0.0945095
