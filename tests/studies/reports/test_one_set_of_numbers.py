"""Table, JSON, CSV, page, MLflow and recipe of a study have the same numbers for each member of the front."""

from __future__ import annotations

import csv
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from autopeft.studies.analysis.statistics import paired_difference
from autopeft.studies.cli.app import main
from autopeft.studies.config.loading import load_study
from autopeft.studies.engine.check import check
from autopeft.studies.engine.session import open_ledger, open_study, read_snapshot
from autopeft.studies.notebook.result import Result
from autopeft.studies.recipes.build import recipe_of
from autopeft.studies.recipes.recipe import Recipe
from autopeft.studies.reports.report import write_report

from ...support.slow import mostly_slow
from ...support.tiny_study import save_study
from ..engine.test_study import Quiet


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """MLflow takes seconds to make its tables, so the studies share a store."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


SHORT = {"search": {"searcher": "tpe", "trials": 4, "batch": 2}}
STUDIES: dict[str, dict[str, Any]] = {
    "accuracy": {"objectives": ["accuracy", "loss", "num_params"]},
    "loss": {"objectives": ["loss", "num_params"], "recommend": {"within": 0.2}},
    "macro-f1": {"objectives": ["macro-f1", "num_params", "stored_bytes"], "finalists": {"seeds": 3, "most": 2}},
}


def cells(page: str) -> dict[str, list[str]]:
    """Return the cells of the page's table by the name of the candidate."""
    rows = re.findall(r"<tr class=.*?</tr>", page)
    found = [[unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in rows]
    return {row[1]: row for row in found}


@pytest.mark.parametrize("quality", mostly_slow(STUDIES, "macro-f1"))
def test_every_report_has_the_same_numbers(
    quality: str, uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(*words: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            main(list(words))
        assert exit_.value.code == 0
        return capsys.readouterr().out

    path = save_study(tmp_path / "study", **SHORT, **STUDIES[quality], study=f"by-{quality}", tracking={"uri": uri})
    settings = load_study(path)
    splits, _, _ = check(settings)
    with open_study(settings, splits, resume=False) as study:
        study.run(Quiet())
    ledger = open_ledger(settings)
    snapshot = read_snapshot(settings, ledger)
    write_report(snapshot, tmp_path / "report")

    members = json.loads(printed("pareto", str(path), "--json"))
    table = printed("pareto", str(path))
    page = cells((tmp_path / "report" / "front.html").read_text(encoding="utf-8"))
    with (tmp_path / "report" / "front.csv").open(encoding="utf-8") as file:
        lines = {int(line["trial"]): line for line in csv.DictReader(file)}
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(settings.study)
    assert experiment is not None
    tracked = client.search_runs([experiment.experiment_id], "tags.`autopeft.pareto` = 'true'")
    runs = {int(run.data.tags["autopeft.trial"]): run.data for run in tracked}
    assert len(members) > 1
    assert set(runs) == {member["trial"] for member in members}
    assert json.loads((tmp_path / "report" / "front.json").read_text(encoding="utf-8")) == members

    for member in members:
        number, label, gap, test = (member[key] for key in ("trial", "label", "difference", "test"))
        test = test[quality]
        numbers = {quality: member["values"][quality], f"{quality}_std_err": member["std_err"][quality]}
        for name, found in ((f"{quality}_difference", gap), (f"test_{quality}", test)):
            if found is not None:
                numbers |= {name: found["value"]}
                numbers |= {f"{name}_{part}": found[part] for part in ("std_err", "low", "high")}
        assert (gap is None) == (member["standing"] == "best")
        # MLflow and CSV
        metrics = {name: runs[number].metrics[f"front/{name}"] for name in numbers}
        assert metrics == pytest.approx(numbers, abs=1e-12)
        assert {name: float(lines[number][name]) for name in numbers} == pytest.approx(numbers, abs=1e-12)
        assert runs[number].tags["autopeft.standing"] == member["standing"] == lines[number]["standing"]
        assert runs[number].tags["autopeft.recommended"] == str(member["recommended"]).lower()
        # Table
        (line,) = (line for line in table.splitlines() if re.search(rf"│ {re.escape(label)} +│", line))
        columns = [cell.strip() for cell in line.split("│")]
        for text, exact in zip(columns[3].split(" ± "), (numbers[quality], numbers[f"{quality}_std_err"]), strict=True):
            assert float(text) == pytest.approx(exact, abs=0.51 * 10.0 ** -len(text.partition(".")[2]))
        if gap is not None:
            assert f"{gap['value']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f})" in columns
        assert f"{test['value']:.4f} ± {test['std_err']:.4f}" in columns
        assert member["standing"] in columns
        assert (columns[1] == "*") == member["recommended"]
        # Page
        factor = 1 if quality == "loss" else 100
        assert float(page[label][2].split()[0]) == pytest.approx(factor * numbers[quality], abs=0.06)
        assert member["standing"] in page[label]
        assert float(page[label][-2].split()[0]) == pytest.approx(factor * test["value"], abs=0.06)
        if gap is not None:
            shown = next(cell for cell in page[label] if " to " in cell)
            ends = [float(text) for text in re.findall(r"[-+][\d.e-]+", shown)]
            assert ends == pytest.approx([factor * gap[part] for part in ("value", "low", "high")], abs=0.06)
        # Recipe, through its file
        recipe_of(settings, ledger, snapshot, number).save(tmp_path / "recipe.yaml")
        recipe = Recipe.load(tmp_path / "recipe.yaml")
        assert recipe.compared is not None
        assert recipe.compared.metric == quality
        assert (recipe.compared.standing, recipe.compared.recommended) == (member["standing"], member["recommended"])
        assert recipe.compared.value == pytest.approx(numbers[quality])
        assert recipe.compared.std_err == pytest.approx(numbers[f"{quality}_std_err"])
        assert (recipe.compared.difference is None) == (gap is None)
        if recipe.compared.difference is not None:
            assert recipe.compared.difference.model_dump() == pytest.approx(gap)
        promised = recipe.measured[quality]
        assert promised.split == "test"
        assert (promised.value, promised.std_err, promised.low, promised.high) == pytest.approx(
            (test["value"], test["std_err"], test["low"], test["high"])
        )
        assert list(promised.seeds) == member["seeds"]


@pytest.mark.slow
def test_every_report_has_the_same_gains(uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Table, JSON, page, MLflow and notebook say the same on each baseline by rule."""
    names = ["rule-unsloth", "rule-tinker", "sweep-all-linear-r16", "mlp-only-r10"]
    path = save_study(
        tmp_path / "study",
        search={"searcher": "random", "trials": 2, "batch": 2},
        baselines={"names": names, "learning_rates": [1e-2]},
        finalists={"seeds": 2, "most": 1},
        study="by-rule",
        tracking={"uri": uri},
    )
    settings = load_study(path)
    splits, _, _ = check(settings)
    assert [line.partition(": ")[2] for line in splits.warnings] == [
        "rule-tinker: its formula knows Llama and Qwen; for bert it takes Llama's exponent"
    ]
    with open_study(settings, splits, resume=False) as study:
        snapshot = study.run(Quiet())
    trained = {str(trial.role): trial.candidate.training["learning_rate"] for trial in snapshot.trials[:4]}
    assert trained == {
        "baseline:rule-unsloth": 2e-4,
        "baseline:rule-tinker": pytest.approx(5e-4 * (2000 / 16) ** 0.781, rel=1e-3),
        "baseline:sweep-all-linear-r16": 1e-2,
        "baseline:mlp-only-r10": 1e-2,
    }
    with pytest.raises(SystemExit):
        main(["pareto", str(path)])
    table = capsys.readouterr().out
    write_report(snapshot, tmp_path / "report")
    page = unescape((tmp_path / "report" / "front.html").read_text(encoding="utf-8"))
    members = json.loads((tmp_path / "report" / "front.json").read_text(encoding="utf-8"))
    (recommended,) = (member for member in members if member["recommended"])
    assert not any("gains" in member for member in members if member is not recommended)
    told = recommended["gains"]
    assert [gain["baseline"] for gain in told] == names
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("by-rule")
    assert experiment is not None
    (parent,) = client.search_runs([experiment.experiment_id], "tags.`autopeft.role` = 'study'")
    note = parent.data.tags["mlflow.note.content"]
    entries = {entry.trial.role.name: entry for entry in snapshot.tuned()}
    best = snapshot.entry(recommended["trial"]).scores("accuracy")
    assert tuple(gain.to_dict() for gain in Result(settings, snapshot).gains) == tuple(told)
    for gain in told:
        for report in (table.splitlines(), note.splitlines()):
            assert gain["sentence"] in report
        assert f"<p>{gain['sentence']}</p>" in page
        if gain["difference"] is not None:  # None: this baseline is the recommended member
            found = gain["difference"]
            own = paired_difference(best, entries[gain["baseline"]].scores("accuracy"), spread=snapshot.spread())
            assert (found["value"], found["low"], found["high"]) == pytest.approx((own.value, own.low, own.high))
            assert f"{100 * own.value:+.1f} points (95 % interval {100 * own.low:+.1f} to" in gain["sentence"]
        if gain["structure"] is not None:
            parts = gain["learning_rate"]["value"] + gain["structure"]["value"]
            assert parts == pytest.approx(gain["difference"]["value"])
