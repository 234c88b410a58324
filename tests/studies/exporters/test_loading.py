"""Exports are loaded as their README.md says, in a process without autopeft: the same logits for a padded batch."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from autopeft.evaluators.backbones import load_backbone
from autopeft.search_space.adapters import Lora
from autopeft.studies.exporters import EXPORTERS, native
from autopeft.studies.recipes.recipe import Recipe

from ...support import exported
from ...support.exported import LABELS, WORDS, make_recipe, trained

TEXTS = ["w1 w2", "w3 w4 w5 w6 w7"]
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IDS = {"vocab_size": len(WORDS), "bos_token_id": 1, "eos_token_id": 1}
#: Decoders with a classification head and without a padding token, as pretrained decoders are.
DECODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: GPT2ForSequenceClassification(
        GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, num_labels=2, **IDS)
    ),
    "llama": lambda: LlamaForSequenceClassification(LlamaConfig(num_key_value_heads=1, num_labels=2, **SHAPE, **IDS)),
}


def decoder_recipe(folder: Path, family: str) -> Recipe:
    """Return a recipe over a decoder without a padding token, whose tokenizer pads on the left."""
    torch.manual_seed(0)
    DECODERS[family]().save_pretrained(folder / "model")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="[EOS]", unk_token="[UNK]", padding_side="left"
    ).save_pretrained(folder / "model")
    site = "layers.1.attn.qkv" if family == "gpt2" else "layers.1.attn.q"
    return make_recipe("llama-score", folder / "model", {site: Lora(rank=2)})


def our_logits(recipe: Recipe, state: dict[str, Tensor]) -> Tensor:
    """Return the logits of `TEXTS` [2, C] by our own code, as in a study."""
    processor = load_backbone(recipe.backbone.id, task=recipe.task, labels=recipe.labels).processor
    task = recipe.task_class(processor, 8, recipe.labels)
    batch = task.inputs(task.encode([{"text": text, "label": LABELS[0]} for text in TEXTS]))
    assert not batch["attention_mask"].all(), "the batch is padded"
    model, attachment = native.attach(recipe, state)
    with attachment, torch.no_grad():
        return model(**batch).logits


def loaded_logits(folder: Path) -> Tensor:
    """Run the code of the export's README.md, and return the logits of a batch of `TEXTS`."""
    code = (folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    code += f"""
import json, sys, torch
batch = tokenizer({TEXTS!r}, padding=True, return_tensors="pt")
with torch.no_grad():
    print(json.dumps(model(**batch).logits.tolist()))
assert not any(name.split(".")[0] == "autopeft" for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("target", ["peft", "merged"])
def test_a_decoder_classifies_a_padded_batch(tmp_path: Path, family: str, target: str) -> None:
    recipe = decoder_recipe(tmp_path, family)
    state, _ = trained(recipe)
    EXPORTERS[target].export(recipe, state, tmp_path / "out")
    torch.testing.assert_close(loaded_logits(tmp_path / "out"), our_logits(recipe, state), atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pad_token_id"] == 1
    assert config["id2label"] == {str(i): label for i, label in enumerate(LABELS)}
    assert config["problem_type"] == "single_label_classification"


@pytest.mark.parametrize("target", ["peft", "merged"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_every_task_loads_as_the_readme_says(tmp_path: Path, family: str, target: str) -> None:
    recipe = make_recipe(family, exported.save_model(family, tmp_path / "model"), {"layers.1.attn.q": Lora(rank=2)})
    state, _ = trained(recipe)
    EXPORTERS[target].export(recipe, state, tmp_path / "out")
    found = loaded_logits(tmp_path / "out")
    model, attachment = native.attach(recipe, state)
    tokens = load_backbone(recipe.backbone.id, task=recipe.task, labels=recipe.labels).processor
    with attachment, torch.no_grad():
        wanted = model(**tokens(TEXTS, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_the_script_saves_the_padding_token_and_the_tokenizer(tmp_path: Path) -> None:
    EXPORTERS["trl-script"].export(decoder_recipe(tmp_path, "gpt2"), None, tmp_path / "out")
    command = [sys.executable, "train.py", "--max-steps", "1", "--output", str(tmp_path / "trained")]
    done = subprocess.run(command, cwd=tmp_path / "out", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert AutoConfig.from_pretrained(tmp_path / "trained").pad_token_id == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "trained").pad_token == "[EOS]"


@pytest.fixture
def without_pooler(tmp_path: Path) -> Recipe:
    """Return a recipe over a masked language model, whose checkpoint has no pooler for the classifier."""
    folder = exported.save_model("bert", tmp_path / "model")
    BertForMaskedLM(BertConfig.from_pretrained(folder)).save_pretrained(folder)
    return make_recipe("bert", folder, {"layers.1.attn.q": Lora(rank=2)})


@pytest.mark.parametrize("target", ["peft", "merged"])
def test_a_pooler_that_the_checkpoint_lacks_is_exported(without_pooler: Recipe, tmp_path: Path, target: str) -> None:
    state, _ = trained(without_pooler)
    assert EXPORTERS[target].export(without_pooler, state, tmp_path / "out").level == "exact"
    wanted = our_logits(without_pooler, state)
    torch.testing.assert_close(loaded_logits(tmp_path / "out"), wanted, atol=1e-5, rtol=1e-5)


def test_the_script_saves_a_pooler_that_the_checkpoint_lacks(without_pooler: Recipe, tmp_path: Path) -> None:
    EXPORTERS["trl-script"].export(without_pooler, None, tmp_path / "out")
    script = runpy.run_path(str(tmp_path / "out" / "train.py"))
    model = script["load_model"](script["load_tokenizer"]())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trainable == without_pooler.num_adapter_params + without_pooler.host.num_head_params
    pooler = "bert.pooler.dense.weight"
    saved = get_peft_model_state_dict(model)
    assert torch.equal(
        saved[f"base_model.model.{pooler}"],
        model.get_parameter("base_model.model.bert.pooler.dense.modules_to_save.default.weight"),
    )
