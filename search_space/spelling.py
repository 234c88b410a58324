"""Suggestions for misspelt names, for every error message that can offer one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

#: Longer lists of known names are left out of a message.
MAX_LISTED = 60

#: Names of peft, transformers and model families, and the setting or role in their place. A setting may have a value.
SYNONYMS = {
    # peft's configurations
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "scaling: rslora",
    "use_dora": "kind: dora",
    "init_lora_weights": "init",
    "target_modules": "at",
    "layers_to_transform": "layers",
    "rank_pattern": "vary",
    "alpha_pattern": "vary",
    "num_virtual_tokens": "length",
    # transformers' TrainingArguments, and the abbreviations of scripts
    "lr": "learning_rate",
    "wd": "weight_decay",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "lr_scheduler_type": "schedule",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "max_seq_length": "max_length",
    # modules of models
    "q_proj": "attn.q",
    "query": "attn.q",
    "q_lin": "attn.q",
    "k_proj": "attn.k",
    "key": "attn.k",
    "k_lin": "attn.k",
    "v_proj": "attn.v",
    "value": "attn.v",
    "v_lin": "attn.v",
    "c_attn": "attn.qkv",
    "qkv_proj": "attn.qkv",
    "query_key_value": "attn.qkv",
    "Wqkv": "attn.qkv",
    "o_proj": "attn.o",
    "out_proj": "attn.o",
    "out_lin": "attn.o",
    "gate_proj": "mlp.gate",
    "up_proj": "mlp.up",
    "c_fc": "mlp.up",
    "fc1": "mlp.up",
    "lin1": "mlp.up",
    "down_proj": "mlp.down",
    "fc2": "mlp.down",
    "lin2": "mlp.down",
    "embed_tokens": "embed",
    "wte": "embed",
    "lm_head": "head",
    "classifier": "head",
    "score": "head",
}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for a synonym or a close name, else the known names unless there are many."""
    names = sorted(known)
    synonym = _synonym(word)
    if synonym.partition(":")[0] in names:
        return f"; did you mean {synonym!r}?"
    swapped = [name for name in names if sorted(name) == sorted(word)]
    close = swapped or get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if 0 < len(names) <= MAX_LISTED else ""


def _synonym(word: str) -> str:
    """Return the word with its part after the last dot replaced by the synonym, or "" if it has none."""
    owner, dot, name = word.rpartition(".")
    return f"{owner}{dot}{SYNONYMS[name]}" if name in SYNONYMS else ""
