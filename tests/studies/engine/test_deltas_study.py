"""A study over whole layers and sparse deltas beside LoRA: from the file to a recipe, its retraining and its export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from autopeft.search_space.problem import Trial
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.config.loading import load_study
from autopeft.studies.engine.retraining import retrain
from autopeft.studies.engine.session import open_ledger
from autopeft.studies.exporters import EXPORTERS
from autopeft.studies.exporters.native import load
from autopeft.studies.recipes.build import recipe_of

from ...support.tiny_study import save_study
from .test_kills import goes_on, recorded

torch.set_num_threads(1)

STUDY: dict[str, Any] = {
    "space": {
        "adapters": {
            "low_rank": {"kind": "lora", "at": ["attn.v"], "rank": [1, 2]},
            "sparse": {"kind": "shira", "at": ["attn.v"], "rank": 1, "places": ["magnitude", "snip", "movement"]},
            "upper": {"kind": "dense", "layers": [2], "at": ["mlp.up", "mlp.down"], "rate": 0.1},
            "pruned": {"kind": "sparseadapter", "size": [4, 8], "kept": ["magnitude", "snip"], "placement": "model"},
            "moving": {"kind": "spiel", "at": ["mlp.up"], "rank": [1, 2], "every": 5, "window": 2},
        },
        "one_of": {"inner": {"members": ["upper", "moving"]}},
    },
    "search": {"searcher": "random", "trials": 8, "batch": 4},
    "finalists": {"seeds": 2, "most": 1},
    "baselines": {"names": ["head"], "learning_rates": [0.1]},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Snapshot, list[str]]:
    path = save_study(tmp_path_factory.mktemp("deltas"), **STUDY)
    return path, *recorded(load_study(path))


def kinds_of(trial: Trial) -> set[str]:
    return set(trial.candidate.architecture.kinds)


def test_low_rank_and_sparse_deltas_sit_at_one_site(finished: tuple[Path, Snapshot, list[str]]) -> None:
    """DSEE's update, in packs with whole layers and moving places."""
    _, snapshot, _ = finished
    trials = list(snapshot.search_trials)
    assert len(trials) == 8
    assert all(trial.state == "complete" for trial in trials), [trial.error for trial in trials]
    at_sites = [dict(trial.candidate.architecture.adapters)["layers.1.attn.v"] for trial in trials]
    assert {tuple(spec.kind for spec in specs) for specs in at_sites} == {("lora", "shira")}
    assert set.union(*map(kinds_of, trials)) == {"lora", "shira", "dense", "spiel", "sparseadapter"}


def test_a_kill_changes_nothing(finished: tuple[Path, Snapshot, list[str]], tmp_path: Path) -> None:
    _, snapshot, made = finished
    goes_on(snapshot, made, len(made) // 2, tmp_path, STUDY)


@pytest.mark.parametrize("kind", ["dense", "spiel"])
def test_a_recipe_trains_and_merges(finished: tuple[Path, Snapshot, list[str]], tmp_path: Path, kind: str) -> None:
    path, snapshot, _ = finished
    found = next(t for t in snapshot.search_trials if kind in kinds_of(t) and "sparseadapter" not in kinds_of(t))
    settings = load_study(path)
    recipe = recipe_of(settings, open_ledger(settings), snapshot, found.number)
    outcome = retrain(recipe, [found.seed])[0].outcome
    assert outcome.measurement is not None
    assert found.measurement is not None
    # The pack of the study has other roundings.
    assert outcome.measurement.losses == pytest.approx(found.measurement.losses, rel=1e-3)
    for target in ("native", "merged"):
        assert EXPORTERS[target].export(recipe, outcome.weights, tmp_path / target).level == "exact"
    ids = torch.tensor([[2, 5, 9, 3]])
    with torch.no_grad():
        model, attachment = load(tmp_path / "native")
        ours = model(ids, attention_mask=torch.ones_like(ids)).logits
        attachment.detach()
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
        theirs = merged(ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)
