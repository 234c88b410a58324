"""Tiny random backbones of several families for fast checks on a CPU."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.backbones.introspection import describe

VOCABULARY = 61


def _bert() -> nn.Module:
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    model: nn.Module = BertForSequenceClassification(BertConfig(**shape, vocab_size=VOCABULARY, num_labels=3))
    return model


def _llama_config() -> LlamaConfig:
    # Two query heads share a key head, so that the widths of q and k differ.
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 40, **heads}
    return LlamaConfig(**shape, vocab_size=VOCABULARY, num_labels=3, pad_token_id=0)


def _gemma() -> nn.Module:
    # Gemma's norms store their scale minus one.
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12}
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 40, **heads}
    model: nn.Module = GemmaForCausalLM(GemmaConfig(**shape, vocab_size=VOCABULARY, pad_token_id=0))
    return model


def _gpt2() -> nn.Module:
    shape = {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 32}
    model: nn.Module = GPT2ForSequenceClassification(
        GPT2Config(**shape, vocab_size=VOCABULARY, num_labels=3, pad_token_id=0)
    )
    return model


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "bert": _bert,
    "llama": lambda: LlamaForSequenceClassification(_llama_config()),
    "llama-causal": lambda: LlamaForCausalLM(_llama_config()),
    "gpt2": _gpt2,
    "gemma": _gemma,
}


def tiny(family: str) -> tuple[nn.Module, Backbone]:
    """Return a random backbone in evaluation mode and its description.

    No weight has a special value: norms and biases, which start as ones and zeros, are perturbed.
    """
    model, backbone = _built(family)
    torch.manual_seed(0)
    return copy.deepcopy(model), backbone


@functools.cache
def _built(family: str) -> tuple[nn.Module, Backbone]:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, describe(model, id=f"tiny-{family}")


def tokens(examples: int = 3, length: int = 5, seed: int = 0) -> Tensor:
    """Return token ids [examples, length] without padding (id 0)."""
    return torch.randint(1, VOCABULARY, (examples, length), generator=torch.Generator().manual_seed(seed))
