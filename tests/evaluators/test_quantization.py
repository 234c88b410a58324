"""Quantised backbones: what loads, what is left in full, how they are described, and what is refused by name."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from autopeft.evaluators.backbones import describe_backbone, load_backbone
from autopeft.evaluators.errors import MissingPackageError, ModelError
from autopeft.evaluators.quantization import dequantize
from autopeft.search_space.backbones.linear import weight_of
from autopeft.search_space.backbones.quantized import is_quantized, state_tensors

from ..support.tiny_models import byte_tokenizer, save, seeded

pytest.importorskip("bitsandbytes")
torch.set_num_threads(1)

_SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
_LABELS: dict[str, Any] = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
MODELS: dict[str, tuple[str, Any]] = {
    "llama": ("causal-lm", lambda: seeded(LlamaForCausalLM, LlamaConfig(**_SHAPE, num_key_value_heads=2))),
    "tied": ("causal-lm", lambda: seeded(LlamaForCausalLM, LlamaConfig(**_SHAPE, tie_word_embeddings=True))),
    "gpt2": ("causal-lm", lambda: seeded(GPT2LMHeadModel, GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4))),
    "bert": (
        "classification",
        lambda: seeded(BertForSequenceClassification, BertConfig(**_SHAPE, **_LABELS)),
    ),
    "roberta": (
        "classification",
        lambda: seeded(RobertaForSequenceClassification, RobertaConfig(**_SHAPE, **_LABELS)),
    ),
}
#: Modules outside the layers, which stay in full.
IN_FULL = {
    "llama": ["lm_head"],
    "tied": ["lm_head"],
    "gpt2": ["lm_head"],
    "bert": ["bert.pooler.dense", "classifier"],
    "roberta": ["classifier.dense", "classifier.out_proj"],
}


def saved(family: str, folder: Path) -> str:
    return save(MODELS[family][1](), folder, byte_tokenizer(["abc"]))


def load(family: str, folder: str, quantization: str | None = None, **settings: Any) -> Any:
    task = MODELS[family][0]
    labels = ("a", "b") if task == "classification" else None
    return load_backbone(folder, task=task, labels=labels, quantization=quantization, **settings)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(2, 20).view(2, 9)).logits
    return found


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("family", MODELS)
def test_the_linears_of_the_layers_are_quantised_and_no_others(tmp_path: Path, family: str, quantization: str) -> None:
    folder = saved(family, tmp_path)
    loaded, full = load(family, folder, quantization), load(family, folder)
    sites = {site.module for site in full.backbone.sites if site.role not in ("norm", "embed", "backbone")}
    assert {path for path, module in loaded.model.named_modules() if is_quantized(module)} == sites
    for path in IN_FULL[family]:
        assert type(loaded.model.get_submodule(path)) is torch.nn.Linear
    # The coarsest step of NF4 is from -1 to -0.696 of a block's largest weight, that of int8 1/127 of a row's.
    for path in sites:
        ours, theirs = weight_of(loaded.model.get_submodule(path)), weight_of(full.model.get_submodule(path))
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() < (0.153 if quantization == "nf4" else 0.005) * theirs.abs().max()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("family", MODELS)
def test_the_description_is_that_of_the_configuration_alone(tmp_path: Path, family: str, quantization: str) -> None:
    folder = saved(family, tmp_path)
    task = MODELS[family][0]
    labels = ("a", "b") if task == "classification" else None
    loaded, full = load(family, folder, quantization), load(family, folder)
    assert describe_backbone(folder, None, task, labels, None, quantization) == loaded.backbone
    assert loaded.backbone.quantization == quantization
    assert loaded.backbone.num_params == full.backbone.num_params, "weights, not bytes"
    assert [site for site in full.backbone.sites if site.role != "backbone"] == list(loaded.backbone.sites)
    assert loaded.backbone.from_dict(loaded.backbone.to_dict()) == loaded.backbone
    assert "quantised (" in loaded.backbone.absence(["backbone"])


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_evaluation_computes_what_training_computes(tmp_path: Path, family: str, quantization: str) -> None:
    """bitsandbytes would round inputs (int8) or compute in bfloat16 (4 bits on some CPUs) without gradients alone."""
    loaded = load(family, saved(family, tmp_path), quantization)
    digest, found = loaded.weights(), logits(loaded.model)
    embedded = loaded.model.get_input_embeddings()(torch.arange(2, 20).view(2, 9)).detach().requires_grad_()
    torch.testing.assert_close(loaded.model(inputs_embeds=embedded).logits.detach(), found, rtol=0, atol=0)
    assert loaded.weights() == digest, "nothing was repacked"
    halves = torch.cat([logits_of(loaded.model, row) for row in torch.arange(2, 20).view(2, 1, 9)])
    torch.testing.assert_close(halves, found, rtol=1e-5, atol=1e-5)
    dequantize(loaded.model)
    torch.testing.assert_close(logits(loaded.model), found, rtol=1e-6, atol=1e-6)
    assert not state_tensors(loaded.model)


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_checkpoint_that_is_quantised_loads_as_it_is(tmp_path: Path, quantization: str) -> None:
    first = load("llama", saved("llama", tmp_path / "full"), quantization)
    first.model.save_pretrained(tmp_path / "stored")
    first.processor.save_pretrained(tmp_path / "stored")
    again = load("llama", str(tmp_path / "stored"))
    assert again.backbone.quantization == quantization
    assert again.backbone.num_params == first.backbone.num_params
    torch.testing.assert_close(logits(again.model), logits(first.model), rtol=0, atol=0)
    assert load("llama", str(tmp_path / "stored"), quantization).backbone == again.backbone
    other = {"nf4": "int8", "int8": "nf4"}[quantization]
    with pytest.raises(ModelError, match=f"stored as {quantization}: remove model.quantization: {other}"):
        load("llama", str(tmp_path / "stored"), other)


def test_double_quantisation_and_fp4_of_a_checkpoint(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "full")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True)
    theirs = LlamaForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "stored")
    byte_tokenizer(["abc"]).save_pretrained(tmp_path / "stored")
    loaded = load("llama", str(tmp_path / "stored"))
    assert loaded.backbone.quantization == "fp4"
    found = logits(loaded.model)
    dequantize(loaded.model)
    torch.testing.assert_close(logits(loaded.model), found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors"])
def test_other_methods_are_refused_by_name(tmp_path: Path, method: str) -> None:
    folder = saved("llama", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": method, "bits": 4}})
    )
    for wanted in (None, "nf4"):
        with pytest.raises(ModelError, match=rf"quantised by {method}, .*checkpoint without quantisation"):
            load("llama", folder, wanted)
        with pytest.raises(ModelError, match=f"quantised by {method}"):
            describe_backbone(folder, task="causal-lm", quantization=wanted)


def test_a_quantised_task_head_is_refused(tmp_path: Path) -> None:
    folder = saved("roberta", tmp_path / "full")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "stored")
    byte_tokenizer(["abc"]).save_pretrained(tmp_path / "stored")
    with pytest.raises(ModelError, match=r"task head quantised \(classifier"):
        load("roberta", str(tmp_path / "stored"))


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("llama", tmp_path)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    with pytest.raises(MissingPackageError, match="pip install bitsandbytes"):
        load("llama", folder, "nf4")
    assert describe_backbone(folder, task="causal-lm", quantization="nf4").quantization == "nf4"


def test_the_embedded_model_in_4_bits(capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load_backbone("embedded", task="classification", labels=("x", "y"), quantization="nf4")
    assert capfd.readouterr().err == ""
    assert loaded.backbone == describe_backbone("embedded", None, "classification", ("x", "y"), None, "nf4")
    assert type(loaded.model.get_submodule("classifier")) is torch.nn.Linear
    assert sum(map(is_quantized, loaded.model.modules())) == 36
    for dtype in ("bfloat16", "float16"):
        half = load_backbone("embedded", task="classification", labels=("x", "y"), quantization="nf4", dtype=dtype)
        assert logits(half.model).dtype == getattr(torch, dtype)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    "shape",
    # bitsandbytes compiles a function for weights whose last block is not full.
    [(64, 64), (8, 96), (24, 40), *(pytest.param(odd, marks=pytest.mark.slow) for odd in ((3, 7), (5, 1)))],
)
def test_every_shape_is_dequantised_as_its_codes_say(shape: tuple[int, int], double: bool) -> None:
    """Against the codes by hand: two in a byte, the first in the upper half, and blocks of 64 over the flat weight."""
    from bitsandbytes.functional import dequantize_blockwise
    from bitsandbytes.nn import Linear4bit

    linear: Any = Linear4bit(shape[1], shape[0], quant_type="nf4", compress_statistics=double, bias=False)
    linear.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    linear = linear.to("cpu")
    linear.compute_dtype = torch.float32
    state, stored = linear.weight.quant_state, linear.weight.detach().flatten()
    scales = state.absmax if not double else dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = torch.stack([stored >> 4, stored & 15], 1).flatten()[: shape[0] * shape[1]]
    by_hand = state.code[codes.long()] * scales.repeat_interleave(64)[: len(codes)]
    torch.testing.assert_close(weight_of(linear), by_hand.view(shape), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "none of its linear layers is quantised"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "none of its linear layers is quantised"),
        ({"bits": 4}, "quantised by an unknown method"),
        ("nf4", "the configuration could not be loaded"),
        ([4], "the configuration could not be loaded"),
    ],
)
def test_entries_that_do_not_fit_the_weights_are_refused(tmp_path: Path, entry: Any, words: str) -> None:
    folder = saved("llama", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": entry}))
    with pytest.raises(ModelError, match=words):
        load("llama", folder)
