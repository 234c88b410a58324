"""Studies whose quality is pass@1: programs that run by consent only, from the file to a recipe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from autopeft.evaluators.base import Request
from autopeft.evaluators.texts import programs_of
from autopeft.evaluators.training.train import TrainEvaluator
from autopeft.search_space.metrics import QUALITIES, MetricError
from autopeft.studies.config.fingerprint import fingerprint
from autopeft.studies.config.loading import load_study
from autopeft.studies.config.source import StudyFileError
from autopeft.studies.engine.check import check
from autopeft.studies.engine.session import evaluator_for, open_ledger
from autopeft.studies.recipes.build import recipe_of
from autopeft.studies.recipes.recipe import Recipe

from ...support.tiny_study import settings, write_rows
from .test_metrics_study import cli
from .test_study import run
from .test_texts_study import ONE, study_in

PROGRAMS: dict[str, Any] = {
    "objectives": ["pass-at-1", "num_params"],
    "metrics": None,
    "generation": {"max_new_tokens": 1, "run_code": True},
    "search": ONE,
}


def rows(count: int, **changes: Any) -> list[dict[str, Any]]:
    """Functions whose last word is to be generated."""
    found = []
    for i in range(count):
        word, number = ("w3", 3) if i % 3 else ("w5", 5)
        prompt, tests = f"def w{9 + i}(w3=3, w5=5): return", f"assert w{9 + i}() == {number}"
        found.append({"prompt": prompt, "completion": f" {word}", "checks": tests, **changes})
    return found


def study_of(folder: Path, **changes: Any) -> Path:
    path = study_in(folder, **PROGRAMS, data={**settings()["data"], "tests": "checks"})
    write_rows(folder / "train.jsonl", [{**row, "checks": None} for row in rows(30)])
    for split in ("validation", "test"):
        write_rows(folder / f"{split}.jsonl", rows(9, **changes))
    return path


@pytest.mark.slow
def test_a_study_runs_the_programs_of_its_texts_and_a_recipe_by_consent(tmp_path: Path, capsys: Any) -> None:
    found = load_study(study_of(tmp_path / "study"))
    snapshot = run(found)
    values = {}
    for trial in snapshot.trials:
        measured = trial.measurement
        assert measured is not None, trial.error
        values[trial.number] = measured.values["pass-at-1"]
        assert measured.values["pass-at-1"] == pytest.approx(sum(measured.per_example["pass-at-1"]) / 9)
    assert max(values.values()) >= 6 / 9, "it learns the more frequent word at least"
    recommended = next(row.trial for row in snapshot.rows() if row.recommended)
    recipe = recipe_of(found, open_ledger(found), snapshot, recommended)
    assert recipe.data.tests == "checks"
    recipe.save(path := tmp_path / "recipe.yaml")
    assert Recipe.load(path) == recipe
    assert cli(["verify", str(path)]) == 2
    assert "pass-at-1 runs generated programs on this machine" in capsys.readouterr().err
    assert cli(["verify", str(path), "--trust-code"]) in (0, 1)
    assert "pass-at-1" in capsys.readouterr().out


def test_consent_changes_no_key_and_no_evaluator_runs_without_it(tmp_path: Path) -> None:
    found = load_study(study_of(tmp_path / "study"))
    assert fingerprint(found)["generation"] == {"max_new_tokens": 1}
    plain = load_study(study_in(tmp_path / "plain"))
    assert "tests" not in fingerprint(plain)["data"]
    assert "run_code" not in plain.model_dump()["generation"]
    splits, _, space = check(found)
    evaluator = evaluator_for(found, splits)
    (outcome,) = evaluator.evaluate([Request(candidate=space.decode(space.largest()))])
    assert outcome.measurement is not None
    with pytest.raises(MetricError, match=r"consent with generation: \{run_code: true\}"):
        TrainEvaluator(evaluator.loaded, "causal-lm", splits, 16, [QUALITIES["loss"], QUALITIES["pass-at-1"]])


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"checks": "assert f( =="}, r"data.tests: validation.jsonl:1: its tests are no Python: .*9 of 9"),
        ({"checks": None}, r"data.tests: test.jsonl:1: the column of data.tests is missing or empty"),
        ({"checks": 3}, r"validation.jsonl:1: field 'checks' must be a non-empty text"),
        ({"checks": "assert w9() == 4"}, r"no reference passes its tests, of 9 validation rows .*: AssertionError"),
        ({"checks": "w3 = 3", "prompt": "w5 = 5 #"}, r"the tests test nothing: .*\(9 test rows\)"),
    ],
)  # fmt: skip
def test_tests_that_cannot_decide_are_refused_before_any_training(
    changes: dict[str, Any], what: str, tmp_path: Path
) -> None:
    with pytest.raises(StudyFileError) as caught:
        check(load_study(study_of(tmp_path / "study", **changes)))
    assert re.search(what, str(caught.value), re.DOTALL), str(caught.value)


def test_a_text_continues_a_program_and_is_one_of_its_own_elsewhere(tmp_path: Path) -> None:
    splits, _, _ = check(load_study(study_of(tmp_path / "study")))
    assert programs_of(splits)["validation"][0] == ("def w9(w3=3, w5=5): return", "assert w9() == 5")
    chat = {"messages": [{"role": "user", "content": "Write f."}, {"role": "assistant", "content": "f = 1"}]}
    told = {"prompt": "Write f:\n", "completion": "f = 1"}
    fenced = {"prompt": "Write f:\n```python\n", "completion": "f = 1\n```"}
    splits.validation[:3] = [{**row, "tests": "assert f == 1"} for row in (chat, told, fenced)]
    assert [start for start, _ in programs_of(splits)["validation"][:3]] == ["", "", fenced["prompt"]]
