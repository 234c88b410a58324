"""Models with random weights in the shapes of real ones, and rows for them: nothing is downloaded.

The cost of a step depends on shapes and types, not on the values of the weights.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from autopeft.evaluators.backbones import LoadedBackbone
from autopeft.evaluators.data.splits import Splits
from autopeft.search_space.backbones.introspection import describe


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Sizes of a decoder: features, layers, query and key heads, features of the mlp, vocabulary."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    mlp: int
    vocabulary: int


#: Shapes of Qwen 2.5 (0.5B, 1.5B, 3B) and Llama 3.1 (8B).
SHAPES = {
    "0.5B": DecoderShape(896, 24, 14, 2, 4864, 151936),
    "1.5B": DecoderShape(1536, 28, 12, 2, 8960, 151936),
    "3B": DecoderShape(2048, 36, 16, 2, 11008, 151936),
    "8B": DecoderShape(4096, 32, 32, 8, 14336, 128256),
}
#: Shape for a dry run, in place of any of them.
TOY = DecoderShape(64, 4, 4, 2, 96, 512)
LABELS = ("a", "b", "c")
WORDS = 200
#: Standard deviation of the weights, times the root of the width. With the usual 0.02 a narrow model's attention is
#: flat and adapters change little; with much more a wide model's attention is a choice that rounding can flip.
GAIN = 1.6


def decoder(shape: DecoderShape, device: torch.device, dtype: torch.dtype, layers: int | None = None) -> nn.Module:
    """Return a Llama of these sizes with `layers` layers (default: all), in evaluation mode."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        intermediate_size=shape.mlp,
        vocab_size=shape.vocabulary,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=GAIN / shape.hidden**0.5,
    )
    return _made(LlamaForCausalLM, config, device, dtype)


def encoder(device: torch.device, dtype: torch.dtype, hidden: int, layers: int) -> nn.Module:
    """Return a BERT that classifies texts, in evaluation mode."""
    config = BertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        vocab_size=WORDS + 2,
        num_labels=len(LABELS),
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
        initializer_range=GAIN / hidden**0.5,
    )
    return _made(BertForSequenceClassification, config, device, dtype)


def _made(kind: Any, config: Any, device: torch.device, dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        with torch.device(device):
            model: nn.Module = kind._from_config(config, dtype=dtype)
    return model.eval()


def free_memory() -> None:
    """Free unreferenced memory, also on the device."""
    gc.collect()
    torch.cuda.empty_cache()  # without CUDA it does nothing


def loaded(model: nn.Module) -> LoadedBackbone:
    """Return the model with its description and a tokenizer of `WORDS` words."""
    return LoadedBackbone(model, describe(model, id="random"), _tokenizer(), pretrained_head=False)


def texts(rows: int, words: int, seed: int) -> list[str]:
    """Draw texts of `words` words. Few words are frequent, so that there is something to learn."""
    draw = Random(f"texts/{seed}")
    return [" ".join(f"w{int(WORDS * draw.random() ** 3)}" for _ in range(words)) for _ in range(rows)]


def causal_splits(train_rows: int, words: int, held_out_rows: int = 8) -> Splits:
    """Draw splits for causal language modelling, rows of `words` tokens each."""
    sizes = (train_rows, held_out_rows, held_out_rows)
    train, validation, test = ([{"text": text} for text in texts(n, words, seed)] for seed, n in enumerate(sizes))
    return Splits(train, validation, test, None)


def labelled_splits(train_rows: int, words: int, held_out_rows: int = 8) -> Splits:
    """Draw splits for classification, texts with the label of their first word."""
    sizes = (train_rows, held_out_rows, held_out_rows)
    train, validation, test = (_labelled(texts(n, words, seed)) for seed, n in enumerate(sizes))
    return Splits(train, validation, test, LABELS)


def _labelled(of: Sequence[str]) -> list[dict[str, Any]]:
    return [{"text": text, "label": LABELS[int(text.split()[0][1:]) % len(LABELS)]} for text in of]


def _tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer with a token per word and no special tokens around a text."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i + 2 for i in range(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
