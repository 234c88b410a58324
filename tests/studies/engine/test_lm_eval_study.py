"""Studies whose quality is a task of lm-evaluation-harness, from the file to the recipe that measures it again."""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autopeft.search_space.problem import FINALIST
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.config.loading import load_study
from autopeft.studies.config.source import StudyFileError
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.check import check
from autopeft.studies.engine.session import evaluator_for, open_ledger
from autopeft.studies.engine.time_budget import Pace
from autopeft.studies.errors import ConfigurationError
from autopeft.studies.recipes.build import recipe_of
from autopeft.studies.recipes.recipe import Recipe

from ...support.exported import save_model
from ...support.lm_eval_tasks import CHOICES, COUNT, TEXTS, documents, save_documents, save_task
from ...support.tiny_study import save_study, settings, write_rows
from .test_metrics_study import cli
from .test_study import run
from .test_texts_study import llama

installed = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
CAUSAL: dict[str, Any] = {
    "task": "causal-lm",
    "objectives": ["support", "num_params"],
    "report": [{"name": "said", "bound": 0.0}],
    "metrics": {
        "support": {"lm_eval": "choices", "folder": "tasks", "metric": "acc_norm"},
        "said": {"lm_eval": "said", "folder": "tasks", "max_rows": 8},
    },
    "search": {"searcher": "random", "trials": 2, "batch": 2, "rungs": []},
    "training": {"learning_rate": {"low": 1.0e-2, "high": 2.0e-1, "log": True}, "epochs": 1, "batch_size": 8},
    "finalists": {"seeds": 2, "most": 1},
    "baselines": {"names": ["lora-r8-qv"], "learning_rates": [3.0e-2]},
    "space": {"adapters": {"lora": {"at": ["attn.q", "mlp.down"], "rank": [1, 4], "vary": {"rank": "layer"}}}},
}


def study_in(folder: Path, **changes: Any) -> Path:
    path = save_study(folder, **{**CAUSAL, **changes})
    shutil.rmtree(folder / "model")
    save_model("llama", folder / "model", llama)
    for split, count in (("train", 16), ("validation", 6), ("test", 6)):
        write_rows(folder / f"{split}.jsonl", [{"prompt": f"w{i % 9} w4", "completion": " w3"} for i in range(count)])
    save_task(folder / "tasks", "choices", CHOICES)
    save_task(folder / "tasks", "said", {**TEXTS, "generation_kwargs": {"until": ["w7"], "max_gen_toks": 3}})
    return path


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyFile, Snapshot]:
    found = load_study(study_in(tmp_path_factory.mktemp("ended") / "study"))
    return found, run(found)


@installed
def test_every_trial_has_a_value_of_each_document(ended: tuple[StudyFile, Snapshot]) -> None:
    _, snapshot = ended
    assert snapshot.left_out == {}
    for trial in snapshot.trials:
        assert trial.measurement is not None, trial.error
        columns = trial.measurement.per_example
        assert {name: len(columns[name]) for name in ("support", "said", "loss")} == {
            "support": COUNT // 2, "said": 4, "loss": 6,
        }  # fmt: skip
        assert trial.values["support"] == pytest.approx(np.mean(columns["support"]), abs=1e-4)
        expected = np.std(columns["support"], ddof=1) / (COUNT // 2) ** 0.5
        assert trial.measurement.std_err["support"] == pytest.approx(expected, abs=1e-4)
        if trial.role == FINALIST:
            assert len(trial.measurement.test_per_example["support"]) == COUNT // 2
    assert snapshot.quality == "support"
    assert all(row.std_err["support"] >= 0 for row in snapshot.front().members)


@installed
def test_a_recipe_measures_it_again_with_consent(
    ended: tuple[StudyFile, Snapshot], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, snapshot = ended
    recommendation = snapshot.front().recommendation
    assert recommendation is not None
    recipe = recipe_of(study, open_ledger(study), snapshot, recommendation.recommended)
    assert recipe.measured["support"].low is not None, "a promise"
    recipe.save(file := tmp_path / "recipe.yaml")
    assert Recipe.load(file) == recipe
    file.write_text(file.read_text().replace("lm_eval: choices", "lm_eval: choices\n    fodler: x"))
    assert cli(["verify", str(file)]) == 2
    assert " metrics.support.fodler: unknown key; did you mean 'folder'?" in capsys.readouterr().err
    recipe.save(file)
    assert cli(["verify", str(file)]) == 2
    assert "support (lm-eval task choices), said (lm-eval task said), whose code is in" in capsys.readouterr().err
    assert cli(["verify", str(file), "--trust-code", "--json"]) in (0, 1)
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert all({"support", "said"} <= one["test"].keys() for one in runs)
    source = study.folder / "tasks" / "documents.jsonl"
    try:
        save_documents(source, documents(2))
        assert cli(["verify", str(file), "--trust-code"]) == 2
        assert re.search(r"support validation rows: the 7 rows have other contents", capsys.readouterr().err)
        with pytest.raises(ConfigurationError, match=r"said test rows: the 4 rows have other contents"):
            run(study, resume=True)
    finally:
        save_documents(source, documents(1))


@installed
def test_all_problems_are_told_before_any_training(tmp_path: Path) -> None:
    metrics = {
        "support": {"lm_eval": "choises", "folder": "tasks"},
        "said": {"lm_eval": "said", "folder": "elsewhere"},
        "long": {"lm_eval": "long", "folder": "tasks"},
    }
    path = study_in(tmp_path / "study", metrics=metrics)
    save_task(path.parent / "tasks", "long", {**TEXTS, "generation_kwargs": {"until": [], "max_gen_toks": 5000}})
    with pytest.raises(StudyFileError) as caught:
        check(load_study(path))
    for place, what in (
        ("metrics.support", "tasks has no task 'choises'; did you mean 'choices'"),
        ("metrics.said", "has no folder"),
        ("metrics.long", "texts of 5,000 tokens (max_gen_toks of its generation_kwargs) leave nothing for a prompt"),
    ):
        assert re.search(rf"study\.yaml:\d+ {place}: .*{re.escape(what)}", str(caught.value)), str(caught.value)


@installed
def test_the_plan_counts_documents(tmp_path: Path) -> None:
    path = study_in(tmp_path / "study")
    splits, _, space = check(load_study(path))
    candidate = space.decode(space.largest())
    plain = load_study(path, ["objectives=[loss, num_params]", "report=null", "metrics=null"])
    with_it, without = (Pace.measured(evaluator_for(each, splits), candidate) for each in (load_study(path), plain))
    # 6 rows of about 3 tokens, beside 21 choices and 4 texts.
    assert with_it.validation_s > 2 * without.validation_s


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"task": "classification", "objectives": ["accuracy", "num_params"]},
        "metrics.support: a task of lm-eval needs a",
    ),
    (
        {"data": {**settings()["data"], "domain": "origin"}},
        "metrics.support: the documents of a task of lm-eval have no",
    ),
    ({"objectives": ["support@worst", "num_params"]}, "'support@worst': support is over all documents of its task"),
    ({"metrics": {"support": {"lm_eval": "choices", "max_rows": 3}}}, "metrics.support.max_rows"),
    ({"metrics": {"support": {"task": "choices"}}}, "metrics.support.lm_eval: is missing"),
    ({"generation": {"max_new_tokens": 3}}, "generation: has no effect without a metric of texts"),
]


@pytest.mark.parametrize(("changes", "what"), BAD)
def test_wrong_settings_are_told_with_their_line(changes: dict[str, Any], what: str, tmp_path: Path) -> None:
    path = save_study(tmp_path / "study", **{**CAUSAL, **changes})
    with pytest.raises(StudyFileError) as caught:
        load_study(path)
    assert re.search(rf"study\.yaml:\d+ .*{re.escape(what)}", str(caught.value)), str(caught.value)


def test_without_the_package_the_command_that_installs_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("autopeft.search_space.metrics.base.find_spec", lambda name: None)
    assert cli(["validate", str(study_in(tmp_path / "study"))]) == 4
    told = " ".join(capsys.readouterr().err.split())
    assert "needs the package lm-eval, which is not installed: pip install lm-eval" in told
