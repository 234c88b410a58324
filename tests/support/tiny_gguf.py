"""Tiny Llamas in GGUF files, written by the package gguf as llama.cpp's converter does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from .tiny_models import byte_tokenizer, seeded

WORDS = ("the quick brown fox jumps over the lazy dog", "a book about functions")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
#: Names in GGUF files of the modules of a layer.
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _permuted(weight: Tensor, heads: int) -> Tensor:
    """Return a weight of queries or keys with its rows in llama.cpp's order for rotary positions."""
    return weight.view(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    kind: str = "Q4_1",
    architecture: str = "llama",
    layers: int | None = None,
) -> LlamaForCausalLM:
    """Write a random Llama with matrices of the type `kind`; return it with the weights of the file, dequantised.

    `architecture` and `layers` (the number that the header claims) may be wrong, for files that must be refused.
    """
    import gguf

    tokenizer = byte_tokenizer(WORDS, size=320, begin=False)
    # transformers adds the first one to a tokenizer of this kind that lacks it.
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]})
    model: Any = seeded(LlamaForCausalLM, LlamaConfig(**CONFIG, vocab_size=len(tokenizer)))
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(CONFIG["num_hidden_layers"] if layers is None else layers)
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(tokenizer))
    ids = range(len(tokenizer))
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    special = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(list(ids)))
    writer.add_token_types([3 if i in special else 1 for i in ids])
    writer.add_token_merges([" ".join(pair) for pair in _merges(tokenizer)])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(ends)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(ends)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(TEMPLATE)
    with torch.no_grad():
        for name, tensor in list(model.named_parameters()):
            key, permuted = _key(name), tensor
            if key.endswith(("attn_q.weight", "attn_k.weight")):
                heads = CONFIG["num_attention_heads" if "attn_q" in key else "num_key_value_heads"]
                permuted = _permuted(tensor, heads)
            values = permuted.numpy()
            used = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else gguf.GGMLQuantizationType[kind]
            packed = gguf.quantize(values, used)
            writer.add_tensor(key, packed, raw_dtype=used)
            read = torch.from_numpy(np.array(gguf.dequantize(packed, used)))
            if permuted is not tensor:  # back into transformers' order
                read = read.view(heads, len(read) // heads // 2, 2, -1).swapaxes(1, 2).reshape(read.shape)
            tensor.copy_(read)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _key(name: str) -> str:
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in top:
        return top[name]
    _, _, layer, module = name.split(".", 3)
    return f"blk.{layer}.{NAMES[module.removesuffix('.weight')]}.weight"


def _merges(tokenizer: Any) -> list[list[str]]:
    merges: list[list[str]] = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return merges
