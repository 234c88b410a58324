"""Studies with metrics by domain, of calibration, and only reported ones, from the file to the kept promise."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from autopeft.evaluators.base import Request
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.evaluators.training.train import TrainEvaluator
from autopeft.search_space.metrics.base import DOMAIN
from autopeft.search_space.problem import Fidelity
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.analysis.statistics import paired_difference
from autopeft.studies.config.fingerprint import fingerprint
from autopeft.studies.config.loading import load_study
from autopeft.studies.config.schema import json_schema
from autopeft.studies.config.source import StudyFileError
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.check import check
from autopeft.studies.engine.session import evaluator_for, open_ledger, read_snapshot
from autopeft.studies.errors import NoFeasibleCandidateError
from autopeft.studies.exporters.trl_script import script
from autopeft.studies.recipes.build import recipe_of
from autopeft.studies.recipes.pick import pick
from autopeft.studies.recipes.recipe import Recipe
from autopeft.studies.reports.report import write_report

from ...support.tiny_study import ROWS, save_study, settings, write_rows
from .test_metrics_study import OWN, RUNGS, TRAINING, cli
from .test_study import Quiet, facts, run

#: Some letters that MLflow, markup and mathematical text take for something else.
ODD = "a$b [c]"
DATA = {**settings()["data"], "domain": "area"}
STUDY: dict[str, Any] = {
    "data": DATA,
    "objectives": ["accuracy@law", "accuracy@code", "num_params"],
    "report": [
        "macro-f1",
        {"name": "accuracy@worst", "bound": 0.0},
        "ece@law",
        "brier",
        "mistakes@law",
        f"loss@{ODD}",
        "latency_s",
    ],
    "metrics": {"mistakes": "mine:mistakes"},
    "search": RUNGS,
    "training": {**TRAINING, "epochs": 3},
    "finalists": {"seeds": 2, "most": 2},
}
NAMES = ("accuracy@law", "accuracy@code", "macro-f1", "accuracy@worst", "ece@law", "brier", f"loss@{ODD}")


def area(i: int) -> str:
    return ODD if i % 10 == 9 else ("law", "code")[i % 2]


def study_in(folder: Path, **changes: Any) -> Path:
    path = save_study(folder, **{**STUDY, **changes})
    for split in ROWS:
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        write_rows(folder / f"{split}.jsonl", [{**row, "area": area(i)} for i, row in enumerate(rows)])
    (folder / "mine.py").write_text(OWN)
    return path


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyFile, Snapshot]:
    """A study that was interrupted and resumed."""
    path = study_in(tmp_path_factory.mktemp("ended") / "study", tracking={"enabled": True})
    found = load_study(path)
    with pytest.raises(KeyboardInterrupt):
        run(found, watcher=Quiet(stop_after=5))
    return found, run(found, resume=True)


@pytest.mark.slow
def test_an_interrupted_study_ends_as_an_uninterrupted_one(ended, tmp_path: Path) -> None:
    report = [named for named in STUDY["report"] if named != "latency_s"]  # no two measurements are equal
    shown = [facts(list(run(load_study(study_in(tmp_path / "study", report=report))).trials))]
    shown.append(facts(list(ended[1].trials)))
    for one in shown:
        for entry in one:
            if entry[-1]:
                entry[-1][0].pop("latency_s", None)
    assert shown[0] == shown[1]


def test_every_trial_has_the_values_of_the_domains_rows(ended) -> None:
    study, snapshot = ended
    assert not snapshot.left_out
    assert snapshot.quality == "accuracy@law"
    assert read_snapshot(study, open_ledger(study)).rows() == snapshot.rows()
    states = set()
    for trial in snapshot.trials:
        found = trial.measurement
        if found is None:
            continue
        states.add(trial.state)
        assert {*NAMES, "mistakes", "mistakes@law", "latency_s"} <= found.values.keys()
        for _, values in found.rungs:
            assert {*NAMES, "mistakes@law"} <= values.keys(), "every domain is there at every rung"
        if trial.state != "complete":
            continue
        for columns, total in ((found.per_example, "validation"), (found.test_per_example, "test")):
            if not columns:
                continue
            rows = [i for i in range(ROWS[total]) if area(i) == "law"]
            whole = columns["accuracy"]
            assert list(columns["accuracy@law"]) == [whole[i] for i in rows]
            assert len(columns["accuracy@worst"]) == len(whole) == ROWS[total]
        domains = {name: found.values[f"accuracy@{name}"] for name in ("law", "code")}
        assert found.values["accuracy@law"] == pytest.approx(np.mean(found.per_example["accuracy@law"]))
        assert found.values["accuracy@worst"] <= min(domains.values())
        assert found.values["mistakes@law"] == pytest.approx(1 - found.values["accuracy@law"])
        assert set(found.per_example) <= found.std_err.keys()
    assert {"complete", "pruned"} <= states


def test_differences_are_paired_on_the_domains_rows(ended) -> None:
    _, snapshot = ended
    first, second = [entry for entry in snapshot.entries() if entry.repeats][:2]
    for name in ("accuracy@law", "accuracy@worst", "ece@law"):
        found = paired_difference(first.scores(name), second.scores(name))
        means = [np.mean([run.values[name] for run in entry.runs]) for entry in (first, second)]
        assert found.value == pytest.approx(first.sign(name) * (means[0] - means[1]), abs=1e-7)
    assert first.sign("ece@law") == first.sign(f"loss@{ODD}") == first.sign("mistakes@law") * -1 == -1.0


def test_all_reports_have_them(ended, tmp_path: Path, capsys) -> None:
    from mlflow import MlflowClient

    study, snapshot = ended
    assert cli(["pareto", str(study.path)]) == 0
    table = capsys.readouterr().out
    assert cli(["pareto", str(study.path), "--json"]) == 0
    members = json.loads(capsys.readouterr().out)
    report = write_report(snapshot, tmp_path / "report")
    assert not report.problems
    page = (tmp_path / "report" / "front.html").read_text(encoding="utf-8")
    with (tmp_path / "report" / "front.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    client = MlflowClient(tracking_uri=study.tracking_uri)
    experiment = client.get_experiment_by_name(study.study)
    runs = client.search_runs([experiment.experiment_id], max_results=500)
    told = {run.data.tags["autopeft.trial"]: run.data.metrics for run in runs if "autopeft.trial" in run.data.tags}
    for name in NAMES:
        assert name in table
        assert f"<th>{name}</th>" in page
        assert all(line[name] for line in lines)
        assert all(name in member["values"] and name in member["std_err"] for member in members)
    assert "<th>latency_s</th>" in page
    for member in members:
        metrics, values = told[str(member["trial"])], member["values"]
        assert metrics["front/accuracy_at_law"] == pytest.approx(values["accuracy@law"])
        assert metrics["front/macro-f1"] == pytest.approx(values["macro-f1"])
        trial = snapshot.entry(member["trial"]).trial
        assert metrics["obj/accuracy_at_code"] == pytest.approx(trial.values["accuracy@code"])
        assert metrics["metric/accuracy_at_worst"] == pytest.approx(trial.values["accuracy@worst"])
        (odd,) = (name for name in metrics if name.startswith("metric/loss_at_a_b _c_") and "std_err" not in name)
        assert metrics[odd] == pytest.approx(trial.values[f"loss@{ODD}"])
    (note,) = (run.data.tags["mlflow.note.content"] for run in runs if "autopeft.trial" not in run.data.tags)
    assert "| `obj/accuracy_at_law` | of domain law: " in note
    assert "| `metric/accuracy_at_worst` | of the worst domain: " in note
    assert "worst acceptable value: 0 |" in note


def test_a_condition_may_be_on_a_domain(ended) -> None:
    _, snapshot = ended
    rows = [row for row in snapshot.rows() if row.on_front]
    best = max(rows, key=lambda row: row.values["accuracy@code"])
    chosen = pick(snapshot, f"accuracy@code>={best.values['accuracy@code'] - 1e-9}")
    found = next(row for row in rows if row.trial == chosen)
    assert found.values["accuracy@code"] == best.values["accuracy@code"]
    assert pick(snapshot, f"loss@{ODD} <= 1e3") in {row.trial for row in rows}


def test_recipes_promise_and_keep_it(ended, tmp_path: Path, capsys) -> None:
    study, snapshot = ended
    number = next(row.trial for row in snapshot.rows() if row.recommended)
    path = tmp_path / "recipe.yaml"
    recipe = recipe_of(study, open_ledger(study), snapshot, number)
    recipe.save(path)
    assert Recipe.load(path) == recipe
    promised = recipe.measured["accuracy@law"]
    assert promised.split == "test"
    assert promised.low is not None
    assert recipe.maximises("accuracy@law")
    assert not recipe.maximises("ece@law")
    assert {"accuracy@worst", "brier", "mistakes@law"} <= recipe.measured.keys()
    assert cli(["verify", str(path), "--seeds", "1", "--json", "--trust-code"]) in (0, 1)
    assert list(json.loads(capsys.readouterr().out)["kept"]) == ["accuracy@law"]
    assert cli(["train", str(path), "--trust-code", "--json"]) == 0
    assert {*NAMES, "mistakes", "mistakes@law"} <= json.loads(capsys.readouterr().out)["test"].keys()


def test_a_training_script_says_what_it_does_not_compute(ended) -> None:
    study, snapshot = ended
    recipe = recipe_of(study, open_ledger(study), snapshot, snapshot.rows()[0].trial)
    text = script(recipe)
    said = " ".join(text.partition('"""')[2].partition('"""')[0].split())
    assert "It prints the loss and accuracy, macro-f1." in said
    for name in ("accuracy@law", "accuracy@worst", "ece@law", "brier", "the study's own mistakes (mine:mistakes)"):
        assert name in said.partition("It does not compute ")[2]
    assert "'accuracy@law':" not in text


def test_columns_in_a_pack_are_those_alone(tmp_path: Path) -> None:
    found = load_study(study_in(tmp_path / "study"))
    splits, _, space = check(found)
    packed = evaluator_for(found, splits)
    assert isinstance(packed, PackedEvaluator)
    alone = TrainEvaluator(packed.loaded, "classification", splits, 16, packed.metrics)
    rung = Fidelity(share=1.0, rungs=(0.5,))
    candidates = [space.decode(space.sample(Random(seed))) for seed in (1, 2, 3)]
    requests = [Request(candidate=candidate, fidelity=rung, test=True) for candidate in candidates]
    for one, other in zip(packed.evaluate(requests), alone.evaluate(requests), strict=True):
        assert one.measurement is not None
        assert other.measurement is not None
        for name in (*NAMES, "mistakes@law"):
            assert one.measurement.values[name] == pytest.approx(other.measurement.values[name], abs=1e-4)
            pair = one.measurement.per_example[name], other.measurement.per_example[name]
            assert pair[0] == pytest.approx(pair[1], abs=2e-3)
        ((_, at_rung),), ((_, at_rung_alone),) = one.measurement.rungs, other.measurement.rungs
        assert at_rung == pytest.approx(at_rung_alone, abs=1e-3)


def test_a_rung_has_every_domain_however_few_its_rows_are(tmp_path: Path) -> None:
    path = study_in(tmp_path / "study")
    rows = [json.loads(line) for line in (path.parent / "validation.jsonl").read_text().splitlines()]
    areas = {301: ODD, 303: ODD, 5: "code", 7: "code"}
    many = [{**rows[i % 30], "area": areas.get(i, "law")} for i in range(640)]
    write_rows(path.parent / "validation.jsonl", many)
    alone = ["evaluation.evaluator=train", "search.keep=1.0"]
    found = load_study(path, alone)
    evaluator = evaluator_for(found, check(found)[0])
    column = evaluator._domains("validation", evaluator.rung_examples)[DOMAIN]
    assert set(column) == {"law", "code", ODD}
    assert 250 <= len(column) <= 330
    plain = load_study(path, ["objectives=[accuracy, num_params]", "report=null", *alone])
    before = evaluator_for(plain, check(plain)[0]).rung_examples
    assert before == range(640)[::2], "without a metric by domain, the examples are what they were"


def test_a_bound_of_what_is_reported_is_a_constraint(tmp_path: Path) -> None:
    never = [{"name": "mistakes", "direction": "minimise", "bound": 0.0}]
    with pytest.raises(NoFeasibleCandidateError, match="a value exceeds a bound"):
        run(load_study(study_in(tmp_path / "study", report=never, search={"searcher": "random", "trials": 3})))
    ledger = open_ledger(load_study(tmp_path / "study" / "study.yaml"))
    complete = [trial for trial in ledger.trials() if trial.state == "complete"]
    assert complete
    assert all(trial.violation == pytest.approx(trial.values["mistakes"]) for trial in complete)


@pytest.mark.slow
@pytest.mark.parametrize("searcher", ["bo", "evolution"])
def test_searchers_know_the_bounds_of_what_is_reported(searcher: str, tmp_path: Path) -> None:
    """The smallest half of the space is all that is allowed, so later proposals are there."""
    report = [{"name": "stored_bytes", "bound": 400.0}]
    search = {"searcher": searcher, "trials": 8, "batch": 4}
    snapshot = run(load_study(study_in(tmp_path / "study", report=report, search=search, finalists={"seeds": 1})))
    later = [trial for trial in snapshot.search_trials if trial.state == "complete"][4:]
    assert any(trial.violation <= 0 for trial in later)
    assert all(row.values["stored_bytes"] <= 400 for row in snapshot.rows() if row.on_front)


# What may go wrong


def problems(folder: Path, **changes: Any) -> list[str]:
    with pytest.raises(StudyFileError) as caught:
        check(load_study(study_in(folder, **changes)))
    return [problem.split(" ", 1)[1] for problem in caught.value.problems]


def test_all_wrong_names_are_told_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path / "study",
        objectives=["acuracy@law", "accuracy@", "num_params"],
        report=[
            "num_params@law",
            "num_params",
            "brier",
            "brier",
            {"name": "loss@law", "direction": "maximise"},
            {"name": "accuracy@code", "bound": 2.0},
            {"name": "mistakes", "direction": "minimise"},
            {"name": "mistakes@law", "direction": "maximise"},
            "rouge-l@law",
        ],
    )
    assert found == [
        "objectives.0: unknown metric 'acuracy@law'; did you mean 'accuracy'?",
        "objectives.1: 'accuracy@' ends without a domain: write the name of one, or @worst for the worst one",
        "report.0: 'num_params@law': num_params is a cost, which is the same for all domains",
        "report.1: 'num_params' is already an objective, which all tables have: remove it here",
        "report.3: 'brier' occurs twice",
        "report.4.direction: a better loss@law is smaller: leave the direction out",
        "report.5.bound: no candidate can reach 2: the best possible accuracy@code is 1",
        "report.7.direction: mistakes has the direction minimise: give all parts of mistakes one",
        "report.8: rouge-l@law needs the task causal-lm",
    ]


def test_domains_are_checked_before_any_training(tmp_path: Path) -> None:
    without = {key: value for key, value in DATA.items() if key != "domain"}
    found = problems(tmp_path / "a", data=without, report=None)
    assert found == [
        f"objectives.{i}: accuracy@{name} needs data.domain, the field of the rows with their domains"
        for i, name in enumerate(("law", "code"))
    ]
    found = problems(tmp_path / "b", objectives=["accuracy@lw", "accuracy@code", "num_params"], report=["ece@cod"])
    assert found == [
        "objectives.0: accuracy@lw: no row has the domain 'lw'; did you mean 'law'?",
        "report.0: ece@cod: no row has the domain 'cod'; did you mean 'code'?",
    ]
    path = study_in(tmp_path / "c", report=["loss@worst", "brier@worst"])
    for split, names in (("validation", ("law", "law", "code")), ("test", ("worst", "code"))):
        rows = [json.loads(line) for line in (path.parent / f"{split}.jsonl").read_text().splitlines()]
        kept = [{**row, "area": names[i % len(names)]} for i, row in enumerate(rows)]
        write_rows(path.parent / f"{split}.jsonl", [*kept, {**rows[0], "text": f"{split} w1", "area": ODD}])
    rows = [json.loads(line) for line in (path.parent / "train.jsonl").read_text().splitlines()]
    write_rows(path.parent / "train.jsonl", [*rows, {**rows[0], "area": "worst"}])
    with pytest.raises(StudyFileError) as caught:
        check(load_study(path))
    text = "\n".join(caught.value.problems)
    assert "objectives.0: accuracy@law: the test split has no row of the domain 'law'; a score needs two" in text
    assert f"report.0: loss@worst: the validation split has one row of the domain {ODD!r}" in text
    assert f"report.1: brier@worst: the test split has one row of the domain {ODD!r}" in text
    assert "report.0: loss@worst is of the worst domain, and the rows have a domain 'worst': give it another" in text


def test_an_own_metric_is_tried_on_the_rows_of_the_domain(tmp_path: Path) -> None:
    own = {"mistakes": "mine:mistakes", "wide": "mine:wide"}
    path = study_in(tmp_path / "study", metrics=own, report=["wide@code"])
    wide = "def wide(targets, predictions):\n    assert len(targets) > 20, 'too few'\n    return 1.0\n"
    (path.parent / "mine.py").write_text(f"{OWN}\n{wide}")
    with pytest.raises(StudyFileError, match=r"report.0: wide@code: the metric wide \(mine:wide\) raised Assertion"):
        check(load_study(path))


def test_a_study_without_a_report_is_what_it_was(tmp_path: Path) -> None:
    plain = load_study(save_study(tmp_path / "study"))
    assert "report" not in plain.model_dump(mode="json")
    assert "report" not in fingerprint(plain)
    assert plain.reported_list() == ()
    told = load_study(save_study(tmp_path / "other"), ["report=[macro-f1]"])
    assert fingerprint(told)["report"] == [{"name": "macro-f1", "bound": None, "direction": None}]
    assert [metric.name for metric in told.qualities()] == ["loss", "accuracy", "macro-f1"]


def test_the_schema_knows_names_with_domains() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json_schema())

    def valid(**changes: Any) -> bool:
        return not list(validator.iter_errors({"study": "s", **changes}))

    objectives = ["accuracy@law", {"name": "loss@worst", "bound": 2.0}]
    assert valid(objectives=objectives, report=["ece", {"name": "brier@a b"}])
    for wrong in ("acc@law", "num_params@law", "accuracy@", "x"):
        assert not valid(objectives=[wrong, "num_params"])
        assert not valid(report=[{"name": wrong}])
    assert valid(objectives=["x@law", "num_params"], report=["x"], metrics={"x": "a:b"})
    assert not valid(report=[{"name": "ece", "reference": 1.0}])
