"""Studies with forgetting as an objective, from the file to the recipe that measures it again."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from transformers import BertForSequenceClassification

from autopeft.search_space.problem import FINALIST
from autopeft.studies.analysis.gains import other_qualities
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.config.fingerprint import fingerprint
from autopeft.studies.config.loading import load_study
from autopeft.studies.config.source import StudyFileError
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.check import check
from autopeft.studies.engine.cost_estimate import estimate_study
from autopeft.studies.engine.session import evaluator_for, open_ledger
from autopeft.studies.engine.time_budget import Pace
from autopeft.studies.errors import ConfigurationError
from autopeft.studies.exporters import EXPORTERS
from autopeft.studies.recipes.build import recipe_of
from autopeft.studies.recipes.recipe import Recipe
from autopeft.studies.reports.report import write_report

from ...support.exported import save_model
from ...support.tiny_study import save_study, settings, write_rows
from .test_metrics_study import cli
from .test_study import Quiet, facts, run
from .test_texts_study import llama

CAUSAL: dict[str, Any] = {
    "task": "causal-lm",
    "objectives": ["loss", "num_params", "forgetting"],
    "forgetting": {"source": "files", "file": "general.jsonl"},
    "search": {"searcher": "tpe", "trials": 6, "batch": 3, "rungs": [0.5], "keep": 0.5},
    "training": {"learning_rate": {"low": 1.0e-3, "high": 1.0e-1, "log": True}, "epochs": 5, "batch_size": 8},
    "finalists": {"seeds": 2, "most": 3},
    "baselines": {"names": ["rule-unsloth", "lora-r8-qv"], "learning_rates": [3.0e-2]},
    "space": {
        "adapters": {"lora": {"at": ["attn.q", "attn.v", "mlp.down"], "rank": [1, 4], "vary": {"rank": "layer"}}}
    },
    "tracking": {"enabled": True},
}
GENERAL = [{"text": " ".join(f"w{Random(i).randrange(k + 2, 30)}" for k in range(4 + i % 5))} for i in range(17)]


def study_in(folder: Path, **changes: Any) -> Path:
    path = save_study(folder, **{**CAUSAL, **changes})
    shutil.rmtree(folder / "model")
    save_model("llama", folder / "model", llama)
    for split, count in (("train", 40), ("validation", 12), ("test", 12)):
        rows = [{"prompt": f"w{i % 9} w{len(split)}", "completion": " w3 w4" if i % 3 else " w5"} for i in range(count)]
        write_rows(folder / f"{split}.jsonl", rows)
    write_rows(folder / "general.jsonl", GENERAL)
    return path


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyFile, Snapshot]:
    """A study that was interrupted and resumed."""
    found = load_study(study_in(tmp_path_factory.mktemp("ended") / "study"))
    with pytest.raises(KeyboardInterrupt):
        run(found, watcher=Quiet(stop_after=4))
    return found, run(found, resume=True)


def test_every_trial_has_it_with_its_error(ended) -> None:
    _, snapshot = ended
    assert snapshot.left_out == {}
    assert {"complete", "pruned"} <= {trial.state for trial in snapshot.trials}
    for trial in snapshot.trials:
        assert trial.measurement is not None, trial.error
        assert np.isfinite(trial.values["forgetting"])
        if trial.state == "complete":
            column = np.array(trial.measurement.per_example["forgetting"])
            assert (len(column), len(trial.measurement.per_example["loss"])) == (9, 12)
            expected = column.std(ddof=1) / len(column) ** 0.5
            assert trial.measurement.std_err["forgetting"] == pytest.approx(expected, abs=1e-4)
        if trial.role == FINALIST:
            assert len(trial.measurement.test_per_example["forgetting"]) == 8


def test_the_front_has_members_that_differ_in_all_three(ended) -> None:
    settings, snapshot = ended
    front = snapshot.front()
    members = front.members
    assert len(members) >= 2
    for name in ("loss", "num_params", "forgetting"):
        assert len({row.values[name] for row in members}) >= 2
        assert name == "num_params" or all(row.std_err[name] > 0 for row in members)
    assert settings.goal == "front"
    assert snapshot.quality == "loss"
    recommended = next(row for row in members if row.recommended)
    assert recommended.trial == front.recommendation.recommended
    assert all(row.difference is None or row.trial != front.recommendation.best for row in members)


def test_reports_say_what_the_recommended_member_forgets(
    ended, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, snapshot = ended
    (sentence,) = other_qualities(snapshot, snapshot.front())
    assert re.search(r"has forgetting -?[\d.e-]+ \(95 % interval -?[\d.e-]+ to -?[\d.e-]+\)", sentence)
    assert cli(["pareto", str(settings.path)]) == 0
    shown = " ".join(re.sub(r"[\n|]", " ", capsys.readouterr().out).split())
    assert sentence.split(" (95")[0] in shown
    assert cli(["pareto", str(settings.path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    report = write_report(snapshot, tmp_path / "report")
    assert report.problems == []
    assert sentence in html.unescape((tmp_path / "report" / "front.html").read_text(encoding="utf-8"))
    assert cli(["data", str(settings.path), "--split", "retained", "--rows", "1"]) == 0
    shown = capsys.readouterr().out
    assert "general.jsonl:" in shown
    assert re.search(r"retained_test +8 ", shown)
    gains = next(row["gains"] for row in rows if row["recommended"])
    for gain in gains:
        if gain["difference"] is not None:
            own = gain["others"]["forgetting"]
            assert own["low"] <= own["value"] <= own["high"]
            assert "forgetting (95 % interval" in gain["sentence"]


def test_a_recipe_measures_it_again(ended, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, snapshot = ended
    number = snapshot.front().recommendation.recommended
    recipe = recipe_of(settings, open_ledger(settings), snapshot, number)
    assert recipe.forgetting == settings.forgetting
    assert recipe.measured["forgetting"].std_err is not None
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe
    assert cli(["verify", str(tmp_path / "recipe.yaml"), "--json"]) in (0, 1)
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert all({"loss", "forgetting"} <= one["test"].keys() for one in runs)
    for name in ("trl-script", "axolotl"):
        EXPORTERS[name].export(recipe, None, tmp_path / name, allow_lossy=True)
        assert "Forgetting is not measured there" in (tmp_path / name / "README.md").read_text()
    write_rows(settings.folder / "general.jsonl", [*GENERAL[:-1], {"text": "w1 w2 w3"}])
    try:
        assert cli(["verify", str(tmp_path / "recipe.yaml")]) == 2
        assert re.search(r"retained(_test)? rows: the \d rows have other contents", capsys.readouterr().err)
    finally:
        write_rows(settings.folder / "general.jsonl", GENERAL)


def test_other_retained_rows_are_refused_at_resume(ended, tmp_path: Path) -> None:
    settings, snapshot = ended
    copy = load_study(shutil.copytree(settings.folder, tmp_path / "study"))
    assert facts(list(run(copy, resume=True).trials)) == facts(list(snapshot.trials))
    write_rows(copy.folder / "general.jsonl", GENERAL[:-1])
    with pytest.raises(ConfigurationError, match=r"retained(_test)? rows: . now"):
        run(copy, resume=True)
    write_rows(copy.folder / "general.jsonl", GENERAL)
    with pytest.raises(ConfigurationError, match=r"forgetting.max_rows: was null, is 8"):
        run(load_study(copy.path, ["forgetting.max_rows=8"]), resume=True)


@pytest.mark.slow
def test_an_uninterrupted_study_is_the_same(ended, tmp_path: Path) -> None:
    _, snapshot = ended
    whole = run(load_study(study_in(tmp_path / "study")))
    assert facts(list(whole.trials)) == facts(list(snapshot.trials))


def test_the_plan_counts_the_scores_of_retained_rows(tmp_path: Path) -> None:
    path = study_in(tmp_path / "study")
    settings = load_study(path)
    splits, _, space = check(settings)
    assert estimate_study(settings, splits).time_s is not None
    evaluator = evaluator_for(settings, splits)
    candidate = space.decode(space.sample(Random(0)))
    with_it = Pace.measured(evaluator, candidate)
    tokens = sum(evaluator.lengths["retained"])
    rows = 12 + tokens / np.mean(evaluator.lengths["train"])
    assert with_it.validation_s / with_it.test_s == pytest.approx(
        rows / (12 + sum(evaluator.lengths["retained_test"]) / np.mean(evaluator.lengths["train"]))
    )


BAD: list[tuple[dict[str, Any], str]] = [
    ({"forgetting": None}, "objectives.2: forgetting needs the section forgetting"),
    (
        {"objectives": ["loss", "num_params"]},
        "forgetting: has no effect without forgetting among the",
    ),
    (
        {"objectives": ["loss", "num_params"], "report": ["forgetting"], "forgetting": None},
        "report.0: forgetting needs the section",
    ),
    ({"objectives": ["loss", "num_params", "forgetting@a"]}, "objectives.2: 'forgetting@a': forgetting is over all"),
    ({"objectives": ["forgetting", "num_params"]}, "objectives.0: forgetting cannot be the first quality"),
    ({"objectives": ["num_params", "forgetting", "loss"]}, "objectives.1: forgetting cannot be the first quality"),
    ({"forgetting": {"source": "files"}}, "forgetting.file: is missing"),
    ({"forgetting": {"source": "file"}}, "forgetting.source"),
    ({"forgetting": {"source": "embedded-prose", "file": "x.jsonl"}}, "forgetting.file: cannot be set with"),
    ({"forgetting": {"source": "embedded-prose", "max_rows": 3}}, "forgetting.max_rows"),
    ({"forgetting": {"source": "embedded-prose"}, "task": "classification"}, "is text without labels, for causal-lm"),
    (
        {"forgetting": {"source": "embedded-prose"}, "data": {**settings()["data"], "domain": "origin"}},
        "forgetting.source: embedded-prose has no column 'origin', which data.domain names",
    ),
    ({"data": {"source": "embedded-prose"}}, "data.source: embedded-prose has rows to retain"),
    ({"objectives": ["loss", "num_params", {"name": "forgetting", "direction": "maximise"}]}, "a better forgetting is"),
]


@pytest.mark.parametrize(("changes", "what"), BAD)
def test_wrong_settings_are_told_with_their_line(changes: dict[str, Any], what: str, tmp_path: Path) -> None:
    path = save_study(tmp_path / "study", **{k: v for k, v in {**CAUSAL, **changes}.items() if v is not None})
    with pytest.raises(StudyFileError) as caught:
        load_study(path)
    assert re.search(rf"study\.yaml:\d+ .*{re.escape(what)}", str(caught.value)), str(caught.value)


def test_rows_and_heads_are_checked_before_any_training(tmp_path: Path) -> None:
    path = study_in(tmp_path / "study")
    write_rows(path.parent / "general.jsonl", GENERAL[:1])
    with pytest.raises(StudyFileError, match=r"study.yaml:\d+ forgetting: general.jsonl: has one retained row"):
        check(load_study(path))
    write_rows(path.parent / "general.jsonl", [*GENERAL, {"text": " ".join(["w1"] * 40)}])
    splits, _, _ = check(load_study(path))
    assert any(re.search(r"cuts 1 of \d retained(_test)? rows", warning) for warning in splits.warnings)


def test_a_new_head_is_refused_and_a_pretrained_one_is_not(tmp_path: Path) -> None:
    changes = {"objectives": ["accuracy", "num_params", "forgetting"], "search": {"searcher": "random", "trials": 2}}
    path = save_study(tmp_path / "study", forgetting=CAUSAL["forgetting"], finalists={"seeds": 1, "most": 1}, **changes)
    rows = [json.loads(line) for line in (path.parent / "validation.jsonl").read_text().splitlines()]
    write_rows(path.parent / "general.jsonl", rows[:9])
    with pytest.raises(StudyFileError, match=r"forgetting: forgetting compares with the untouched model, whose task"):
        check(load_study(path))
    model = BertForSequenceClassification.from_pretrained(path.parent / "model", num_labels=3)
    model.config.id2label = {0: "cold", 1: "hot", 2: "warm"}
    model.save_pretrained(path.parent / "model")
    snapshot = run(load_study(path))
    assert {trial.role.name for trial in snapshot.trials if "forgetting" in trial.values} >= {"head", "lora-r8-qv"}


def test_settings_that_are_not_there_change_no_key(tmp_path: Path) -> None:
    plain = load_study(save_study(tmp_path / "plain"))
    assert "forgetting" not in plain.model_dump()
    assert "forgetting" not in fingerprint(plain)
    with_it = load_study(study_in(tmp_path / "study"))
    assert fingerprint(with_it)["forgetting"] == {"source": "files", "file": "general.jsonl", "max_rows": None}
