"""Tasks: what each says of itself is what it does, and the forms of classification are transformers' own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from typing_extensions import override

from autopeft.evaluators.backbones import LoadedBackbone, load_backbone, load_processor
from autopeft.evaluators.base import Request
from autopeft.evaluators.data.splits import Splits, load_splits
from autopeft.evaluators.errors import DataError
from autopeft.evaluators.rows import DataConfig, Row, text_of
from autopeft.evaluators.tasks import TASKS, Example, Scored, Task, model_inputs
from autopeft.evaluators.tasks.classification import Classification, MultiLabel
from autopeft.evaluators.tasks.text import TextTask
from autopeft.evaluators.training.activations import token_digest
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.evaluators.training.train import TrainEvaluator
from autopeft.search_space.adapters import Lora
from autopeft.search_space.architecture import Candidate
from autopeft.search_space.metrics import QUALITIES, MetricError
from autopeft.search_space.spaces.presets import everywhere
from autopeft.studies.config.loading import load_study
from autopeft.testing import check_task
from autopeft.testing.models import tiny

from ...studies.engine.test_study import run
from ...support.tiny_models import save, seeded
from ...support.tiny_study import FORMS, LABELS, PAIR, SEVERAL, save_model, save_study, write_rows

torch.set_num_threads(1)

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SINGLE: list[Row] = [{"text": "w1 hot w2", "label": "hot"}, {"text": "w3 w4 cold w5", "label": "cold"}]
PAIRS: list[Row] = [
    {"premise": "w1 hot w2", "hypothesis": "cold w3", "relation": "hot"},
    {"premise": "w4", "hypothesis": "w5", "relation": "warm"},
]
TAGGED: list[Row] = [{"text": "w1 hot cold", "tags": ["hot", "cold"]}, {"text": "w2", "tags": []}]
CAUSAL: list[Row] = [{"prompt": "w1 hot", "completion": " w2"}, {"prompt": "w3", "completion": " w4 w5 w6"}]
#: The class, its data settings, and rows of a file. Each task and each of its variants has an entry.
CONFORMANCE: dict[str, tuple[type[Task], dict[str, str], list[Row]]] = {
    "one label": (Classification, {}, SINGLE),
    "pair": (Classification, PAIR, PAIRS),
    "several labels": (MultiLabel, SEVERAL, TAGGED),
    "pair with several labels": (
        MultiLabel,
        {"text_pair": "other", **SEVERAL},
        [{**row, "other": "w4"} for row in TAGGED],
    ),
    "causal": (TASKS["causal-lm"], {}, CAUSAL),
}


def test_every_task_has_a_row() -> None:
    assert {task.name for task, _, _ in CONFORMANCE.values()} == set(TASKS)


@pytest.mark.parametrize("case", CONFORMANCE)
def test_a_task_does_what_it_says(case: str, tmp_path: Path) -> None:
    kind, columns, raw = CONFORMANCE[case]
    data = DataConfig(**columns)
    assert TASKS[kind.name].for_data(data) is kind
    assert kind.has_labels == (kind.problem_type is not None)
    task = kind(load_processor(str(save_model(tmp_path)), kind.name), 16, LABELS if kind.has_labels else None)
    check_task(task, [kind.row(row, data) for row in raw], tiny("bert" if kind.has_labels else "llama-causal")[0])


# Pairs


def pair_task(processor: Any, max_length: int) -> Task:
    return Classification(processor, max_length, ("other", "same"))


@pytest.mark.parametrize("max_length", [8, 64])
def test_pairs_are_tokenised_as_the_tokenizer_does(max_length: int) -> None:
    tokenizer = load_processor("embedded", "classification")
    texts = [("a short text", "and a much longer second text that is cut"), ("one two three four five six", "x")]
    rows: list[Row] = [{"text": one, "text_pair": other, "label": "same"} for one, other in texts]
    task = pair_task(tokenizer, max_length)
    batch = model_inputs(task.collate(task.encode(rows)))
    expected = tokenizer(
        [one for one, _ in texts], [other for _, other in texts], truncation="longest_first", max_length=max_length,
        padding=True, return_tensors="pt",
    )  # fmt: skip
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}
    for name, tensor in batch.items():
        assert torch.equal(tensor, expected[name]), name
    # A single text is what it was before there were pairs.
    (single,) = task.encode([{"text": "a short text", "label": "same"}])
    assert set(single) == {"input_ids", "label"}


def test_the_segments_reach_the_model_and_the_cache(tmp_path: Path) -> None:
    loaded = load_backbone(str(save_model(tmp_path)), task="classification", labels=("other", "same"))
    task = pair_task(loaded.processor, 16)
    examples = task.encode([{"text": "w1 w2", "text_pair": "w3", "label": "same"}])
    batch = task.collate(examples)
    with torch.no_grad():
        found = loaded.model(**model_inputs(batch)).logits
        alike = loaded.model(**model_inputs({k: v for k, v in batch.items() if k != "token_type_ids"})).logits
    assert not torch.equal(found, alike)
    bare = [{name: value for name, value in example.items() if name != "token_type_ids"} for example in examples]
    assert token_digest(bare) != token_digest(examples)


def test_a_model_that_does_not_know_the_segments(tmp_path: Path) -> None:
    save_model(tmp_path / "bert")
    tokenizer = load_processor(str(tmp_path / "bert"), "classification")
    shape = {**SHAPE, "vocab_size": 40}
    models = {
        "roberta": RobertaForSequenceClassification(RobertaConfig(**shape, type_vocab_size=1, pad_token_id=0)),
        "llama": LlamaForSequenceClassification(LlamaConfig(**shape, pad_token_id=0)),
    }
    row = {"text": "w1 w2", "text_pair": "w3", "label": "same"}
    for name, model in models.items():
        loaded = load_backbone(save(model, tmp_path / name, tokenizer), task="classification", labels=("other", "same"))
        splits = Splits([row], [row], [row], ("other", "same"))
        with pytest.raises(
            DataError, match="marks a second text by token_type_ids 1, which the model does not support"
        ):
            TrainEvaluator(loaded, "classification", splits, 16)
        loaded.processor.model_input_names = ["input_ids", "attention_mask"]
        TrainEvaluator(loaded, "classification", splits, 16)


# Several labels


def several_task(processor: Any = None) -> MultiLabel:
    return MultiLabel(processor, 16, LABELS)


def test_the_loss_is_torchs_and_transformers_own(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 3, generator=generator).requires_grad_()
    targets = torch.randint(0, 2, (7, 3), generator=generator).float()
    found = several_task().score(logits, targets)
    expected = nn.BCEWithLogitsLoss(reduction="none")(logits, targets).mean(1)
    torch.testing.assert_close(found["loss"], expected, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(found["loss"].mean(), logits, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(nn.BCEWithLogitsLoss()(logits, targets), logits)[0])
    assert found["accuracy"].mean().item() == pytest.approx(accuracy_score(targets, (logits > 0).int()))
    assert several_task().score(logits.bfloat16(), targets)["loss"].dtype == torch.float32

    settings = MultiLabel.model_settings(LABELS)
    assert settings["problem_type"] == "multi_label_classification"
    config = BertConfig(**SHAPE, vocab_size=40, problem_type=settings["problem_type"], id2label=settings["id2label"])
    model = seeded(BertForSequenceClassification, config)
    ids = torch.randint(4, 40, (7, 5), generator=generator)
    with torch.no_grad():
        theirs = model(input_ids=ids, labels=targets)
    ours = several_task().score(theirs.logits, targets)["loss"].mean()
    torch.testing.assert_close(ours, theirs.loss)


def test_targets_are_one_per_label(tmp_path: Path) -> None:
    task = several_task(load_processor(str(save_model(tmp_path)), "classification"))
    rows: list[Row] = [{"text": "w1", "labels": labels} for labels in (["warm", "cold"], [], ["hot"])]
    assert task.collate(task.encode(rows))["targets"].tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert MultiLabel.truth(rows, LABELS).tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


# Evaluators


@pytest.fixture(scope="module", params=FORMS)
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedBackbone, Splits]:
    columns, save_rows = FORMS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    save_rows(folder)
    files = {split: f"{split}.jsonl" for split in ("train", "validation", "test")}
    splits = load_splits(DataConfig(source="files", folder=folder, **files, **columns), "classification")
    loaded = load_backbone(str(save_model(folder / "model")), task="classification", labels=splits.labels)
    return replace(loaded, pretrained_head=False), splits


def requests(loaded: LoadedBackbone) -> list[Request]:
    ranks = enumerate((1, 2, 4))
    return [
        Request(
            candidate=Candidate(
                architecture=everywhere(loaded.backbone, Lora(rank=rank, dropout=0.1), ("attn.q", "mlp.up")),
                training={"learning_rate": 1e-2 / (1 + k), "batch_size": 8, "epochs": 3.0},
            ),
            seed=k,
            test=True,
        )
        for k, rank in ranks
    ]


def test_a_candidate_in_a_pack_is_the_candidate_alone(prepared: tuple[LoadedBackbone, Splits]) -> None:
    loaded, splits = prepared
    metrics = (QUALITIES["loss"], QUALITIES["accuracy"], QUALITIES["macro-f1"])
    alone = TrainEvaluator(loaded, "classification", splits, 16, metrics).evaluate(requests(loaded))
    packed = PackedEvaluator(loaded, "classification", splits, 16, metrics, pack=3).evaluate(requests(loaded))
    for one, other in zip(alone, packed, strict=True):
        assert one.measurement is not None, one.reason
        assert other.measurement is not None, other.reason
        assert one.measurement.losses == pytest.approx(other.measurement.losses, abs=2e-5)
        for found, expected in (
            (one.measurement.values, other.measurement.values),
            (one.measurement.test, other.measurement.test),
        ):
            assert found == pytest.approx(expected, abs=1e-5)
        n = len(splits.validation)
        assert {len(column) for column in one.measurement.per_example.values()} == {n}


def test_metrics_without_their_columns_are_refused(prepared: tuple[LoadedBackbone, Splits]) -> None:
    loaded, splits = prepared
    metrics = [QUALITIES["loss"], QUALITIES["matthews"]]
    if "labels" not in splits.train[0]:
        TrainEvaluator(loaded, "classification", splits, 16, metrics)
        return
    with pytest.raises(
        MetricError, match="matthews cannot be computed: the task classification only has the columns accuracy"
    ):
        TrainEvaluator(loaded, "classification", splits, 16, metrics)


# A task of somebody else


class Regression(TextTask):
    """A number per text, by the squared error."""

    name = "regression"
    auto_class = "AutoModelForSequenceClassification"
    peft_task_type = "SEQ_CLS"

    @override
    @classmethod
    def problems(cls, data: DataConfig, model_id: str) -> Iterator[tuple[tuple[str, ...], str]]:
        if data.source != "files":
            yield ("data", "source"), "name files with numbers"

    @override
    @classmethod
    def row(cls, row: Row, data: DataConfig) -> Row:
        if not isinstance(row.get(data.label), (int, float)):
            raise ValueError(f"field {data.label!r} is not a number")
        return {"text": text_of(row, data.text), "number": float(row[data.label])}

    @override
    @classmethod
    def input_of(cls, row: Row) -> Any:
        return row["text"]

    @override
    @classmethod
    def model_settings(cls, labels: Sequence[str] | None) -> dict[str, Any]:
        return {"num_labels": 1}

    @override
    def encode(self, rows: Sequence[Row]) -> list[Example]:
        encoded = self.tokenizer([row["text"] for row in rows], truncation=True, max_length=self.max_length)
        return [
            {"input_ids": ids, "number": row["number"]} for ids, row in zip(encoded["input_ids"], rows, strict=True)
        ]

    @override
    def targets(self, examples: Sequence[Example], width: int) -> Tensor:
        return torch.tensor([example["number"] for example in examples])

    @override
    def score(self, logits: Tensor, targets: Tensor) -> Scored:
        errors = logits.float()[:, 0] - targets
        return {"loss": errors**2, "accuracy": (errors.detach().abs() < 0.5).float()}


def test_a_task_takes_one_class_and_a_registration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the study file to the recipe, without a line elsewhere."""
    monkeypatch.setitem(TASKS, "regression", Regression)
    path = save_study(tmp_path / "study", task="regression", objectives=["loss", "num_params"])
    for split in ("train", "validation", "test"):
        rows = [{"text": f"w{i} w{i + 1} {split[0]}", "label": i / 10} for i in range(20)]
        write_rows(path.parent / f"{split}.jsonl", rows)
    study = load_study(path)
    assert study.task_class is Regression
    snapshot = run(study)
    assert {trial.state for trial in snapshot.trials} <= {"complete", "pruned", "infeasible"}
    assert any(row.on_front for row in snapshot.rows())
