"""Modules that the checkpoint lacks, such as BERT's pooler, are trained with the head: each candidate has its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from autopeft.evaluators.backbones import LoadedBackbone, load_backbone
from autopeft.evaluators.base import Request
from autopeft.evaluators.data.splits import Splits
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.evaluators.training.train import TrainEvaluator
from autopeft.search_space.adapters import Full, Lora
from autopeft.search_space.architecture import Architecture, Candidate

from ...support.tiny_models import save, seeded
from ..training.test_train import LABELS, rows

SPLITS = Splits(rows("train", 64), rows("validation", 20), rows("test", 20), LABELS)
WIDTH = 24
SHAPE = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
POOLER = "bert.pooler.dense"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(seeded(BertForMaskedLM, BertConfig(**SHAPE, vocab_size=40)), tmp_path_factory.mktemp("bert"))


@pytest.fixture
def loaded(folder: str) -> LoadedBackbone:
    return load_backbone(folder, task="classification", labels=LABELS)


def test_a_missing_pooler_belongs_to_the_head(loaded: LoadedBackbone) -> None:
    backbone = loaded.backbone
    assert backbone.head_modules == (POOLER, "classifier")
    assert backbone.num_head_params == WIDTH * WIDTH + WIDTH + 3 * WIDTH + 3
    every = sum(parameter.numel() for parameter in loaded.model.parameters())
    assert backbone.num_params + backbone.num_head_params == every
    assert backbone.site("backbone").num_params == backbone.num_params
    assert loaded.new_modules == ()
    assert not loaded.pretrained_head


def test_a_description_without_it_keeps_it_frozen(folder: str, loaded: LoadedBackbone, tmp_path: Path) -> None:
    complete = loaded.model
    complete.save_pretrained(tmp_path / "complete")
    loaded.processor.save_pretrained(tmp_path / "complete")
    whole = load_backbone(str(tmp_path / "complete"), task="classification", labels=LABELS)
    assert whole.backbone.head_modules == ("classifier",)
    old = load_backbone(folder, task="classification", labels=LABELS, backbone=whole.backbone)
    assert old.new_modules == (POOLER,)


def test_every_candidate_of_a_pack_trains_its_own(loaded: LoadedBackbone) -> None:
    training = {"learning_rate": 1e-2, "batch_size": 8, "epochs": 2}
    architectures = [Architecture.of({f"layers.{i}.attn.q": [Lora(rank=2)]}) for i in (0, 1)] + [Architecture()]
    requests = [
        Request(candidate=Candidate(architecture=one, training=training), seed=seed, keep_weights=True)
        for seed, one in enumerate(architectures)
    ]
    before = loaded.model.get_submodule(POOLER).weight.clone()
    alone = TrainEvaluator(loaded, "classification", SPLITS, max_length=16).evaluate(requests)
    together = PackedEvaluator(loaded, "classification", SPLITS, max_length=16, pack=3).evaluate(requests)
    found = []
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.weights
        assert theirs.weights
        for name, value in theirs.weights.items():
            torch.testing.assert_close(ours.weights[name], value, rtol=1e-3, atol=1e-5)
        found.append(ours.weights[f"head.{POOLER}/head/W"])
    for i, one in enumerate(found):
        assert not torch.allclose(one, before, atol=1e-3)
        assert not any(torch.allclose(one, other, atol=1e-3) for other in found[:i])
    assert torch.equal(loaded.model.get_submodule(POOLER).weight, before), "the model's own stays"


def test_full_fine_tuning_trains_it_with_the_head(loaded: LoadedBackbone) -> None:
    candidate = Candidate(
        architecture=Architecture.of({"backbone": [Full()]}),
        training={"learning_rate": 1e-3, "batch_size": 8, "epochs": 1},
    )
    evaluator = TrainEvaluator(loaded, "classification", SPLITS, max_length=16)
    (outcome,) = evaluator.evaluate([Request(candidate=candidate, keep_weights=True)])
    assert outcome.weights
    assert f"head.{POOLER}/head/W" in outcome.weights
    assert not any(POOLER in name for name in outcome.weights if name.startswith("backbone/full/"))
