"""Digests of contents: the same for the same contents in any form, and another one for each change."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, BertForSequenceClassification

from autopeft.evaluators import contents
from autopeft.evaluators.backbones import LoadedBackbone, load_backbone, raw_config
from autopeft.evaluators.data.encoding import encode_splits
from autopeft.evaluators.data.splits import DataConfig, Splits, load_splits
from autopeft.evaluators.tasks import TASKS

from ..support.tiny_study import LABELS, ROWS, save_data, save_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "model")
    save_data(tmp_path)
    return tmp_path


def splits(folder: Path, suffix: str = "jsonl") -> Splits:
    names = {split: f"{split}.{suffix}" for split in ROWS}
    return load_splits(DataConfig(source="files", folder=folder, **names), "classification")


def loaded(folder: Path, **options: object) -> LoadedBackbone:
    return load_backbone(str(folder / "model"), task="classification", labels=LABELS, **options)  # type: ignore[arg-type]


def test_rows_are_the_same_in_every_format(folder: Path) -> None:
    found = contents.of_rows(splits(folder))
    assert {split: facts["rows"] for split, facts in found.items()} == ROWS
    for split in ROWS:
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        (folder / f"{split}.json").write_text(json.dumps([{**row, "unread": 1} for row in rows], indent=1))
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["label", "text"])
            writer.writeheader()
            writer.writerows(rows)
    assert contents.of_rows(splits(folder, "json")) == contents.of_rows(splits(folder, "csv")) == found


def test_every_change_of_the_rows_is_seen(folder: Path) -> None:
    whole = splits(folder)
    rows = whole.validation
    before = contents.of_rows(whole)
    other_label = {**rows[0], "label": rows[1]["label"]}
    for changed in ([*rows[1:], rows[0]], rows[1:], [other_label, *rows[1:]], [{**rows[0], "text": "hot"}, *rows[1:]]):
        now = contents.of_rows(replace(whole, validation=changed))
        assert now["validation"] != before["validation"]
        assert now["train"] == before["train"]


def test_weights_are_the_same_in_every_format(folder: Path) -> None:
    found = loaded(folder).weights()
    state = load_file(folder / "model" / "model.safetensors")
    (folder / "model" / "model.safetensors").unlink()
    torch.save(state, folder / "model" / "pytorch_model.bin")
    assert loaded(folder).weights() == found


def test_every_change_of_the_weights_is_seen(folder: Path) -> None:
    found = {loaded(folder).weights()}
    path = folder / "model" / "model.safetensors"
    before = load_file(path)
    for name in before:
        state = {key: tensor.clone() for key, tensor in before.items()}
        state[name].view(-1)[-1] += 1e-3
        save_file(state, path, metadata={"format": "pt"})
        found.add(loaded(folder).weights())
    with_pooler = [name for name in before if "position_ids" not in name]
    assert len(found) == 1 + len(with_pooler)


def test_a_head_counts_where_the_checkpoint_has_it(folder: Path) -> None:
    model = folder / "model"
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    whole = BertForSequenceClassification.from_pretrained(model, **labels)
    found = set()
    for _ in range(2):
        torch.nn.init.normal_(whole.classifier.weight)
        whole.save_pretrained(model)
        assert loaded(folder).pretrained_head
        found.add(loaded(folder).weights())
    assert len(found) == 2
    drawn = loaded(folder)
    before, drawn = drawn.weights(), replace(drawn, pretrained_head=False)
    torch.nn.init.normal_(drawn.model.classifier.weight)
    one = drawn.weights()
    torch.nn.init.normal_(drawn.model.classifier.weight)
    assert drawn.weights() == one != before


def test_tied_weights_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BertForMaskedLM.from_pretrained(folder / "model")
    embeddings, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert embeddings.data_ptr() == outputs.data_ptr()
    read = []
    monkeypatch.setattr(contents, "update", lambda hashed, tensors: read.extend(tensor for _, tensor in tensors))
    contents.of_weights(model)
    assert sum(tensor.data_ptr() == embeddings.data_ptr() for tensor in read) == 1
    assert len(read) > 40


def test_the_configuration_is_that_of_the_file(folder: Path) -> None:
    path = folder / "model" / "config.json"
    found = raw_config(str(folder / "model"))
    assert found["num_hidden_layers"] == 3
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "transformers_version": "4.0", "torch_dtype": "float16"}))
    assert raw_config(str(folder / "model")) == found
    path.write_text(json.dumps({**config, "hidden_act": "relu"}))
    assert raw_config(str(folder / "model")) != found


def test_another_tokenizer_encodes_otherwise(folder: Path) -> None:
    def encoding() -> str:
        whole, backbone = splits(folder), loaded(folder)
        task = TASKS["classification"](backbone.processor, 16, whole.labels)
        return contents.of_examples(task, encode_splits(task, whole, backbone.model).examples)

    before = encoding()
    assert encoding() == before
    path = folder / "model" / "tokenizer.json"
    text = path.read_text()
    assert '"w1": 8' in text
    path.write_text(text.replace('"w1": 8', '"w1": 9').replace('"w2": 9', '"w2": 8'))
    assert encoding() != before


def test_a_folder_is_its_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("same")
    one, two = contents.of_folders([tmp_path / "one", tmp_path / "two"], ["a"])
    assert one == two
    (tmp_path / "two" / "a").write_text("other")
    assert contents.of_folders([tmp_path / "two"], ["a"]) != [one]
