"""Tiny random models of many families of transformers, by the names of their classes, each built in milliseconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from autopeft.evaluators.backbones import LoadedBackbone
from autopeft.search_space.backbones.introspection import describe

from .tiny_models import seeded, word_tokenizer

VOCABULARY, LAYERS, POSITIONS = 40, 3, 64
_TEXT: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
_ENCODER = _TEXT | {
    "hidden_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 40,
    "max_position_embeddings": POSITIONS,
}  # fmt: skip
_DECODER = _ENCODER | {"num_attention_heads": 4, "num_key_value_heads": 2}
_OLD = _TEXT | {"n_embd": 24, "n_layer": LAYERS, "n_head": 2, "n_positions": POSITIONS}
_HEAD = {"head_dim": 8}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


@dataclass(frozen=True, kw_only=True)
class Family:
    """`modules`: its linear layers by hand, for families that are not recognised.

    `unshared`: part of the reason why its lower layers cannot be shared; empty if they can. `alone`: roles whose
    adapters cannot share a pack. `untaken`: adapter types that fit no site of it.
    """

    name: str
    config: dict[str, Any]
    config_class: str = ""
    task: str = "ForSequenceClassification"
    modules: dict[str, str] | None = None
    unshared: str = ""
    alone: tuple[str, ...] = ()
    untaken: tuple[str, ...] = ()

    @property
    def is_causal_lm(self) -> bool:
        return "CausalLM" in self.task or "LMHead" in self.task

    def model(self) -> Any:
        config = getattr(transformers, self.config_class or f"{self.name}Config")
        labels = {} if self.is_causal_lm else {"num_labels": 3}
        return seeded(getattr(transformers, self.name + self.task), config(**self.config, **labels))

    def loaded(self) -> LoadedBackbone:
        model = self.model()
        return LoadedBackbone(model, describe(model, id=self.name, modules=self.modules), word_tokenizer(), False)


def _of(shape: dict[str, Any], name: str, more: dict[str, Any]) -> Family:
    own = {key: value for key, value in more.items() if key in Family.__dataclass_fields__}
    return Family(name=name, config=shape | {key: value for key, value in more.items() if key not in own}, **own)


def _encoder(name: str, **more: Any) -> Family:
    return _of(_ENCODER, name, more)


def _decoder(name: str, **more: Any) -> Family:
    return _of(_DECODER, name, more)


#: Their attention does not run through transformers' attention interface.
_NO_PREFIX = ("prefix",)
_CAUSAL_LM = "ForCausalLM"

FAMILIES: tuple[Family, ...] = (
    *map(_encoder, ("Bert", "Roberta", "Electra", "Ernie", "Data2VecText", "LayoutLM", "RobertaPreLayerNorm")),
    _encoder("Esm", mask_token_id=1),
    _encoder("ModernBert", cls_token_id=2, sep_token_id=3, global_attn_every_n_layers=2, local_attention=8),
    Family(
        name="DistilBert",
        config=_TEXT | {"dim": 24, "n_layers": LAYERS, "n_heads": 2, "hidden_dim": 40},
    ),
    # Layers that return tuples.
    _encoder("RoFormer", untaken=_NO_PREFIX),
    _encoder("RemBert", input_embedding_size=16, output_embedding_size=24, untaken=_NO_PREFIX),
    _encoder("MPNet", untaken=_NO_PREFIX),
    _encoder("MegatronBert", untaken=_NO_PREFIX),
    _encoder("BigBird", untaken=_NO_PREFIX),
    # It projects the relative positions by the query and the key, once for all examples, and normalises them.
    _encoder(
        "DebertaV2",
        relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=4,
        max_relative_positions=8, norm_rel_ebd="layer_norm", conv_kernel_size=3,
        untaken=_NO_PREFIX, alone=("attn.q", "attn.k", "attn", "norm"),
    ),
    # Its attention approximates the one over all tokens, padding included.
    _encoder("Nystromformer", untaken=_NO_PREFIX, unshared="layer 1 reads more than the output of layer 0"),
    _encoder(
        "Albert",
        embedding_size=16,
        modules={
            "layers": "albert.encoder.albert_layer_groups.0.albert_layers",
            "attn.q": "attention.query", "attn.k": "attention.key", "attn.v": "attention.value",
            "attn.o": "attention.dense", "mlp.up": "ffn", "mlp.down": "ffn_output",
        },
        unshared="layer 0 runs 3 times in a pass",
    ),
    # Decoders of the older kind.
    Family(name="GPT2", config=_OLD),
    Family(name="GPTBigCode", config=_OLD),
    Family(name="GPTJ", config=_OLD | {"rotary_dim": 4}, untaken=_NO_PREFIX),
    Family(
        name="CodeGen",
        config=_OLD | {"n_embd": 32, "n_head": 4, "rotary_dim": 4},
        task=_CAUSAL_LM,
        untaken=_NO_PREFIX,
    ),
    Family(
        name="GPTNeo",
        config=_TEXT | {
            "hidden_size": 24, "num_layers": LAYERS, "num_heads": 2, "intermediate_size": 40, "window_size": 4,
            "max_position_embeddings": POSITIONS, "attention_types": [[["global", "local"], 1], [["global"], 1]],
        },
        untaken=_NO_PREFIX,
    ),
    _encoder("GPTNeoX"),
    Family(name="Bloom", config=_TEXT | {"hidden_size": 24, "n_layer": LAYERS, "n_head": 2}, untaken=_NO_PREFIX),
    _decoder("Falcon", alibi=False, untaken=_NO_PREFIX),
    _decoder("Falcon", alibi=True, untaken=_NO_PREFIX),
    Family(
        name="Mpt",
        config=_TEXT | {"d_model": 24, "n_layers": LAYERS, "n_heads": 2, "max_seq_len": POSITIONS},
        untaken=_NO_PREFIX,
    ),
    Family(
        name="OPT",
        config=_TEXT | {
            "hidden_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "ffn_dim": 40,
            "max_position_embeddings": POSITIONS, "word_embed_proj_dim": 24,
        },
    ),
    _encoder("BioGpt", task=_CAUSAL_LM),
    Family(
        name="XGLM",
        config=_TEXT | {
            "d_model": 24, "num_layers": LAYERS, "attention_heads": 2, "ffn_dim": 40,
            "max_position_embeddings": POSITIONS,
        },
        task=_CAUSAL_LM,
        untaken=_NO_PREFIX,
    ),
    # Decoders of the newer kind.
    *map(_decoder, ("Llama", "Mistral", "Qwen2", "Phi3", "StableLm", "Starcoder2", "Olmo", "Nemotron", "SmolLM3")),
    _encoder("Phi", hidden_size=32),
    _decoder("Qwen3", **_HEAD),
    _decoder("Gemma", **_HEAD),
    _decoder("Gemma2", **_HEAD, sliding_window=4),
    _decoder("Gemma3", config_class="Gemma3TextConfig", **_HEAD, sliding_window=4, task=_CAUSAL_LM),
    *(_decoder(name, task=_CAUSAL_LM) for name in ("Granite", "Olmo2", "Arcee", "Apertus", "BitNet")),
    _decoder("Cohere", task=_CAUSAL_LM, untaken=("norm",)),
    *(_decoder(name, task=_CAUSAL_LM, **_HEAD) for name in ("Glm4", "SeedOss", "HunYuanDenseV1")),
    # Experts in stacked weights: the sites are those of the attention.
    _decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    _decoder("Qwen2Moe", num_experts=4, shared_expert_intermediate_size=16, **_EXPERTS),
    _decoder("Qwen3Moe", num_experts=4, **_EXPERTS, **_HEAD),
    _decoder("Olmoe", num_experts=4, num_experts_per_tok=2, task=_CAUSAL_LM),
    _decoder("GraniteMoe", num_local_experts=4, num_experts_per_tok=2, task=_CAUSAL_LM),
    _decoder("GptOss", num_local_experts=4, num_experts_per_tok=2, **_HEAD, task=_CAUSAL_LM),
)  # fmt: skip


def _name(family: Family) -> str:
    return family.name + ("-alibi" if family.config.get("alibi") else "")


NAMES = tuple(map(_name, FAMILIES))


def earlier_tokens_only(model: Any) -> bool:
    """Whether the hidden states of a text, but for its last token, are the same with another last token."""
    text = torch.randint(4, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0))
    other = text.clone()
    other[0, -1] = 4 + (int(text[0, -1]) - 3) % (VOCABULARY - 4)
    with torch.no_grad():
        states = [model.base_model(input_ids=ids).last_hidden_state[:, :-1] for ids in (text, other)]
    return torch.allclose(*states, atol=1e-6)
