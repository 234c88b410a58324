"""Architectures and candidates: keys and declared costs. Backbones: the way through JSON."""

from __future__ import annotations

import json
from dataclasses import fields
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.search_space import AdapterSpec, Architecture, Backbone, Candidate
from autopeft.search_space.adapters import ADAPTERS, Bitfit, Bottleneck, Lora, Norm, Prefix
from autopeft.search_space.architecture import canonical_json, digest
from autopeft.search_space.backbones.backbone import ROLES
from autopeft.search_space.declaration import AdapterChoice, fields_of
from autopeft.search_space.spelling import SYNONYMS, did_you_mean
from autopeft.search_space.training import Training
from autopeft.testing.spaces import SMALL, encoder

specs = st.one_of(
    st.builds(Lora, rank=st.integers(1, 4), alpha=st.sampled_from((8, 16.0, 0.1))),
    st.builds(Bottleneck, size=st.integers(1, 4), scale=st.sampled_from((1, 1.0, 4.0))),
    st.builds(Prefix, length=st.integers(1, 3)),
)
placements = st.dictionaries(st.sampled_from([site.name for site in SMALL.sites]), st.lists(specs, max_size=3))


@given(placements, st.integers(0, 99))
def test_order_does_not_count(placed: dict[str, list[AdapterSpec]], seed: int) -> None:
    rng, architecture = Random(seed), Architecture.of(placed)
    sites = list(placed)
    rng.shuffle(sites)
    shuffled = Architecture.of({site: rng.sample(placed[site], len(placed[site])) for site in sites})
    assert shuffled == architecture
    assert shuffled.key == architecture.key


@given(placements)
def test_json_keeps_everything(placed: dict[str, list[AdapterSpec]]) -> None:
    architecture = Architecture.of(placed)
    again = Architecture.from_dict(json.loads(json.dumps(architecture.to_dict())))
    assert again == architecture
    assert again.key == architecture.key
    candidate = Candidate(architecture=architecture, training={"learning_rate": 0.000123457, "batch_size": 16})
    again_candidate = Candidate.from_dict(json.loads(json.dumps(candidate.to_dict())))
    assert again_candidate == candidate
    assert again_candidate.key == candidate.key != architecture.key


@given(placements, placements)
def test_keys_are_equal_where_architectures_are(
    one: dict[str, list[AdapterSpec]], other: dict[str, list[AdapterSpec]]
) -> None:
    a, b = Architecture.of(one), Architecture.of(other)
    assert (a == b) == (a.key == b.key)


def test_a_number_has_one_key() -> None:
    site = "layers.0.attn.q"
    assert Architecture.of({site: [Lora(alpha=16)]}).key == Architecture.of({site: [Lora(alpha=16.0)]}).key
    assert Architecture.of({site: [Lora(alpha=16)]}).key != Architecture.of({site: [Lora(alpha=16.5)]}).key
    candidates = [Candidate(architecture=Architecture(), training={"epochs": n}) for n in (2, 2.0)]
    assert candidates[0].key == candidates[1].key
    assert canonical_json({"b": [1.0, (2.5,)], "a": True}) == '{"a":true,"b":[1,[2.5]]}'
    assert digest({}) != digest([])
    assert len(digest({})) == 16


def test_sites_without_adapters_do_not_appear() -> None:
    assert Architecture.of({"layers.0.mlp": []}) == Architecture()
    assert Architecture.from_dict({"layers.0.mlp": []}).key == Architecture().key
    assert not Architecture()
    assert not Architecture().kinds
    assert Architecture().num_params(SMALL) == Architecture().stored_bytes(SMALL) == 0


def test_declared_costs_add_up() -> None:
    lora, bottleneck = Lora(rank=2), Bottleneck(size=3)
    architecture = Architecture.of({"layers.1.attn.q": [lora, Bitfit()], "layers.2.mlp": [bottleneck]})
    both = {("layers.1.attn.q", Bitfit()), ("layers.1.attn.q", lora)}
    assert len(list(architecture)) == 3
    assert set(architecture) == {*both, ("layers.2.mlp", bottleneck)}
    num_params = 2 * (16 + 16) + 16 + (3 * 16 + 3 + 16 * 3 + 16)
    assert architecture.num_params(SMALL) == num_params
    assert architecture.stored_bytes(SMALL) == 4 * num_params
    assert architecture.flops_per_token(SMALL) == 2 * 2 * (16 + 16) + 2 * 3 * (16 + 16)
    assert architecture.kinds == ("bitfit", "bottleneck", "lora")
    assert not architecture.mergeable
    assert Architecture.of({"layers.1.attn.q": [lora]}).mergeable


def test_the_lowest_layer() -> None:
    assert Architecture().lowest_layer(SMALL) == 3
    assert Architecture.of({"layers.2.mlp": [Bottleneck()], "layers.1.attn": [Prefix()]}).lowest_layer(SMALL) == 1
    assert Architecture.of({"norm.embed": [Norm()], "layers.2.mlp": [Bottleneck()]}).lowest_layer(SMALL) == 0


def test_a_site_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"'encoder' has no site 'layers.0.atn'; did you mean 'layers.0.attn'\?"):
        Architecture.of({"layers.0.atn": [Prefix()]}).num_params(SMALL)
    with pytest.raises(ValueError, match=r"has no site 'zzz'; known: backbone, embed, "):
        SMALL.site("zzz")


@pytest.mark.parametrize("backbone", [SMALL, encoder(num_layers=1, bias=False)], ids=["small", "plain"])
def test_a_backbone_survives_json(backbone: Backbone) -> None:
    again = Backbone.from_dict(json.loads(json.dumps(backbone.to_dict())))
    assert again == backbone
    assert hash(again) == hash(backbone)
    assert all(again.site(site.name) == site for site in backbone.sites)
    assert "_site_by_name" not in backbone.to_dict()
    assert "_site_by_name" not in repr(backbone)


def test_suggestions() -> None:
    assert did_you_mean("rnak", ["rank", "alpha"]) == "; did you mean 'rank'?"
    assert did_you_mean("zzz", ["rank", "alpha"]) == "; known: alpha, rank"
    assert did_you_mean("zzz", (str(i) for i in range(100))) == ""
    assert did_you_mean("zzz", []) == ""


@pytest.mark.parametrize(
    ("word", "known", "suggested"),
    [
        ("r", ["rank", "router"], "rank"),
        ("lora_dropout", ["rank", "dropout"], "dropout"),
        ("use_rslora", ["scaling"], "scaling: rslora"),
        ("value", ROLES, "attn.v"),
        ("fc2", ROLES, "mlp.down"),
        ("per_device_train_batch_size", ["batch_size", "epochs"], "batch_size"),
        ("training.lr", ["training.learning_rate", "lora.rank"], "training.learning_rate"),
        ("layers.1.q_proj", ["layers.0.attn.q", "layers.1.attn.q"], "layers.1.attn.q"),
    ],
)
def test_names_of_other_libraries(word: str, known: list[str], suggested: str) -> None:
    assert did_you_mean(word, known) == f"; did you mean {suggested!r}?"


def test_only_known_names_are_suggested() -> None:
    assert did_you_mean("r", ["size", "dropout"]) == "; known: dropout, size"
    assert did_you_mean("use_rslora", ["size"]) == "; known: size"
    assert did_you_mean("q_proj", ["attn.qkv"]) == "; known: attn.qkv"


def test_synonyms_are_names_of_this_library() -> None:
    declared = [*(f.name for f in fields(AdapterChoice)), *(f.name for f in fields(Training)), *ROLES, "max_length"]
    known = {*declared, *(name for kind in ADAPTERS for name in fields_of(kind))}
    for foreign, own in SYNONYMS.items():
        assert foreign not in known
        setting, _, value = own.partition(": ")
        assert setting in known
        if setting == "scaling":
            assert Lora(scaling=value).scaling == value
        elif value:
            assert (setting, value in ADAPTERS) == ("kind", True)
