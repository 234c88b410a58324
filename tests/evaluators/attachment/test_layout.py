"""Which modules of a model read the examples of a batch one after the other, and nothing else."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    IBertConfig,
    IBertForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from autopeft.evaluators.attachment.layout import by_slot, tapped_input, unpackable_sites
from autopeft.evaluators.errors import ModelError
from autopeft.search_space.backbones.introspection import describe

from ...support.tiny_models import seeded

INPUTS = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 0, 0, 0]]),
    "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
}
ENCODER = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
}


def test_examples_come_first_in_most_models() -> None:
    for model in (
        seeded(BertForSequenceClassification, BertConfig(**ENCODER)),
        # Its mlp reads tokens without the dimension of the examples.
        seeded(OPTForSequenceClassification, OPTConfig(
            vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, ffn_dim=40,
            max_position_embeddings=32, word_embed_proj_dim=24, pad_token_id=0,
        )),
    ):  # fmt: skip
        assert unpackable_sites(model, describe(model, id="tiny"), INPUTS) == frozenset()
        assert not any(module._forward_hooks for module in model.modules())


def test_tokens_come_first_in_xlnet() -> None:
    """The parts of a pack would be cut out of the texts."""
    model = seeded(
        XLNetForSequenceClassification, XLNetConfig(vocab_size=40, d_model=24, n_layer=2, n_head=2, d_inner=40)
    )
    by_hand = {"layers": "transformer.layer", "mlp.up": "ff.layer_1", "mlp.down": "ff.layer_2"}
    backbone = describe(model, id="tiny", modules=by_hand)
    inside = {site.name for site in backbone.sites if site.layer is not None}
    assert unpackable_sites(model, backbone, INPUTS) == inside


def test_modules_that_return_tuples_are_refused() -> None:
    model = seeded(IBertForSequenceClassification, IBertConfig(**ENCODER))
    with pytest.raises(ModelError, match=r"(QuantLinear|IntLayerNorm) returns a tuple instead of a tensor"):
        unpackable_sites(model, describe(model, id="tiny"), INPUTS)


def test_a_tensor_that_is_not_made_of_slots_is_an_error() -> None:
    assert by_slot(torch.zeros(4, 3, 5), 2).shape == (2, 6, 5)
    assert by_slot(torch.zeros(12, 5), 2).shape == (2, 6, 5)
    assert by_slot(torch.zeros(1, 8, 5), 1).shape == (1, 8, 5)
    with pytest.raises(ValueError, match=r"shape \[1, 8, 5\].*2 candidates.*evaluator: train"):
        by_slot(torch.zeros(1, 8, 5), 2)


def test_the_input_of_a_sub_layer_fits_its_output() -> None:
    own, positions = torch.zeros(2, 3, 5), torch.ones(1, 8, 5)
    assert tapped_input([own, positions], torch.zeros(2, 3, 7)) is own
    assert tapped_input([own], torch.zeros(6, 7)) is own
    with pytest.raises(ValueError, match=r"\[1, 8, 5\], which does not fit its output \[2, 3, 7\]"):
        tapped_input([positions], torch.zeros(2, 3, 7))
