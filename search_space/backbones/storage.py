"""How the weights of a model are stored: the name of their quantisation, and the sizes of its parameters.

A checkpoint names its quantisation in its `config.json`, and transformers keeps that entry in the configuration of the
loaded model. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any


def quantization_entry(config: Any) -> dict[str, Any]:
    """Return the entry `quantization_config` of a model's configuration as a mapping; empty if there is none."""
    entry = getattr(config, "quantization_config", None) or {}
    return dict(entry) if isinstance(entry, Mapping) else dict(entry.to_dict())


def quantization_of(config: Any) -> str | None:
    """Return how bitsandbytes stores the weights: nf4, fp4 or int8; another method by its name; None for neither."""
    entry = quantization_entry(config)
    if not entry:
        return None
    method = entry.get("quant_method")
    if entry.get("load_in_8bit") or entry.get("_load_in_8bit"):
        found = "int8"
    elif entry.get("load_in_4bit") or entry.get("_load_in_4bit"):
        found = entry.get("bnb_4bit_quant_type", "fp4")
    else:
        return "an unknown method" if method is None else str(getattr(method, "value", method))
    # Files of older versions of transformers lack the name of the method.
    return found if method in (None, "bitsandbytes") else str(method)


def num_elements(parameter: Any) -> int:
    """Return the number of weights of a parameter; one of bitsandbytes' 4 bits holds two in each stored byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else prod(state.shape)
