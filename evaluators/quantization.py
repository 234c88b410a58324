"""Backbones whose linear layers bitsandbytes stores in 4 or 8 bits: how they load, and how they compute.

The linear layers of the transformer's layers are quantised; the output layer, the task head, embeddings and norms are
not. Every product is that of the dequantised weight in `model.dtype`. bitsandbytes 0.50 itself computes some
products otherwise, which would make a candidate's loss depend on what it is packed with, or training differ from
evaluation:

- LLM.int8() also rounds the inputs to 8 bits, and finds their outliers over the whole batch;
- on CPUs with AVX512-BF16, 4-bit layers in evaluation mode repack their weight in place and compute in bfloat16;
- on CPUs, 4-bit weights whose rows are no multiple of the block size are dequantised wrongly.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from autopeft.evaluators.errors import MissingPackageError, ModelError
from autopeft.search_space.backbones.linear import set_weight, weight_of
from autopeft.search_space.backbones.quantized import is_quantized, product
from autopeft.search_space.backbones.storage import quantization_entry, quantization_of

#: What `model.quantization` may be.
Quantization = Literal["nf4", "int8"]
#: What bitsandbytes stores; fp4 only as a checkpoint has it.
_STORED = (*get_args(Quantization), "fp4")
PACKAGE = "bitsandbytes"
INSTALL = f"pip install {PACKAGE}"


def check_quantization(model_id: str, config: Any, wanted: str | None) -> str | None:
    """Return how the model's linears will be stored: as `wanted`, or as the checkpoint has them; None: in full.

    `config`: the model's configuration. Raises ModelError for a checkpoint that bitsandbytes cannot load, or that has
    another quantisation than `wanted`.
    """
    stored = quantization_of(config)
    if stored is not None and stored not in _STORED:
        raise ModelError(
            f"{model_id}: its weights are quantised by {stored}, through which adapters cannot be trained here; take"
            f" the checkpoint without quantisation, and set model.quantization: nf4 to have it in 4 bits"
        )
    if None not in (stored, wanted) and stored != wanted:
        raise ModelError(f"{model_id}: its weights are stored as {stored}: remove model.quantization: {wanted}")
    return stored or wanted


def check_package(quantization: str | None) -> None:
    """Raise MissingPackageError if a quantised model cannot be loaded because bitsandbytes is not installed."""
    if quantization is not None and importlib.util.find_spec(PACKAGE) is None:
        raise MissingPackageError(
            f"a model in {quantization} needs the package {PACKAGE}, which is not installed: {INSTALL}"
        )
    # On some CPUs it warns, at its import, of a kernel that it has not; no product here would use it.
    logging.getLogger(f"{PACKAGE}.backends.cpu.ops").setLevel(logging.ERROR)


def outer_linears(model: nn.Module) -> list[str]:
    """Return the paths of the linear layers outside the lists of layers: output layer, task head, pooler, projections.

    They are left in full, as transformers does it for output layers and heads.
    """
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if not any(part.isdecimal() for part in path.split("."))
    ]


def settings_of(quantization: str, dtype: str = "float32", full: Sequence[str] = ()) -> dict[str, Any]:
    """Return the arguments of transformers' BitsAndBytesConfig.

    `dtype`: in which the products are computed. `full`: linears that are not quantised.
    """
    skipped = {"llm_int8_skip_modules": list(full)}
    if quantization == "int8":
        return {"load_in_8bit": True, **skipped}
    types = {"bnb_4bit_quant_type": quantization, "bnb_4bit_compute_dtype": dtype}
    return {"load_in_4bit": True, **types, **skipped}


def loading_arguments(config: Any, dtype: str, full: Sequence[str], device: str) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for a model whose configuration names its quantisation.

    If the study sets it, all linears but `full` are quantised as they are loaded; a checkpoint's own has the name of
    its method, and transformers reads it itself. Raises MissingPackageError.
    """
    quantization = quantization_of(config)
    check_package(quantization)
    arguments: dict[str, Any] = {"device_map": {"": device}}
    if "quant_method" not in quantization_entry(config):
        from transformers import BitsAndBytesConfig

        new = BitsAndBytesConfig(**settings_of(str(quantization), dtype, full))
        arguments["quantization_config"] = new
    return arguments


def prepare(model_id: str, model: nn.Module, dtype: torch.dtype, heads: Sequence[str]) -> None:
    """Make the quantised linears of a loaded model compute in `dtype` with their dequantised weights.

    `heads`: paths of the task head. Raises ModelError if no linear is quantised, or one of the head is.
    """
    found = {path: module for path, module in model.named_modules() if is_quantized(module)}
    if not found:
        raise ModelError(
            f"{model_id}: none of its linear layers is quantised: remove model.quantization, or quantization_config"
            " from its config.json, if that does not fit its weights"
        )
    of_head = [path for path in found if any(path == head or path.startswith(f"{head}.") for head in heads)]
    if of_head:
        raise ModelError(
            f"{model_id}: the checkpoint has its task head quantised ({of_head[0]}), which is trained in full here;"
            " take the checkpoint without quantisation, and set model.quantization"
        )
    for module in found.values():
        layer: Any = module
        layer.compute_dtype = dtype
        layer.__class__ = _of_dequantized(layer.__class__)


@cache
def _of_dequantized(kind: Any) -> Any:
    """Return the subclass of a linear of bitsandbytes that computes with its dequantised weight."""
    return type(f"Frozen{kind.__name__}", (kind,), {"forward": _forward})


def _forward(linear: Any, x: Tensor) -> Tensor:
    y = product(x, linear)
    return y if linear.bias is None else y + linear.bias.to(y.dtype)


def dequantize(model: Any) -> None:
    """Replace the quantised linears of a transformers model by plain ones with the dequantised weights, in place.

    A GPT-2 keeps its own kind of linear, whose weight is transposed.
    """
    for path, module in list(model.named_modules()):
        if not is_quantized(module):
            continue
        layer: Any = module
        weight, bias = weight_of(layer), layer.bias
        kind = getattr(layer, "source_cls", nn.Linear)
        shape = (layer.out_features, layer.in_features) if kind.__name__ == "Conv1D" else weight.shape[::-1]
        plain = kind(*shape).to(weight.device, weight.dtype).requires_grad_(False)
        set_weight(plain, weight, bias)
        plain.train(layer.training)
        model.set_submodule(path, plain)
    model.hf_quantizer.remove_quantization_config(model)
