"""What a model's attention modules do, as their code and their attributes tell without torch."""

from __future__ import annotations

import inspect
import sys
from typing import Any


def is_causal(attention: Any, model: Any, config: Any) -> bool:
    """Return whether the tokens of an attention module attend to earlier tokens only."""
    own = getattr(attention, "is_causal", None)
    if own is not None:
        return bool(own)
    # Older modules leave it to the mask, and their files import what makes it. Configurations of models that can be
    # encoders or decoders say which.
    return "create_causal_mask" in vars(sys.modules[type(model).__module__]) and getattr(config, "is_decoder", True)


def uses_attention_interface(module: Any) -> bool:
    """Return whether a module looks up its attention function in transformers' attention interface at every call."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names
