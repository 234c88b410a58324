"""Studies whose quality is a metric over the set, built in or the user's own, from the file to the kept promise."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML
from safetensors.torch import load_file
from sklearn.metrics import f1_score

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.training.base import TrainingEvaluator
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.analysis.statistics import paired_difference
from autopeft.studies.cli.app import main
from autopeft.studies.config.fingerprint import fingerprint
from autopeft.studies.config.loading import load_study
from autopeft.studies.config.schema import json_schema
from autopeft.studies.config.source import StudyFileError
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.check import check
from autopeft.studies.engine.plan import weights_path
from autopeft.studies.engine.session import open_ledger, open_study, read_snapshot
from autopeft.studies.errors import ConfigurationError
from autopeft.studies.recipes.recipe import Recipe, RecipeError
from autopeft.studies.reports.report import write_report

from ...support.slow import mostly_slow, slow
from ...support.tiny_study import LABELS, save_study
from .test_study import Quiet, facts, run

OWN = """\
import numpy as np

def worst_recall(targets, predictions):
    return min(np.mean(predictions[targets == label] == label) for label in np.unique(targets))

def mistakes(targets, predictions):
    return np.mean(targets != predictions)
"""
README = Path(__file__).parents[3] / "README.md"
#: Of which the model learns something, if little.
TRAINING = {"learning_rate": {"low": 1.0e-2, "high": 1.0e-1, "log": True}, "epochs": 10, "batch_size": 8}
RUNGS = {"searcher": "tpe", "trials": 6, "batch": 3, "rungs": [0.25, 0.5], "keep": 0.5}
MISTAKES = [{"name": "mistakes", "direction": "minimise"}, "num_params"]
STUDIES: dict[str, dict[str, Any]] = {
    "macro-f1": {"objectives": ["macro-f1", "num_params"], "search": RUNGS, "training": TRAINING},
    "mistakes": {
        "metrics": {"mistakes": "mine:mistakes", "worst": "mine:worst_recall"},
        "objectives": MISTAKES,
        "search": RUNGS,
        "training": TRAINING,
    },
}


def study_in(folder: Path, **changes: Any) -> Path:
    path = save_study(folder, **changes)
    (folder / "mine.py").write_text(OWN)
    return path


def cli(words: list[str]) -> int:
    with pytest.raises(SystemExit) as caught:
        main(words)
    return int(caught.value.code or 0)


@pytest.fixture(scope="module", params=mostly_slow(STUDIES, "mistakes"))
def ended(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, StudyFile, Snapshot]:
    """One study of each kind, interrupted and resumed."""
    folder = tmp_path_factory.mktemp("ended")
    tracked = STUDIES[request.param] | {"tracking": {"enabled": True}}
    settings = load_study(study_in(folder / "study", **tracked))
    with pytest.raises(KeyboardInterrupt):
        run(settings, watcher=Quiet(stop_after=5))
    return request.param, settings, run(settings, resume=True)


@pytest.mark.slow
def test_an_interrupted_study_ends_as_an_uninterrupted_one(ended, tmp_path: Path) -> None:
    name, _, snapshot = ended
    whole = run(load_study(study_in(tmp_path / "study", **STUDIES[name])))
    assert facts(list(whole.trials)) == facts(list(snapshot.trials))


def test_every_trial_has_the_metric_with_its_error(ended) -> None:
    name, settings, snapshot = ended
    assert snapshot.quality == name
    assert read_snapshot(settings, open_ledger(settings)).rows() == snapshot.rows()
    seen = set()
    for trial in snapshot.trials:
        found = trial.measurement
        if found is None:
            continue
        seen.add(trial.state)
        assert all(name in values and "loss" in values for _, values in found.rungs)
        assert list(found.values)[:2] == ["loss", "accuracy"]
        assert name in found.values
        if trial.state == "complete":
            column = found.per_example[name]
            assert np.mean(column) == pytest.approx(found.values[name], abs=1e-8)
            assert np.std(column, ddof=1) / math.sqrt(len(column)) == pytest.approx(found.std_err[name], abs=1e-8)
        if name == "mistakes" and trial.state == "complete":
            assert found.values[name] == pytest.approx(1 - found.values["accuracy"])
            assert found.std_err[name] == pytest.approx(found.std_err["accuracy"], abs=1e-6), "of a mean: the mean's"
            assert 0 <= found.values["worst"] <= found.values["accuracy"]
    assert {"complete", "pruned"} <= seen


def test_values_are_those_of_the_trained_network(ended) -> None:
    """The weights that were kept, scored anew, against scikit-learn and by hand."""
    name, settings, snapshot = ended
    trials = [trial for trial in snapshot.trials if trial.role.kind == "finalist" and trial.seed == 1]
    splits, _, _ = check(settings)
    targets = [LABELS.index(row["label"]) for row in splits.test]
    predicted = set()
    with open_study(settings, splits, resume=True) as study:
        evaluator = study.evaluator
        assert isinstance(evaluator, TrainingEvaluator)
        for trial in trials:
            with Attachment(evaluator.model, evaluator.backbone, [trial.candidate.architecture], [0]) as attachment:
                attachment.load_state(load_file(weights_path(settings.output_folder, trial.of)))
                (columns,) = evaluator.columns(attachment, "test")
            assert columns["target"] == targets
            wrong = np.mean(np.array(targets) != columns["prediction"])
            f1 = f1_score(targets, columns["prediction"], average="macro", zero_division=0)
            assert trial.measurement.test[name] == pytest.approx(f1 if name == "macro-f1" else wrong)
            predicted |= set(columns["prediction"])
    assert len(predicted) > 1, "they have learnt something"


def test_front_table_and_page(ended, capsys) -> None:
    name, settings, snapshot = ended
    rows = snapshot.rows()
    assert any(row.on_front for row in rows)
    assert any(row.recommended for row in rows)
    assert all(name in row.std_err for row in rows)
    best = min if name == "mistakes" else max
    again = [row for row in rows if snapshot.entry(row.trial).repeats]
    assert best(again, key=lambda row: row.values[name]).values[name] in {r.values[name] for r in again if r.on_front}
    assert cli(["pareto", str(settings.path)]) == 0
    assert name in capsys.readouterr().out
    assert cli(["pareto", str(settings.path), "--json"]) == 0
    assert name in capsys.readouterr().out
    write_report(snapshot, settings.output_folder / "report")
    report = settings.output_folder / "report"
    assert name in (report / "front.html").read_text()
    assert f"{name}_std_err" in (report / "front.csv").read_text()


def test_differences_are_paired(ended) -> None:
    name, _, snapshot = ended
    entries = [entry for entry in snapshot.entries() if entry.repeats]
    first, second = (entry.scores(name) for entry in entries[:2])
    found = paired_difference(first, second, spread=snapshot.spread())
    sign = -1 if name == "mistakes" else 1
    means = [np.mean([run.values[name] for run in entry.runs]) for entry in entries[:2]]
    assert found.value == pytest.approx(sign * (means[0] - means[1]), abs=1e-8)


def test_mlflow_has_it(ended) -> None:
    from mlflow import MlflowClient

    name, settings, snapshot = ended
    client = MlflowClient(tracking_uri=settings.tracking_uri)
    experiment = client.get_experiment_by_name(settings.study)
    runs = client.search_runs([experiment.experiment_id], max_results=500)
    told = {run.data.tags["autopeft.trial"]: run for run in runs if "autopeft.trial" in run.data.tags}
    for trial in snapshot.trials:
        if trial.state == "complete":
            metrics = told[str(trial.number)].data.metrics
            assert metrics[f"obj/{name}"] == pytest.approx(trial.values[name])
            assert metrics[f"obj/{name}_std_err"] == pytest.approx(trial.measurement.std_err[name])
    (parent,) = [
        run for run in runs if "mlflow.note.content" in run.data.tags and "autopeft.trial" not in run.data.tags
    ]
    assert f"`obj/{name}`" in parent.data.tags["mlflow.note.content"]


def test_the_promise_of_the_recipe(ended, tmp_path: Path, capsys) -> None:
    name, settings, _ = ended
    path = tmp_path / "out" / "recipe.yaml"
    assert cli(["export", str(settings.path), "--to", "native", "--out", str(path.parent)]) == 0
    recipe = Recipe.load(path)
    promised = recipe.measured[name]
    assert promised.split == "test"
    assert promised.low <= promised.value <= promised.high
    capsys.readouterr()
    if name == "macro-f1":
        assert "metrics" not in recipe.to_dict()
        assert cli(["verify", str(path), "--seeds", "1", "--json"]) in (0, 1)
        assert name in json.loads(capsys.readouterr().out)["kept"]
        return
    assert recipe.to_dict()["metrics"]["mistakes"] == {"function": "mine:mistakes", "direction": "minimise"}
    assert not recipe.maximises("mistakes")
    for command in ("verify", "train"):
        assert cli([command, str(path)]) == 2
        said = capsys.readouterr().err
        assert "--trust-code" in said
        assert "mistakes (mine:mistakes)" in said
        assert str(settings.folder) in said
    assert cli(["verify", str(path), "--seeds", "1", "--json", "--trust-code"]) in (0, 1)
    assert list(json.loads(capsys.readouterr().out)["kept"]) == ["mistakes"]
    assert cli(["train", str(path), "--trust-code", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"].keys() == {"loss", "accuracy", "mistakes", "worst"}


def test_a_picked_condition_may_be_on_it(ended, tmp_path: Path) -> None:
    name, settings, _ = ended
    words = ["export", str(settings.path), "--to", "native", "--out"]
    assert cli([*words, str(tmp_path / "a"), "--pick", f"{name}>=-1"]) == 0
    assert cli([*words, str(tmp_path / "b"), "--pick", f"{name}>1.5"]) == 3


def test_the_example_of_the_readme(tmp_path: Path) -> None:
    section = README.read_text(encoding="utf-8").split("## Your own metric\n")[1].split("\n## ")[0]
    code, text = (section.split(f"```{language}\n")[1].split("```")[0] for language in ("python", "yaml"))
    path = study_in(tmp_path / "study", **YAML(typ="safe").load(text))
    (path.parent / code.split("\n")[0].removeprefix("# ")).write_text(code)
    settings = load_study(path)
    check(settings)
    assert [metric.name for metric in settings.qualities()] == ["loss", "accuracy", "worst-recall"]
    assert settings.qualities()[-1].of(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1])) == 0.5


# What may go wrong


def problems(folder: Path, **changes: Any) -> list[str]:
    with pytest.raises(StudyFileError) as caught:
        check(load_study(study_in(folder, **changes)))
    lines = (folder / "study.yaml").read_text().splitlines()
    found = []
    for problem in caught.value.problems:
        place, what = problem.split(" ", 1)
        found.append(f"{lines[int(place.rsplit(':', 1)[1]) - 1].strip()} | {what}")
    return found


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"objectives": ["macro_f1", "num_params"]},
         "- macro_f1 | objectives.0: unknown metric 'macro_f1'; did you mean 'macro-f1'?"),
        ({"metrics": {"my_score": "mine:mistakes"}, "objectives": ["my_scroe", "num_params"]},
         "- my_scroe | objectives.0: unknown metric 'my_scroe'; did you mean 'my_score'?"),
        ({"metrics": {"accuracy": "mine:mistakes"}},
         "accuracy: mine:mistakes | metrics.accuracy: 'accuracy' is already a metric: choose another name"),
        ({"metrics": {"x": "mine.mistakes"}},
         "x: mine.mistakes | metrics.x: 'mine.mistakes' does not have the form module:function"),
        ({"metrics": {"x": "nine:mistakes"}},
         "x: nine:mistakes | metrics.x: no module nine: put nine.py into"),
        ({"metrics": {"x": "mine:mistake"}},
         "x: mine:mistake | metrics.x: the module mine has no function 'mistake'; did you mean 'mistakes'?"),
        ({"metrics": {"x": "math:sqrt"}}, "x: math:sqrt | metrics.x: the metric x (math:sqrt) raised TypeError"),
        ({"metrics": {"x": "builtins:print"}}, "metrics.x: the metric x (builtins:print) returned None, not a finite"),
        ({"objectives": [{"name": "macro-f1", "bound": 80.0}, "num_params"]},
         "bound: 80.0 | objectives.0.bound: no candidate can reach 80: the best possible macro-f1 is 1"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_the_training(tmp_path: Path, changes, expected) -> None:
    found = problems(tmp_path / "study", **changes)
    assert any(expected in problem for problem in found), found


def test_they_are_for_classification(tmp_path: Path) -> None:
    wrong = {"task": "causal-lm", "metrics": {"x": "mine:mistakes"}, "objectives": ["matthews", "num_params"]}
    found = problems(tmp_path / "study", **wrong)
    assert any("objectives.0: matthews needs the task classification" in problem for problem in found)
    assert not any("metrics.x" in problem for problem in found), "a function of texts; see test_texts_study.py"


@pytest.mark.parametrize("evaluator", ["packed", slow("train")])
def test_a_metric_that_fails_costs_its_candidate_alone(tmp_path: Path, evaluator) -> None:
    """Of every candidate that is scored after the third; those before are complete."""
    changes = {"metrics": {"x": "mine:fails_later"}, "objectives": ["x", "num_params"]}
    path = study_in(tmp_path / "study", **changes, evaluation={"evaluator": evaluator}, finalists={"seeds": 1})
    text = OWN + (
        "def fails_later(targets, predictions):\n"
        "    if len(set(predictions.tolist())) == 1 or np.mean(targets == predictions) > 0.9:\n"
        "        raise RuntimeError('not today')\n"
        "    return 0.5 + np.mean(targets == predictions)\n"
    )
    (path.parent / "mine.py").write_text(text)
    snapshot = run(load_study(path))
    failed = [trial for trial in snapshot.trials if trial.state == "failed"]
    assert failed
    assert any(trial.state == "complete" for trial in snapshot.trials)
    assert {trial.error for trial in failed} == {"the metric x (mine:fails_later) raised RuntimeError: not today"}


def test_code_that_went_away_is_told_at_the_next_start(tmp_path: Path) -> None:
    settings = load_study(study_in(tmp_path / "study", **STUDIES["mistakes"]))
    splits, _, _ = check(settings)
    (settings.folder / "mine.py").unlink()
    with pytest.raises(ConfigurationError, match="no module mine"), open_study(settings, splits, resume=False):
        pass


def test_studies_and_recipes_of_before_stay_what_they_were(tmp_path: Path) -> None:
    settings = load_study(study_in(tmp_path / "study"))
    assert "metrics" not in fingerprint(settings)
    assert "metrics" not in settings.model_dump(exclude_none=True)
    assert [metric.name for metric in settings.qualities()] == ["loss", "accuracy"]
    own = load_study(study_in(tmp_path / "own", **STUDIES["mistakes"]))
    assert fingerprint(own)["metrics"] == STUDIES["mistakes"]["metrics"]


def test_a_recipe_with_a_metric_that_is_none(ended, tmp_path: Path) -> None:
    name, settings, _ = ended
    path = tmp_path / "out" / "recipe.yaml"
    assert cli(["export", str(settings.path), "--to", "native", "--out", str(path.parent)]) == 0
    data = YAML(typ="safe").load(path.read_text())
    for change, what in (
        ({"metrics": {"x": {"function": "mine.x"}}}, "'mine.x' does not have the form module:function"),
        ({"metrics": {"x": {"function": "mine:x", "way": "up"}}}, "unknown key"),
        ({"measured": {name + "s": data["measured"][name]}}, f"unknown metric '{name}s'; did you mean '{name}'?"),
    ):
        YAML().dump(data | change, path)
        with pytest.raises(RecipeError) as caught:
            Recipe.load(path)
        assert what in str(caught.value)


def test_the_schema_knows_the_names() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json_schema())

    def valid(**changes: Any) -> bool:
        return validator.is_valid({"study": "x", **changes})

    assert valid(objectives=["macro-f1", {"name": "matthews", "bound": 0.2}])
    assert not valid(objectives=["macrof1", "num_params"])
    assert not valid(objectives=[{"name": "macrof1"}, "num_params"])
    assert valid(objectives=["my_score", {"name": "my_score"}], metrics={"my_score": "mine:score"})
    assert not valid(objectives=["my_score", {"nam": "my_score"}], metrics={"my_score": "mine:score"})
    assert not valid(metrics={"my score": "mine:score"})
