"""A study that searches inits and learning rates of LoRA: from the file to a recipe, its retraining and its export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from autopeft.search_space.adapters import Lora
from autopeft.search_space.problem import Trial
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.config.loading import load_study
from autopeft.studies.engine.retraining import retrain
from autopeft.studies.engine.session import open_ledger
from autopeft.studies.exporters import EXPORTERS
from autopeft.studies.exporters.native import load
from autopeft.studies.recipes.build import recipe_of

from ...support.tiny_study import LABELS, save_study
from .test_kills import goes_on, recorded

torch.set_num_threads(1)

STUDY: dict[str, Any] = {
    "space": {
        "adapters": {
            "lora": {
                "at": ["attn.q", "attn.v"],
                "rank": [1, 2],
                "init": ["kaiming", "pissa", "eva", "lora_ga"],
                "rate_ratio": [1.0, 4.0],
                "freeze_a": [True, False],
                "rate": {"low": 0.1, "high": 1.0, "log": True},
            }
        }
    },
    "search": {"searcher": "random", "trials": 8, "batch": 4},
    "finalists": {"seeds": 2, "most": 1},
    "baselines": {"names": ["head"], "learning_rates": [0.1]},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Snapshot, list[str]]:
    path = save_study(tmp_path_factory.mktemp("inits"), **STUDY)
    return path, *recorded(load_study(path))


def inits_of(trial: Trial) -> set[str]:
    return {spec.init for _, spec in trial.candidate.architecture if isinstance(spec, Lora)}


def test_the_inits_are_searched(finished: tuple[Path, Snapshot, list[str]]) -> None:
    _, snapshot, _ = finished
    trials = list(snapshot.search_trials)
    assert len(trials) == 8
    assert all(trial.state == "complete" for trial in trials), [trial.error for trial in trials]
    assert len(set.union(*map(inits_of, trials))) >= 3


@pytest.mark.slow
def test_a_kill_changes_nothing(finished: tuple[Path, Snapshot, list[str]], tmp_path: Path) -> None:
    """The statistics are computed again, from the same rows."""
    _, snapshot, made = finished
    goes_on(snapshot, made, len(made) // 2, tmp_path, STUDY)


@pytest.mark.parametrize("init", ["pissa", "eva", "lora_ga"])
def test_a_recipe_trains_and_loads(finished: tuple[Path, Snapshot, list[str]], tmp_path: Path, init: str) -> None:
    """`autopeft train` starts from its own rows; what it trains is the trial's network, in native and in peft."""
    path, snapshot, _ = finished
    found = [trial for trial in snapshot.search_trials if inits_of(trial) == {init}]
    if not found:
        pytest.skip(f"no trial has init {init}")
    settings = load_study(path)
    recipe = recipe_of(settings, open_ledger(settings), snapshot, found[0].number)
    first, second = (retrain(recipe, [found[0].seed])[0].outcome for _ in range(2))
    for outcome in (first, second):
        assert outcome.measurement is not None
        assert found[0].measurement is not None
        # The pack of the study has other roundings.
        assert outcome.measurement.losses == pytest.approx(found[0].measurement.losses, rel=1e-4)
    for target in ("native", "peft"):
        EXPORTERS[target].export(recipe, first.weights, tmp_path / target)
    ids = torch.tensor([[2, 5, 9, 3]])
    with torch.no_grad():
        model, attachment = load(tmp_path / "native")
        ours = model(ids, attention_mask=torch.ones_like(ids)).logits
        attachment.detach()
        plain = AutoModelForSequenceClassification.from_pretrained(recipe.backbone.id, num_labels=len(LABELS))
        theirs = PeftModel.from_pretrained(plain, tmp_path / "peft").eval()
        found_logits = theirs(ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(found_logits, ours, atol=1e-5, rtol=1e-4)
