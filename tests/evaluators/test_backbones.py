"""Loading backbones: where they come from, what is wrong with them, and whose head they have."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from autopeft.evaluators.backbones import (
    describe_backbone,
    load_backbone,
    load_processor,
    resolve,
    skeleton,
)
from autopeft.evaluators.errors import ModelError
from autopeft.search_space.backbones.introspection import describe

from ..support.tiny_models import byte_tokenizer, save, seeded

torch.set_num_threads(1)

VOCABULARY = 40
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 40,
}  # fmt: skip
NAMES = {0: "a", 1: "b", 2: "c"}
_LABELS: dict[str, Any] = {"id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}}
GPT2 = {"vocab_size": 300, "n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 32}


def bert(folder: Path, make: Any = BertForSequenceClassification, **settings: Any) -> str:
    return save(seeded(make, BertConfig(**{**_SHAPE, **_LABELS, **settings})), folder)


def load(folder: str, labels: Any = ("a", "b", "c"), **settings: Any) -> Any:
    return load_backbone(folder, task="classification", labels=labels, **settings)


def refused(folder: Any, *words: str, task: str = "classification", describing: bool = True) -> None:
    """Refused when it is loaded and, unless only the weights tell, when it is described; in one line."""
    calls = [lambda: load_backbone(str(folder), task=task)]
    if describing:
        calls.append(lambda: describe_backbone(str(folder), task=task))
    for call in calls:
        with pytest.raises(ModelError) as error:
            call()
        message = str(error.value)
        assert "\n" not in message
        assert str(folder) in message
        assert all(word in message for word in words), message


# Where from


def test_embedded(capfd):
    loaded = load("embedded", ("x", "y"))
    assert capfd.readouterr().err == "", "no progress bars"
    assert loaded.backbone.id == "embedded"
    assert loaded.backbone.num_layers == 6
    assert not loaded.model.training
    assert not loaded.pretrained_head
    assert loaded.model.config.id2label == {0: "x", 1: "y"}
    assert loaded.model.num_labels == 2
    assert loaded.processor("words")["input_ids"][0] == loaded.processor.cls_token_id
    # The weights are the checkpoint's, but for the head.
    original = BertModel.from_pretrained(resolve("embedded"))
    torch.testing.assert_close(loaded.model.bert.state_dict(), original.state_dict(), rtol=0, atol=0)


def test_local_folder(tmp_path, monkeypatch):
    folder = bert(tmp_path / "model")
    loaded = load(folder)
    assert loaded.backbone.id == folder
    assert loaded.backbone.family == "bert"
    monkeypatch.chdir(tmp_path)
    assert load("./model").backbone.id == "./model"
    assert load("model").pretrained_head  # a folder goes before an id of the hub
    assert load(folder, labels=("a", "b", "c")).model.num_labels == 3
    assert load(folder, dtype="bfloat16").model.dtype == torch.bfloat16


def test_missing_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "this folder has no config.json")
    for name in (f"{tmp_path}/none", "./none", "~/no/such/folder", "a/b/c", "~nobody/x"):
        refused(name, "no such folder")


def test_hub_without_network():
    begin = time.perf_counter()
    refused("no-such-organisation/no-such-model", "couldn't connect")
    with pytest.raises(ModelError, match="no-such-organisation/no-such-model: the tokenizer could not be loaded"):
        load_processor("no-such-organisation/no-such-model", "classification")
    assert time.perf_counter() - begin < 5
    refused("not an id", "could not be loaded")


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ('{"model_type": "no-such-type"}', "no-such-type"),
        ("{}", "model_type"),
        ("{", "not a valid JSON"),
        ('{"model_type": "new", "auto_map": {"AutoConfig": "code.C"}}', "custom code"),
        ('{"model_type": "vit"}', "takes no models of the type 'vit'"),
    ],
)
def test_configurations_that_cannot_be_used(tmp_path, config, word, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("asks on the terminal"))
    (tmp_path / "config.json").write_text(config)
    refused(tmp_path, word)


def test_unknown_task(tmp_path):
    with pytest.raises(ModelError, match="unknown task 'regression'; known: causal-lm, classification"):
        load_backbone("embedded", task="regression")


def test_damaged_weights(tmp_path):
    weights = Path(bert(tmp_path)) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(tmp_path, "the model could not be loaded", describing=False)
    weights.unlink()
    refused(tmp_path, "model.safetensors", describing=False)


def test_no_tokenizer(tmp_path):
    bert(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    refused(tmp_path, "the model has no tokenizer files", describing=False)


@pytest.mark.parametrize("method", ["gptq", "unknown"])
def test_quantised_checkpoints(tmp_path, method):
    bert(tmp_path)
    path = tmp_path / "config.json"
    quantised = {"quantization_config": {"quant_method": method, "load_in_4bit": True, "bits": 4}}
    path.write_text(json.dumps(json.loads(path.read_text()) | quantised))
    refused(tmp_path, f"quantised by {method}")


# Weights


def test_pretrained_head_is_kept(tmp_path):
    folder = bert(tmp_path)
    loaded = load(folder)
    assert loaded.pretrained_head
    theirs = BertForSequenceClassification.from_pretrained(folder)
    torch.testing.assert_close(loaded.model.state_dict(), theirs.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("names", "labels", "pretrained"),
    [
        (NAMES, ("a", "b", "c"), True),
        (NAMES, ("c", "b", "a"), False),  # the outputs mean other labels
        (NAMES, ("x", "y", "z"), False),
        (NAMES, ("a", "b"), False),
        (NAMES, ("0", "1", "2"), True),  # numbers are positions
        ({i: f"LABEL_{i}" for i in range(3)}, ("x", "y", "z"), True),  # nameless
    ],
)
def test_a_head_for_other_labels_is_new(tmp_path, names, labels, pretrained):
    loaded = load(bert(tmp_path, id2label=names, label2id={name: i for i, name in names.items()}), labels)
    assert loaded.pretrained_head == pretrained
    assert list(loaded.model.config.id2label.values()) == list(labels)
    assert loaded.model.classifier.out_features == len(labels)


def test_a_new_head_is_the_same_everywhere(tmp_path):
    folder = bert(tmp_path, BertForMaskedLM)
    torch.manual_seed(1)
    first, number = load(folder), torch.rand(1)
    assert not first.pretrained_head
    torch.manual_seed(2)
    second = load(folder)
    torch.testing.assert_close(first.model.state_dict(), second.model.state_dict(), rtol=0, atol=0)
    torch.manual_seed(1)
    assert torch.equal(number, torch.rand(1)), "loading leaves the random numbers of the process alone"


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    """transformers would fill what is missing with random numbers, and only report it."""
    folder = Path(bert(tmp_path / "small"))
    config = json.loads((folder / "config.json").read_text())
    for name, change in {"deep": {"num_hidden_layers": 3}, "wide": {"intermediate_size": 44}}.items():
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(config | change))
        refused(tmp_path / name, "the checkpoint lacks these weights", "bert.encoder.layer", describing=False)


# Descriptions


FAMILIES: dict[str, tuple[Any, Any]] = {
    "bert": (BertForSequenceClassification, BertConfig(**_SHAPE)),
    "roberta": (RobertaForSequenceClassification, RobertaConfig(**_SHAPE, pad_token_id=0)),
    "distilbert": (DistilBertForSequenceClassification, DistilBertConfig(
        vocab_size=VOCABULARY, dim=24, n_layers=2, n_heads=2, hidden_dim=40)),
    "llama": (LlamaForSequenceClassification, LlamaConfig(**_SHAPE, num_key_value_heads=1)),
    "gpt2": (GPT2ForSequenceClassification, GPT2Config(**GPT2)),
    "llama-causal": (LlamaForCausalLM, LlamaConfig(**_SHAPE, num_key_value_heads=1)),
    "gpt2-causal": (GPT2LMHeadModel, GPT2Config(**GPT2)),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_description_without_weights(tmp_path, family):
    folder = save(seeded(*FAMILIES[family]), tmp_path)
    task, labels = ("causal-lm", None) if "causal" in family else ("classification", ("x", "y", "z"))
    described = describe_backbone(folder, task=task, labels=labels)
    loaded = load_backbone(folder, task=task, labels=labels)
    assert described == loaded.backbone == describe(loaded.model, id=folder)
    assert all(p.device.type == "meta" for p in skeleton(folder, task=task, labels=labels).parameters())
    # A description that is known already is taken as it is.
    assert load_backbone(folder, task=task, labels=labels, backbone=described).backbone is described


def test_encoders_are_no_language_models(tmp_path):
    """They see the token that they should predict: everything would look perfect."""
    refused(bert(tmp_path, BertForMaskedLM), "an encoder", task="causal-lm")


def test_images_are_no_texts(tmp_path):
    shape = {**_SHAPE, "image_size": 8, "patch_size": 4}
    shape.pop("vocab_size")
    save(seeded(ViTForImageClassification, ViTConfig(**shape)), tmp_path)
    refused(tmp_path, "takes no models of the type 'vit'", "docs/tasks.md shows how to add a task")


# Padding


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (GPT2ForSequenceClassification, GPT2Config(**GPT2)),
        (LlamaForSequenceClassification, LlamaConfig(**{**_SHAPE, "vocab_size": 300})),
        # A checkpoint that says otherwise than its tokenizer.
        (LlamaForSequenceClassification, LlamaConfig(**{**_SHAPE, "vocab_size": 300}, pad_token_id=7)),
    ],
)
def test_decoders_classify_by_the_last_token_of_a_row(tmp_path, make, config):
    tokenizer = byte_tokenizer(["some words here"], begin=False)
    assert tokenizer.pad_token is None
    loaded = load(save(seeded(make, config), tmp_path, tokenizer), ("x", "y"))
    pad = loaded.processor.pad_token_id
    assert pad == loaded.processor.eos_token_id == loaded.model.config.pad_token_id
    rows = loaded.processor(["some words", "some"])["input_ids"]
    long, short = rows
    ids = torch.tensor([long, short + [pad] * (len(long) - len(short))])
    mask = torch.tensor([[1] * len(long), [1] * len(short) + [0] * (len(long) - len(short))])
    with torch.no_grad():
        together = loaded.model(input_ids=ids, attention_mask=mask).logits
        alone = loaded.model(input_ids=torch.tensor([short])).logits
    torch.testing.assert_close(together[1:], alone)


def test_a_tokenizer_without_any_special_token_can_pad(tmp_path):
    tokenizer = byte_tokenizer(["a"], begin=False)
    tokenizer.eos_token = tokenizer.bos_token = None
    save(seeded(LlamaForCausalLM, LlamaConfig(**{**_SHAPE, "vocab_size": 300})), tmp_path, tokenizer)
    assert load_processor(str(tmp_path), "classification").pad_token_id == 0


def test_verbosity_is_put_back():
    before = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    with pytest.raises(ModelError):
        load_processor("no-such-organisation/no-such-model", "classification")
    assert (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()) == before
