"""Exports are loaded as their README.md says, in a process without autopeft: the same logits for a padded batch."""

from __future__ import annotations

import json
import runpy
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
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RemBertConfig,
    RemBertForMaskedLM,
)

from autopeft.evaluators.backbones import load_backbone
from autopeft.search_space.adapters import Lora
from autopeft.studies.exporters import EXPORTERS, native
from autopeft.studies.recipes.recipe import Recipe

from ...support import exported
from ...support.exported import LABELS, WORDS, make_recipe, trained
from ...support.fresh import FreshProcess

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


def loaded_logits(fresh: FreshProcess, folder: Path) -> Tensor:
    """Run the code of the export's README.md, and return the logits of a batch of `TEXTS`."""
    return torch.tensor(fresh.read("readme", folder=folder, texts=[[text] for text in TEXTS]))


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("target", ["peft", "merged"])
def test_a_decoder_classifies_a_padded_batch(tmp_path: Path, fresh: FreshProcess, family: str, target: str) -> None:
    recipe = decoder_recipe(tmp_path, family)
    state, _ = trained(recipe)
    EXPORTERS[target].export(recipe, state, tmp_path / "out")
    torch.testing.assert_close(loaded_logits(fresh, tmp_path / "out"), our_logits(recipe, state), atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pad_token_id"] == 1
    assert config["id2label"] == {str(i): label for i, label in enumerate(LABELS)}
    assert config["problem_type"] == "single_label_classification"


@pytest.mark.parametrize("target", ["peft", "merged"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_every_task_loads_as_the_readme_says(tmp_path: Path, fresh: FreshProcess, family: str, target: str) -> None:
    recipe = make_recipe(family, exported.save_model(family, tmp_path / "model"), {"layers.1.attn.q": Lora(rank=2)})
    state, _ = trained(recipe)
    EXPORTERS[target].export(recipe, state, tmp_path / "out")
    found = loaded_logits(fresh, tmp_path / "out")
    model, attachment = native.attach(recipe, state)
    tokens = load_backbone(recipe.backbone.id, task=recipe.task, labels=recipe.labels).processor
    with attachment, torch.no_grad():
        wanted = model(**tokens(TEXTS, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_the_script_saves_the_padding_token_and_the_tokenizer(tmp_path: Path, fresh: FreshProcess) -> None:
    EXPORTERS["trl-script"].export(decoder_recipe(tmp_path, "gpt2"), None, tmp_path / "out")
    fresh.read("script", folder=tmp_path / "out", output=tmp_path / "trained", steps=1)
    assert AutoConfig.from_pretrained(tmp_path / "trained").pad_token_id == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "trained").pad_token == "[EOS]"


@pytest.mark.parametrize("target", ["peft", "merged"])
def test_modules_that_were_named_by_hand(tmp_path: Path, fresh: FreshProcess, target: str) -> None:
    folder = exported.save_model("bert", tmp_path / "model")
    torch.manual_seed(0)
    config = DebertaV2Config(**SHAPE, vocab_size=len(WORDS), pad_token_id=0, num_labels=3)
    DebertaV2ForSequenceClassification(config).save_pretrained(folder)
    by_hand = {"layers": "deberta.encoder.layer", "attn.q": "attention.self.query_proj"}
    recipe = make_recipe("bert", folder, {"layers.1.attn.q": Lora(rank=2)}, modules=by_hand)
    state, _ = trained(recipe)
    EXPORTERS[target].export(recipe, state, tmp_path / "out")
    found = torch.tensor(fresh.read("readme", folder=tmp_path / "out", ids=exported.token_ids().tolist()))
    model, attachment = native.attach(recipe, state)
    with attachment:
        torch.testing.assert_close(found, exported.logits(model), atol=1e-5, rtol=1e-5)


#: Families whose classifiers have a pooler that checkpoints of their language models lack.
POOLED: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SHAPE, vocab_size=len(WORDS), pad_token_id=0)),
    "rembert": lambda: RemBertForMaskedLM(
        RemBertConfig(**SHAPE, vocab_size=len(WORDS), pad_token_id=0, input_embedding_size=16, output_embedding_size=16)
    ),
}


def without_pooler(folder: Path, family: str = "bert") -> Recipe:
    """Return a recipe over a masked language model, whose checkpoint has no pooler for the classifier."""
    model = exported.save_model("bert", folder / "model")
    torch.manual_seed(0)
    POOLED[family]().save_pretrained(model)
    return make_recipe("bert", model, {"layers.1.attn.q": Lora(rank=2)})


@pytest.mark.parametrize("family", POOLED)
def test_a_pooler_that_the_checkpoint_lacks_is_trained_and_exported(
    tmp_path: Path, fresh: FreshProcess, fresh_own: FreshProcess, family: str
) -> None:
    recipe = without_pooler(tmp_path, family)
    state, _ = trained(recipe)
    (pooler,) = {name.removesuffix("/head/W") for name in state if "pooler" in name and name.endswith("/W")}
    assert pooler.removeprefix("head.") in recipe.head_modules
    adapters = 2 * recipe.host.hidden_size * 2
    assert recipe.num_adapter_params == adapters, "it does not count, as the head"
    wanted = our_logits(recipe, state)
    for target in ("peft", "peft-patterns", "merged"):
        assert EXPORTERS[target].export(recipe, state, tmp_path / target).level == "exact"
        torch.testing.assert_close(loaded_logits(fresh, tmp_path / target), wanted, atol=1e-5, rtol=1e-5)
    EXPORTERS["native"].export(recipe, state, tmp_path / "native")
    ids = exported.token_ids().tolist()
    model, attachment = native.attach(recipe, state)
    with attachment:
        own = exported.logits(model)
    assert fresh_own.read("native", folder=tmp_path / "native", ids=ids)["logits"] == own.tolist()


def test_the_script_trains_a_pooler_that_the_checkpoint_lacks(tmp_path: Path) -> None:
    recipe = without_pooler(tmp_path)
    EXPORTERS["trl-script"].export(recipe, None, tmp_path / "out")
    script = runpy.run_path(str(tmp_path / "out" / "train.py"))
    model = script["load_model"](script["load_tokenizer"]())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trainable == recipe.num_adapter_params + recipe.host.num_head_params
    pooler = "bert.pooler.dense.weight"
    saved = get_peft_model_state_dict(model)
    assert torch.equal(
        saved[f"base_model.model.{pooler}"],
        model.get_parameter("base_model.model.bert.pooler.dense.modules_to_save.default.weight"),
    )


def test_a_recipe_without_the_pooler_keeps_it_frozen(tmp_path: Path, fresh: FreshProcess) -> None:
    """Recipes of earlier versions do not count the pooler among the head; their results are those of a frozen one."""
    recipe = without_pooler(tmp_path)
    old = recipe.model_copy(
        update={
            "head_modules": ("classifier",),
            "sites": {name: site for name, site in recipe.sites.items() if "pooler" not in name},
        }
    )
    state = {name: value for name, value in trained(recipe)[0].items() if "pooler" not in name}
    EXPORTERS["peft"].export(old, state, tmp_path / "out")
    torch.testing.assert_close(loaded_logits(fresh, tmp_path / "out"), our_logits(old, state), atol=1e-5, rtol=1e-5)
