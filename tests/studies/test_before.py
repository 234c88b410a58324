"""Study files, ledgers and recipes of earlier versions: they open, go on, and say what they said.

`before/` is of the commit before the folders were sorted: a study of four trials with its ledger as SQL, the front that
it printed, and the recipe of the recommended candidate. `@FOLDER@` stands for where it lay.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertForMaskedLM

from autopeft.evaluators.backbones import load_backbone
from autopeft.evaluators.data.splits import load_splits
from autopeft.studies.cli import app as cli
from autopeft.studies.config.loading import load_study
from autopeft.studies.engine.session import open_study
from autopeft.studies.recipes.recipe import Recipe

from ..support.tiny_study import save_data, save_model

BEFORE = Path(__file__).parent / "before"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    save_model(tmp_path / "model")
    save_data(tmp_path)
    text = {path.name: path.read_text().replace("@FOLDER@", str(tmp_path)) for path in BEFORE.iterdir()}
    (tmp_path / "study.yaml").write_text(text["study.yaml"])
    (tmp_path / "recipe.yaml").write_text(text["recipe.yaml"])
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
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


def test_an_old_ledger_has_its_front(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = json.loads((BEFORE / "front.json").read_text())
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


def test_an_old_recipe_loads(study: Path) -> None:
    recipe = Recipe.load(study.parent / "recipe.yaml")
    assert recipe.schema_version == 1
    assert recipe.training.learning_rate == 0.0945095
