"""Forgetting: against losses by hand on plain transformers models, in packs, at rungs, and of untouched models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.backbones import load_backbone
from autopeft.evaluators.base import Request
from autopeft.evaluators.data.retained import RetainedConfig, with_retained
from autopeft.evaluators.data.splits import Splits, load_splits
from autopeft.evaluators.errors import ModelError
from autopeft.evaluators.rows import DataConfig
from autopeft.evaluators.training.activations import ActivationCache
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.evaluators.training.train import TrainEvaluator
from autopeft.search_space.adapters import AdapterSpec, Full, Lora, Mixture
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.metrics import ALWAYS, FORGETTING, MetricError
from autopeft.search_space.problem import Fidelity
from autopeft.studies.exporters import EXPORTERS

from ..support.exported import WORDS, make_recipe, save_model

LAYERS = 4
SHAPE = {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 24}
TRAINING = {"learning_rate": 3e-2, "epochs": 2.0, "batch_size": 8}
METRICS = (*ALWAYS, FORGETTING)


def llama() -> LlamaForCausalLM:
    ids = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **ids, max_position_embeddings=32))


def retained_texts(count: int = 13) -> list[str]:
    rng = Random(7)
    return [" ".join(f"w{rng.randrange(40)}" for _ in range(rng.randrange(3, 11))) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forgetting")
    save_model("llama", folder / "model", llama)
    for split, count in (("train", 40), ("validation", 9), ("test", 7)):
        rows = [{"prompt": f"w{i % 9} w{len(split)}", "completion": " w3 w4" if i % 3 else " w5"} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [json.dumps({"text": text}) + "\n" for text in retained_texts()]
    (folder / "general.jsonl").write_text("".join(texts))
    return folder


@pytest.fixture(scope="module")
def splits(folder: Path) -> Splits:
    files = {split: f"{split}.jsonl" for split in ("train", "validation", "test")}
    data = DataConfig(source="files", folder=folder, **files)
    retained = RetainedConfig(source="files", file="general.jsonl")
    return with_retained(load_splits(data, "causal-lm"), retained, data, "causal-lm")


@pytest.fixture(scope="module")
def alone(folder: Path, splits: Splits) -> TrainEvaluator:
    return TrainEvaluator(load_backbone(str(folder / "model"), task="causal-lm"), "causal-lm", splits, 16, METRICS)


def packed(folder: Path, splits: Splits, **settings: Any) -> PackedEvaluator:
    loaded = load_backbone(str(folder / "model"), task="causal-lm")
    return PackedEvaluator(loaded, "causal-lm", splits, 16, METRICS, **settings)


def request(placement: dict[str, AdapterSpec], **settings: Any) -> Request:
    candidate = Candidate(
        architecture=Architecture.of({site: [spec] for site, spec in placement.items()}), training=TRAINING
    )
    return Request(candidate=candidate, **settings)


def at(spec: AdapterSpec, layers: Sequence[int], *roles: str) -> dict[str, AdapterSpec]:
    return {f"layers.{i}.{role}": spec for i in layers for role in roles}


PLACEMENTS: list[dict[str, AdapterSpec]] = [
    at(Lora(rank=2), range(LAYERS), "attn.q", "attn.v"),
    at(Lora(rank=4, alpha=16), (2, 3), "mlp.up", "mlp.down"),
    at(Lora(rank=1), (3,), "attn.o"),
]


def losses_by_hand(model: Any, folder: Path, rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """Row by row, without padding: transformers' own mean over the predicted tokens, the end of the text left out."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    found = []
    for row in rows:
        ids = tokenizer(row["text"], return_tensors="pt")["input_ids"]
        assert ids[0, -1] == tokenizer.eos_token_id
        with torch.no_grad():
            found.append(model(input_ids=ids[:, :-1], labels=ids[:, :-1]).loss.item())
    return np.array(found)


def test_it_is_the_loss_of_the_exported_adapter_minus_that_of_the_plain_model_row_by_row(
    folder: Path, splits: Splits, alone: TrainEvaluator, tmp_path: Path
) -> None:
    (outcome,) = alone.evaluate([request(PLACEMENTS[0], test=True, keep_weights=True)])
    found = outcome.measurement
    assert found is not None
    assert outcome.weights is not None
    recipe = make_recipe("llama", save_model("llama", tmp_path / "model", llama), PLACEMENTS[0])
    EXPORTERS["peft"].export(recipe, dict(outcome.weights), tmp_path / "peft", allow_lossy=True)
    plain = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft").eval()
    for rows, value, column in (
        (splits.retained, found.values["forgetting"], found.per_example["forgetting"]),
        (splits.retained_test, found.test["forgetting"], found.test_per_example["forgetting"]),
    ):
        expected = losses_by_hand(adapted, folder, rows) - losses_by_hand(plain, folder, rows)
        assert abs(expected).max() > 0.05, "something is forgotten"
        assert value == pytest.approx(expected.mean(), abs=1e-5)
        assert np.array(column) == pytest.approx(expected, abs=6e-5), "they are stored with four decimals"
    request_ = request(PLACEMENTS[0])
    with alone.attach(request_) as attachment:
        attachment.load_state(dict(outcome.weights))
        (columns,) = alone.all_columns(attachment, "validation")
    expected = losses_by_hand(adapted, folder, splits.retained) - losses_by_hand(plain, folder, splits.retained)
    assert np.array(columns["forgetting"]) == pytest.approx(expected, abs=1e-5)
    assert len(columns["forgetting"]) == 7
    assert len(columns["loss"]) == 9


def test_the_standard_error_is_over_the_retained_rows(alone: TrainEvaluator) -> None:
    (outcome,) = alone.evaluate([request(PLACEMENTS[1], test=True)])
    assert outcome.measurement is not None
    column = np.array(outcome.measurement.per_example["forgetting"])
    assert (len(column), len(outcome.measurement.test_per_example["forgetting"])) == (7, 6)
    expected = column.std(ddof=1) / len(column) ** 0.5
    assert outcome.measurement.std_err["forgetting"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("cached", [True, False])
def test_a_candidate_in_a_pack_forgets_as_alone(
    folder: Path, splits: Splits, alone: TrainEvaluator, cached: bool
) -> None:
    evaluator = packed(folder, splits, cache=ActivationCache(10**7) if cached else None)
    evaluator.mixes_depths = True
    requests = [request(placement, test=True) for placement in PLACEMENTS]
    values = []
    for ours, theirs in zip(evaluator.evaluate(requests), alone.evaluate(requests), strict=True):
        assert ours.measurement is not None
        assert theirs.measurement is not None
        assert ours.measurement.values["forgetting"] == pytest.approx(theirs.measurement.values["forgetting"], abs=1e-5)
        assert ours.measurement.test["forgetting"] == pytest.approx(theirs.measurement.test["forgetting"], abs=1e-5)
        values.append(ours.measurement.values["forgetting"])
    assert len({round(value, 3) for value in values}) == 3, "they differ"


def test_the_untouched_model_forgets_nothing(alone: TrainEvaluator, folder: Path, splits: Splits) -> None:
    for evaluator in (alone, packed(folder, splits)):
        evaluator.prepare([request({}, test=True)])
        with Attachment(evaluator.model, evaluator.backbone, [Architecture.of({})], [0]) as bare:
            (scores,) = evaluator.final_scores(bare, [True])
        assert list(map(str, scores.validation["forgetting"])) == ["0.0"] * 7
        assert list(map(str, scores.test["forgetting"])) == ["0.0"] * 6
        with evaluator.attach(request(PLACEMENTS[0])) as untrained:
            (scores,) = evaluator.final_scores(untrained, [False])
        assert max(map(abs, scores.validation["forgetting"])) < 1e-6


def test_full_fine_tuning_is_compared_with_the_model_before_it(
    folder: Path, splits: Splits, alone: TrainEvaluator
) -> None:
    plain = losses_by_hand(AutoModelForCausalLM.from_pretrained(folder / "model").eval(), folder, splits.retained)
    evaluator = packed(folder, splits)
    full = request({"backbone": Full()}, keep_weights=True)
    (first, again) = (evaluator.evaluate([full])[0] for _ in range(2))
    assert first.measurement is not None
    assert again.measurement is not None
    assert first.weights is not None
    assert first.measurement.values["forgetting"] == again.measurement.values["forgetting"]
    trained = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    state = {name.removeprefix("backbone/full/"): tensor for name, tensor in first.weights.items()}
    trained.load_state_dict(state, strict=False)
    trained.tie_weights()
    expected = losses_by_hand(trained, folder, splits.retained) - plain
    assert first.measurement.values["forgetting"] == pytest.approx(expected.mean(), abs=1e-5)


def test_at_rungs_only_candidates_that_may_stop_there_have_it(folder: Path, splits: Splits) -> None:
    evaluator = packed(folder, splits)
    requests = [request(placement, fidelity=Fidelity(rungs=(0.5,))) for placement in PLACEMENTS[:2]]
    for outcome in evaluator.evaluate(requests):
        assert outcome.measurement is not None
        ((_, values),) = outcome.measurement.rungs
        assert values.keys() == {"loss", "accuracy"}
    stopped, ended = evaluator.evaluate(requests, select=lambda share, found: [1])
    assert stopped.measurement is not None
    assert ended.measurement is not None
    assert stopped.measurement.share == 0.5
    assert stopped.measurement.values.keys() == {"loss", "accuracy", "forgetting"}
    assert stopped.measurement.per_example == {}
    assert len(ended.measurement.per_example["forgetting"]) == 7


def test_routes_and_averages_of_mixtures_stay_those_of_the_tasks_rows(folder: Path, splits: Splits) -> None:
    mixture = request(at(Mixture(expert=Lora(rank=2), experts=2, router="token", top_k=1), (3,), "mlp.up"), test=True)
    plain = PackedEvaluator(load_backbone(str(folder / "model"), task="causal-lm"), "causal-lm", splits, 16)
    (with_it,), (without,) = packed(folder, splits).evaluate([mixture]), plain.evaluate([mixture])
    assert with_it.measurement is not None
    assert without.measurement is not None
    assert with_it.measurement.routes == without.measurement.routes
    assert with_it.measurement.averaged["loss"] == pytest.approx(without.measurement.averaged["loss"], abs=1e-6)
    assert with_it.measurement.averaged["loss"] != with_it.measurement.values["loss"]


def test_a_loss_of_retained_rows_that_is_not_finite_ends_the_candidate_alone(
    folder: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = packed(folder, splits)
    assert evaluator.forgetting is not None
    evaluator.prepare([])
    evaluator.forgetting._untouched["retained"][0] = float("-inf")
    (outcome,) = evaluator.evaluate([request(PLACEMENTS[0])])
    assert (outcome.failure, outcome.reason) == ("failed", "the loss on the retained rows is not finite")


def test_a_lack_of_memory_makes_the_batches_of_the_untouched_model_smaller(
    alone: TrainEvaluator, folder: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = packed(folder, splits)
    task, sizes = evaluator.task, []
    scores = task.scores

    def greedy(model: Any, batch: Any) -> Any:
        sizes.append(len(batch["targets"]))
        if sizes[-1] > 3:
            raise MemoryError("too many rows")
        return scores(model, batch)

    monkeypatch.setattr(task, "scores", greedy)
    evaluator.prepare([])
    monkeypatch.undo()
    alone.prepare([])
    assert max(sizes) == 7
    assert evaluator.forgetting is not None
    assert alone.forgetting is not None
    ours, theirs = (one.forgetting._untouched["retained"] for one in (evaluator, alone) if one.forgetting)
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_it_needs_retained_rows_and_a_head_that_means_something(folder: Path, splits: Splits, tmp_path: Path) -> None:
    from dataclasses import replace

    loaded = load_backbone(str(folder / "model"), task="causal-lm")
    with pytest.raises(MetricError, match="there are no retained rows"):
        TrainEvaluator(loaded, "causal-lm", replace(splits, retained=[], retained_test=[]), 16, METRICS)
    model = save_model("bert", tmp_path / "bert")
    rows = [{"text": f"w{i} w{i + 1}", "label": str(i % 3)} for i in range(12)]
    labelled = Splits(rows, rows, rows, ("0", "1", "2"), retained=rows[:3], retained_test=rows[3:6])
    arguments = (labelled, 16, METRICS)
    pretrained = load_backbone(str(model), task="classification", labels=("0", "1", "2"))
    assert pretrained.pretrained_head
    evaluator = TrainEvaluator(pretrained, "classification", *arguments)
    (outcome,) = evaluator.evaluate([request(at(Lora(rank=1), (0,), "attn.q"))])
    assert outcome.measurement is not None
    assert outcome.measurement.values["forgetting"] != 0
    with pytest.raises(ModelError, match="task head would be new"):
        TrainEvaluator(replace(pretrained, pretrained_head=False), "classification", *arguments)
