"""Studies whose quality is a metric of generated texts, from the file to the kept promise."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from autopeft.evaluators.base import Request
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.evaluators.training.train import TrainEvaluator
from autopeft.search_space.problem import Fidelity
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.config.fingerprint import fingerprint
from autopeft.studies.config.loading import load_study
from autopeft.studies.config.source import StudyFileError
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.check import check
from autopeft.studies.engine.cost_estimate import estimate_study
from autopeft.studies.engine.session import evaluator_for, open_ledger
from autopeft.studies.engine.time_budget import Pace
from autopeft.studies.errors import UnusableEnvironmentError
from autopeft.studies.recipes.build import recipe_of
from autopeft.studies.recipes.recipe import Recipe

from ...support.exported import WORDS, save_model
from ...support.tiny_study import save_study, settings, write_rows
from .test_metrics_study import cli
from .test_study import Quiet, facts, run

ONE = {"searcher": "random", "trials": 1}
OWN = """\
def first_word(prompts, generated, references):
    assert all(prompts) and len(prompts) == len(references)
    return [float(g.split()[:1] == r.split()[:1]) for g, r in zip(generated, references)]

def brittle(prompts, generated, references):
    if not set(generated) <= set(references):
        raise ValueError("not a reference")
    return [0.5] * len(references)
"""
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CAUSAL: dict[str, Any] = {
    "task": "causal-lm",
    "objectives": ["exact-match", "num_params"],
    "metrics": {"first": "mine:first_word"},
    "generation": {"max_new_tokens": 4},
    "search": {"searcher": "tpe", "trials": 4, "batch": 2, "rungs": [0.5], "keep": 0.5},
    "training": {"learning_rate": {"low": 1.0e-2, "high": 2.0e-1, "log": True}, "epochs": 6, "batch_size": 8},
    "finalists": {"seeds": 2, "most": 1},
    "baselines": {"names": ["lora-r8-qv"], "learning_rates": [3.0e-2]},
    "space": {
        "adapters": {"lora": {"at": ["attn.q", "attn.v", "mlp.down"], "rank": [1, 4], "vary": {"rank": "layer"}}}
    },
}


def llama() -> LlamaForCausalLM:
    ids = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **ids, max_position_embeddings=32))


def study_in(folder: Path, **changes: Any) -> Path:
    path = save_study(folder, **{**CAUSAL, **changes})
    save_model("llama", folder / "model", llama)
    for split, count in (("train", 40), ("validation", 12), ("test", 12)):
        rows = [{"prompt": f"w{i % 9} w{len(split)}", "completion": " w3 w4" if i % 3 else " w5"} for i in range(count)]
        write_rows(
            folder / f"{split}.jsonl", [{**row, "prompt": f"{row['prompt']} w{9 + i}"} for i, row in enumerate(rows)]
        )
    (folder / "mine.py").write_text(OWN)
    return path


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyFile, Snapshot]:
    """A study that was interrupted and resumed."""
    found = load_study(study_in(tmp_path_factory.mktemp("ended") / "study"))
    with pytest.raises(KeyboardInterrupt):
        run(found, watcher=Quiet(stop_after=3))
    return found, run(found, resume=True)


def test_every_trial_has_the_metrics_with_their_errors(ended) -> None:
    _, snapshot = ended
    states = set()
    for trial in snapshot.trials:
        found = trial.measurement
        assert found is not None, trial.error
        states.add(trial.state)
        assert {"exact-match", "first"} <= found.values.keys()
        if trial.state == "complete":
            for name in ("exact-match", "first"):
                column = np.array(found.per_example[name])
                assert set(column) <= {0.0, 1.0}
                assert found.values[name] == pytest.approx(column.mean())
                assert found.std_err[name] == pytest.approx(column.std(ddof=1) / len(column) ** 0.5)
    assert {"complete", "pruned"} <= states
    assert snapshot.quality == "exact-match"
    assert max(trial.measurement.values["exact-match"] for trial in snapshot.trials) > 0.5, "something is learnt"


def test_a_recipe_keeps_its_promise(ended, tmp_path: Path, capsys) -> None:
    settings, snapshot = ended
    path = tmp_path / "recipe.yaml"
    number = next(row.trial for row in snapshot.rows() if row.recommended)
    recipe = recipe_of(settings, open_ledger(settings), snapshot, number)
    recipe.save(path)
    assert recipe.generation is not None
    assert recipe.generation.max_new_tokens == 4
    assert Recipe.load(path) == recipe
    assert recipe.measured["exact-match"].low is not None
    assert cli(["verify", str(path), "--trust-code"]) in (0, 1)
    said = capsys.readouterr()
    assert "exact-match" in said.out + said.err


@pytest.mark.slow
def test_an_uninterrupted_study_is_the_same(ended, tmp_path: Path) -> None:
    _, snapshot = ended
    whole = run(load_study(study_in(tmp_path / "study")))
    assert facts(list(whole.trials)) == facts(list(snapshot.trials))


def test_texts_are_generated_at_the_end_and_where_candidates_are_compared(tmp_path: Path) -> None:
    path = study_in(tmp_path / "study")
    for every, at_rungs in (("end", False), ("rung", True)):
        settings = load_study(path, [f"generation.every={every}"])
        splits, _, space = check(settings)
        evaluator = evaluator_for(settings, splits)
        assert isinstance(evaluator, PackedEvaluator)
        candidate = space.decode(space.sample(Random(1)))
        request = Request(candidate=candidate, fidelity=Fidelity(share=1.0, rungs=(0.5,)))
        alone = TrainEvaluator(
            evaluator.loaded, "causal-lm", splits, 16, evaluator.metrics, generation=evaluator.generation
        )
        (packed,), (one,) = evaluator.evaluate([request]), alone.evaluate([request])
        for outcome in (packed, one):
            ((_, values),) = outcome.measurement.rungs
            assert ("exact-match" in values) == ("first" in values) == at_rungs
            assert "exact-match" in outcome.measurement.values
        assert packed.measurement.per_example["first"] == one.measurement.per_example["first"]
        (stopped,) = evaluator.evaluate([request], select=lambda share, found: [])
        assert "exact-match" in stopped.measurement.values, "a candidate that stops at a rung has its values"


@pytest.mark.slow
def test_a_pace_counts_the_texts_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that counts generated tokens: a text of 4 tokens takes 4 s, whatever else is done."""
    settings = load_study(study_in(tmp_path / "study"))
    splits, _, _ = check(settings)
    evaluator = evaluator_for(settings, splits)
    tokens = 0

    def count(_: Any, rows: Any, **how: Any) -> list[list[list[int]]]:
        nonlocal tokens
        tokens += len(rows) * how["max_new_tokens"]
        return []

    monkeypatch.setattr("autopeft.evaluators.generation.greedy_of_slots", count)
    monkeypatch.setattr("autopeft.evaluators.costs.timing.now", lambda _: float(tokens))
    pace = Pace.typical(settings, evaluator)
    assert pace.texts_s == pytest.approx(4.0 * 12)
    assert pace.rung_s == pytest.approx(4.0 * len(evaluator.rung_examples))
    assert 0 <= pace.validation_s - pace.texts_s < 4.0
    assert pace.test_s > 4.0 * 12
    found = estimate_study(settings, splits)
    assert found.texts_s == pytest.approx(48.0)
    assert found.time_s is not None
    assert found.time_s > 48 * (found.baselines + 2)
    assert "  texts        at most 1 min of each training to generate them" in found.lines()
    plain = load_study(settings.path, ["objectives=[loss, num_params]", "metrics=null", "generation=null"])
    assert estimate_study(plain, splits).texts_s is None


@pytest.mark.parametrize("evaluator", ["packed", "train"])
def test_a_metric_that_fails_ends_its_trial_with_file_and_line(evaluator: str, tmp_path: Path) -> None:
    path = study_in(tmp_path / "study", metrics={"x": "mine:brittle"}, evaluation={"evaluator": evaluator}, search=ONE)
    settings = load_study(path)
    splits, _, space = check(settings)
    (outcome,) = evaluator_for(settings, splits).evaluate([Request(candidate=space.decode(space.sample(Random(1))))])
    assert outcome.failure == "failed"
    where = f"mine:brittle, {path.parent / 'mine.py'}:7"
    assert outcome.reason == f"the metric x ({where}) raised ValueError: not a reference"


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"generation": {"every": "rung"}, "objectives": ["loss", "num_params"], "metrics": None},
        "generation: has no effect",
    ),
    ({"objectives": ["regex-match", "num_params"]}, "regex-match needs generation.pattern"),
    (
        {"objectives": ["regex-match", "num_params"], "generation": {"pattern": "(w"}},
        "is no regular expression: missing )",
    ),
    ({"generation": {"pattern": "w"}}, "generation.pattern: has no effect without regex-match, which reads it"),
    ({"generation": {"max_new_tokens": 0}}, "generation.max_new_tokens"),
    ({"objectives": ["pass-at-1", "num_params"]}, "generation: pass-at-1 runs generated programs on this machine"),
    ({"objectives": ["pass-at-1", "num_params"]}, "data.tests: pass-at-1 needs the column"),
    ({"generation": {"run_code": True}}, "generation.run_code: has no effect without pass-at-1 among the"),
    ({"objectives": ["rouge-l", "num_params"], "task": "classification"}, "rouge-l needs the task causal-lm"),
]


@pytest.mark.parametrize(("changes", "what"), BAD)
def test_wrong_settings_are_told_with_their_line(changes: dict[str, Any], what: str, tmp_path: Path) -> None:
    path = save_study(tmp_path / "study", **{**CAUSAL, **changes})
    with pytest.raises(StudyFileError) as caught:
        load_study(path)
    assert re.search(rf"study\.yaml:\d+ .*{re.escape(what)}", str(caught.value)), str(caught.value)


def test_rows_and_positions_are_checked_before_any_training(tmp_path: Path) -> None:
    path = study_in(tmp_path / "study")
    with pytest.raises(
        StudyFileError, match=r"generation.max_new_tokens: 30 tokens after the longest prompt of 3 are more"
    ):
        check(load_study(path, ["generation.max_new_tokens=30"]))
    pattern = ["objectives=[regex-match, num_params]", "generation.pattern=(w3)"]
    with pytest.raises(StudyFileError, match=r"not found in the reference 'w5'"):
        check(load_study(path, pattern))
    write_rows(path.parent / "validation.jsonl", [{"text": "w1 w2 w3"}, {"text": "w4 w5"}])
    with pytest.raises(StudyFileError, match=r"validation.jsonl:1.*2 of 2 validation rows have no prompt"):
        check(load_study(path))


def test_a_missing_package_is_told_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = study_in(tmp_path / "study", objectives=["chrf", "num_params"])
    monkeypatch.setattr("autopeft.search_space.metrics.base.find_spec", lambda name: None)
    what = r"study.yaml:\d+ objectives.0: the metric chrf .*: pip install sacrebleu"
    with pytest.raises(UnusableEnvironmentError, match=what):
        check(load_study(path))
    assert cli(["validate", str(path)]) == 4


def test_settings_that_are_not_there_change_no_key(tmp_path: Path) -> None:
    plain = load_study(save_study(tmp_path / "plain"))
    assert "generation" not in plain.model_dump()
    assert "generation" not in fingerprint(plain)
    assert "generation" not in json.loads(plain.model_dump_json())
    path = save_study(tmp_path / "texts", **settings(**CAUSAL))
    assert fingerprint(load_study(path))["generation"] == {"max_new_tokens": 4}
    assert "generation" not in fingerprint(
        load_study(path, ["generation.max_new_tokens=null", "generation.every=rung"])
    )
