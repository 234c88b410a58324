"""Studies over pairs of texts and over rows with several labels: from the file to the exports and the kept promise."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoConfig

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.tasks import TASKS, model_inputs
from autopeft.evaluators.tasks.classification import Classification, MultiLabel
from autopeft.search_space.problem import Role
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.config.fingerprint import fingerprint
from autopeft.studies.config.loading import load_study
from autopeft.studies.config.schema import json_schema
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.check import check
from autopeft.studies.engine.plan import weights_path
from autopeft.studies.engine.session import open_study
from autopeft.studies.exporters import native
from autopeft.studies.recipes.recipe import Recipe

from ...support.fresh import FreshProcess
from ...support.slow import mostly_slow
from ...support.tiny_study import FORMS, LABELS, save_study, save_study_of
from .test_metrics_study import cli, problems
from .test_study import run

OWN = "import numpy as np\n\ndef agreement(targets, predictions):\n    return np.mean(targets == predictions)\n"
#: Of which the model learns something, if little.
TRAINING = {"learning_rate": {"low": 1.0e-2, "high": 1.0e-1, "log": True}, "epochs": 10, "batch_size": 8}
CHANGES: dict[str, Any] = {
    "objectives": ["macro-f1", "num_params"],
    "metrics": {"agreement": "mine:agreement"},
    "training": TRAINING,
    "search": {"searcher": "random", "trials": 3, "batch": 3, "rungs": [0.5], "keep": 0.7},
    "baselines": {"names": ["head", "lora-r8-qv"], "learning_rates": [1.0e-2]},
}
TASKS_OF = {"pair": Classification, "several": MultiLabel}


@pytest.fixture(scope="module", params=mostly_slow(FORMS, "several"))
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, StudyFile, Snapshot]:
    path = save_study_of(request.param, tmp_path_factory.mktemp(request.param) / "study", **CHANGES)
    (path.parent / "mine.py").write_text(OWN)
    settings = load_study(path)
    return request.param, settings, run(settings)


@pytest.fixture(scope="module")
def exported(ended: tuple[str, StudyFile, Snapshot], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports of the LoRA baseline, in a folder for each format."""
    _, settings, snapshot = ended
    number = next(trial.number for trial in snapshot.trials if trial.role == Role("baseline", "lora-r8-qv"))
    folder = tmp_path_factory.mktemp("exported")
    for target in ("native", "peft", "merged", "trl-script"):
        words = ["export", str(settings.path), "--to", target, "--out", str(folder / target)]
        assert cli([*words, "--pick", f"trial:{number}", "--allow-lossy"]) == 0
    return folder


def test_the_study_ends_with_a_front(ended: tuple[str, StudyFile, Snapshot]) -> None:
    form, settings, snapshot = ended
    assert settings.task_class is TASKS_OF[form]
    assert any(row.on_front for row in snapshot.rows())
    for trial in snapshot.trials:
        if trial.state == "complete":
            assert trial.measurement is not None
            assert set(trial.measurement.values) >= {"loss", "accuracy", "macro-f1", "agreement"}
            # Per label, not per example: those whose labels are not all right are in part.
            accuracy, agreement = (trial.measurement.values[name] for name in ("accuracy", "agreement"))
            assert agreement > accuracy if form == "several" else agreement == pytest.approx(accuracy)


def test_values_are_those_of_the_trained_network(ended: tuple[str, StudyFile, Snapshot]) -> None:
    """The weights that were kept, scored anew, against scikit-learn."""
    form, settings, snapshot = ended
    splits, _, _ = check(settings)
    with open_study(settings, splits, resume=True) as study:
        evaluator: Any = study.evaluator
        for trial in (trial for trial in snapshot.trials if trial.role == "finalist" and trial.seed == 1):
            with Attachment(evaluator.model, evaluator.backbone, [trial.candidate.architecture], [0]) as attachment:
                attachment.load_state(load_file(weights_path(settings, trial.of)))
                (columns,) = evaluator.columns(attachment, "test")
            names = ("targets", "predictions") if form == "several" else ("target", "prediction")
            targets, predictions = (torch.tensor(columns[name]).int().numpy() for name in names)
            assert trial.measurement is not None
            found = trial.measurement.test
            assert found["macro-f1"] == pytest.approx(f1_score(targets, predictions, average="macro", zero_division=0))
            assert found["accuracy"] == pytest.approx(accuracy_score(targets, predictions))
            if form == "several":
                assert targets.tolist() == [[int(label in row["labels"]) for label in LABELS] for row in splits.test]


def test_the_recipe_trains_and_is_verified(
    ended: tuple[str, StudyFile, Snapshot], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    form, settings, _ = ended
    assert cli(["export", str(settings.path), "--to", "native", "--out", str(tmp_path / "out")]) == 0
    path = tmp_path / "out" / "recipe.yaml"
    recipe = Recipe.load(path)
    assert recipe.task_class is TASKS_OF[form]
    columns, _ = FORMS[form]
    assert columns.items() <= recipe.to_dict()["data"].items()
    capsys.readouterr()
    assert cli(["train", str(path), "--trust-code", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"].keys() >= {"loss", "accuracy", "macro-f1", "agreement"}
    assert cli(["verify", str(path), "--seeds", "1", "--json", "--trust-code"]) in (0, 1)
    assert list(json.loads(capsys.readouterr().out)["kept"]) == ["macro-f1"]


def test_exports_have_the_same_logits(
    ended: tuple[str, StudyFile, Snapshot], exported: Path, fresh: FreshProcess
) -> None:
    form, settings, _ = ended
    recipe = Recipe.load(exported / "native" / "recipe.yaml")
    splits, _, _ = check(settings)
    model, attachment = native.load(exported / "native")
    with attachment:
        from autopeft.evaluators.backbones import load_processor

        task = settings.task_class(load_processor(recipe.backbone.id, recipe.task), 16, recipe.labels)
        inputs = model_inputs(task.collate(task.encode(splits.test[:8])))
        assert ("token_type_ids" in inputs) == (form == "pair")
        with torch.no_grad():
            expected = model(**inputs).logits
    rows = [[row["text"], *([row["text_pair"]] if form == "pair" else ())] for row in splits.test[:8]]
    for target in ("peft", "merged"):
        found = torch.tensor(fresh.read("readme", folder=exported / target, texts=rows))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        config = AutoConfig.from_pretrained(exported / target)
        assert tuple(config.id2label.values()) == recipe.labels
        assert config.problem_type == settings.task_class.problem_type


def test_the_script_trains_the_same(
    ended: tuple[str, StudyFile, Snapshot], exported: Path, tmp_path: Path, fresh: FreshProcess
) -> None:
    _, settings, _ = ended
    splits, _, _ = check(settings)
    file = exported / "trl-script" / "train.py"
    spec = importlib.util.spec_from_file_location("script_of_forms", file)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    tokenizer = script.load_tokenizer()
    rows = script.encode(script.load_rows("validation"), tokenizer)
    task = settings.task_class(tokenizer, 16, splits.labels)
    examples = task.encode(splits.validation)
    assert [list(ids) for ids in rows["input_ids"]] == [example["input_ids"] for example in examples]
    assert [target for target in rows["labels"]] == task.targets(examples, 0).tolist()  # noqa: C416
    assert settings.task_class.problem_type == script.PROBLEM_TYPE
    printed = fresh.read("script", folder=file.parent, output=tmp_path, steps=2)
    assert "eval_accuracy" in printed
    assert "eval_macro-f1" in printed
    assert "It does not compute the study's own agreement (mine:agreement)." in file.read_text()


# Files


def test_old_files_are_what_they_were(tmp_path: Path) -> None:
    dump = fingerprint(load_study(save_study(tmp_path / "study")))
    assert "text_pair" not in dump["data"]
    assert "labels" not in dump["data"]
    assert json_schema()["properties"]["task"]["enum"] == list(TASKS)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"data": {"labels": "tags"}, "objectives": ["matthews", "num_params"]},
            "objectives.0: matthews cannot be computed for multi_label_classification: choose among accuracy,"
            " loss, macro-f1",
        ),
        ({"data": {"labels": "tags", "label": "topic"}}, "data.label: cannot be combined with data.labels"),
        (
            {"data": {"labels": "tags"}, "proxy": {"distil": True, "policy": "sandwich"}},
            "proxy.distil: can be set only for classification with one label per row",
        ),
        (
            {"task": "causal-lm", "data": {"labels": "tags", "source": "x/y"}},
            "data.labels: can be set only for classification",
        ),
        (
            {"task": "causal-lm", "data": {"text_pair": "b", "source": "x/y"}},
            "data.text_pair: can be set only for classification",
        ),
    ],
)
def test_what_a_file_can_say_wrong(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    found = problems(tmp_path / "study", **changes)
    assert any(expected in problem for problem in found), found
