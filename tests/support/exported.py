"""Tiny models on disk, recipes over them and random trained weights: for the tests of recipes and exports."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.attachment.heads import head_sites
from autopeft.evaluators.backbones import load_backbone
from autopeft.search_space.adapters import AdapterSpec
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.studies.recipes.parts import Measured, Provenance
from autopeft.studies.recipes.recipe import Recipe

WORDS = ("[PAD]", "[EOS]", "[UNK]", *(f"w{i}" for i in range(40)))
LABELS = ("cold", "hot", "warm")
TEXTS = 3  # that `logits` are of
LAYERS = 12  # more than ten: layer 1 must not be taken for layer 11

_ENCODER = {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 24}
_DECODER = {**_ENCODER, "num_key_value_heads": 1}
_IDS = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
_GPT2 = {"n_embd": 16, "n_layer": LAYERS, "n_head": 2, "n_positions": 64}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**_ENCODER, **_IDS, num_labels=3)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**_ENCODER, **_IDS, num_labels=3)),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(dim=16, n_layers=LAYERS, n_heads=2, hidden_dim=24, **_IDS, num_labels=3)
    ),
    "llama-score": lambda: LlamaForSequenceClassification(LlamaConfig(**_DECODER, **_IDS, num_labels=3)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_DECODER, **_IDS)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2, **_IDS)),
}
CLASSIFIERS = ("bert", "roberta", "distilbert", "llama-score")


def save_model(family: str, folder: Path, make: Callable[[], PreTrainedModel] | None = None) -> Path:
    """A random model whose norms and biases are perturbed, and a tokenizer of words. `make`: the model, if another."""
    torch.manual_seed(0)
    model = (make or MODELS[family])()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 1)])
    special = {"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def save_rows(family: str, folder: Path) -> dict[str, Any]:
    """A few rows per split, and the data section that names them."""
    for split in ("train", "validation", "test"):
        rows = [
            {"text": f"w{i} w{i + 1} {split}", "label": LABELS[i % 3]}
            if family in CLASSIFIERS
            else {"prompt": f"w{i} {split}", "completion": f"w{i + 1}"}
            for i in range(6)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {split: f"{split}.jsonl" for split in ("train", "validation", "test")}
    return {"source": "files", "folder": str(folder), "max_length": 8, **files}


Placement = Mapping[str, AdapterSpec | Sequence[AdapterSpec]]


def make_recipe(
    family: str,
    model: Path,
    placement: Placement,
    training: Mapping[str, Any] = {},
    modules: Mapping[str, str] | None = None,
    quantization: str | None = None,
    **changes: Any,
) -> Recipe:
    """A recipe over a saved model. `placement`: adapters by the name of their site. `modules`: those named by hand."""
    task = "classification" if family in CLASSIFIERS else "causal-lm"
    labels = LABELS if family in CLASSIFIERS else None
    loaded = load_backbone(str(model), task=task, labels=labels, modules=modules, quantization=quantization)
    adapters = {name: [specs] if isinstance(specs, AdapterSpec) else list(specs) for name, specs in placement.items()}
    candidate = Candidate(
        architecture=Architecture.of(adapters), training={"learning_rate": 1e-5, "batch_size": 4, **training}
    )
    measured = Measured(value=0.7, std_err=0.01, low=0.66, high=0.74, split="test", seeds=(1, 2))
    fields: dict[str, Any] = {
        "task": task,
        "labels": labels,
        "data": save_rows(family, model.parent),
        "seed": 3,
        "measured": {"accuracy": measured},
        "provenance": Provenance(
            study="demo", trial=7, autopeft="0.1.0", packages={"torch": "2"}, created="2026-01-01"
        ),
    }
    heads = head_sites(loaded.model, loaded.backbone)
    return Recipe.of(backbone=loaded.backbone, candidate=candidate, head_sites=heads, **{**fields, **changes})


def token_ids() -> Tensor:
    return torch.randint(2, len(WORDS), (TEXTS, 6), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> Tensor:
    ids = token_ids()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def trained(recipe: Recipe, *, domain: int = 0, averaged: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """Random weights of a recipe, as if it had been trained, and the logits of that network by our code: for texts of
    that domain, and with the experts of mixtures weighted alike if they are to be `averaged`.
    """
    origin = recipe.backbone
    settings = {"task": recipe.task, "labels": recipe.labels, "quantization": origin.quantization}
    loaded = load_backbone(origin.id, backbone=recipe.host, **settings)
    with Attachment(loaded.model, recipe.host, [recipe.adapters], [recipe.seed]) as attachment:
        generator = torch.Generator().manual_seed(5)
        state = {
            name: value + 0.1 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
            for name, value in attachment.state().items()
        }
        attachment.load_state(state)
        attachment.eval()
        attachment.routers.tokens.domains = torch.full((TEXTS,), domain)
        with attachment.routers.averaged() if averaged else nullcontext():
            adapted = logits(loaded.model)
    assert not torch.allclose(adapted, logits(loaded.model), atol=1e-3)
    return state, adapted
