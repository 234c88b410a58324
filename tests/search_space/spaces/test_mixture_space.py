"""Mixtures in a space: experts as a choice, and candidates that are found again."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch

from autopeft.search_space import AdapterChoice, Architecture, Candidate, Choice, Float, SearchSpace, SpaceError
from autopeft.search_space.adapters import (
    Lora,
    Mixture,
)
from autopeft.search_space.problem import declared_costs
from autopeft.search_space.spaces.location import locate
from autopeft.searchers.bo.encoding import Encoding

from ...support.mixtures import shared_router, space
from ...support.spaces import SMALL

torch.set_num_threads(1)


def test_experts_are_a_choice_of_each_layer_and_none_is_a_plain_adapter() -> None:
    declared = space()
    names = [gene.name for gene in declared.genes]
    assert "lora.experts.on.layers.0" in names
    assert "lora.experts.layers.0" in names
    off = {name: False for name in names if ".experts.on" in name}
    plain = declared.decode(declared.completed(off)).architecture
    assert {spec.kind for _, spec in plain} == {"lora"}
    assert not any("top_k" in name for name in declared.completed(off))
    some = declared.completed({**off, "lora.experts.on.layers.0": True, "lora.experts.layers.0": 4, "lora.top_k": 4})
    kinds = dict(declared.decode(some).architecture)
    for site, spec in kinds.items():
        expected = 4 if SMALL.site(site).layer == 0 else 0
        assert spec.num_experts == expected


def test_candidates_are_found_again_and_equal_networks_have_equal_keys() -> None:
    declared, rng = space(), Random(0)
    for _ in range(50):
        genes = declared.sample(rng)
        candidate = declared.decode(genes)
        found = locate(declared, candidate)
        assert found is not None
        assert declared.decode(found).key == candidate.key
        assert Candidate.from_dict(candidate.to_dict()) == candidate
        unit, _ = declared.encode(genes)
        assert declared.decode(declared.from_unit(unit)).key == candidate.key
    # Two experts cannot give four: the second and the fourth top_k are one network.
    two = {gene.name: 2 for gene in declared.genes if gene.name.startswith("lora.experts.layers")}
    on = {gene.name: True for gene in declared.genes if ".experts.on" in gene.name}
    one, other = (declared.decode(declared.completed({**two, **on, "lora.top_k": k})) for k in (4, 4))
    assert one.key == other.key
    assert all(spec.top_k == 2 for _, spec in one.architecture)  # type: ignore[attr-defined]


def test_the_largest_has_the_most_experts_and_the_smallest_none() -> None:
    declared = space()
    assert all(spec.num_experts == 4 for _, spec in declared.decode(declared.largest()).architecture)
    assert all(spec.num_experts == 0 for _, spec in declared.decode(declared.smallest()).architecture)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router": "dice"}, "router must be one of"),
        ({"router": "task"}, "needs the number of tasks"),
        ({"router": "soft", "shared_experts": 1}, "router 'soft' does not support shared_experts"),
        ({"experts": Choice.of([0])}, "0 is the only size"),
    ],
)
def test_what_a_space_says_of_bad_mixtures(fields, message) -> None:
    with pytest.raises(SpaceError, match=message):
        space(**fields)


def test_fields_of_mixtures_need_experts() -> None:
    with pytest.raises(SpaceError, match="set the number of experts"):
        SearchSpace(backbone=SMALL, adapters={"lora": AdapterChoice(kind="lora", fields={"top_k": 2})})
    with pytest.raises(SpaceError, match="unknown field of prefix"):
        SearchSpace(backbone=SMALL, adapters={"p": AdapterChoice(kind="prefix", fields={"experts": 2})})


def test_costs_of_a_space_with_experts_by_its_encoding() -> None:
    for declared in (space(), shared_router()):
        encoding = Encoding(declared)
        rng = Random(1)
        genes = [declared.sample(rng) for _ in range(40)]
        rows, active = (np.array(column) for column in zip(*(declared.encode(own) for own in genes), strict=True))
        found = encoding.costs(rows, active)
        for n, own in enumerate(genes):
            expected = declared_costs(declared.decode(own).architecture, declared.backbone)
            assert {name: found[name][n] for name in expected} == expected


def test_candidates_whose_fields_say_the_same_in_several_ways_are_found() -> None:
    top_k = Choice.of([1, 2, 4])
    spaces = [
        space(experts=Choice.of([2, 4]), top_k=top_k),
        SearchSpace(
            backbone=SMALL,
            adapters={
                "lora": AdapterChoice(
                    kind="lora",
                    fields={
                        "experts": 2,
                        "router": Choice.of(["token", "uniform"]),
                        "balance": Float(low=0.001, high=0.1, log=True),
                    },
                    vary={"router": "layer"},
                )
            },
        ),
    ]
    for declared in spaces:
        rng = Random(3)
        for _ in range(100):
            candidate = declared.decode(declared.sample(rng))
            found = locate(declared, candidate)
            assert found is not None
            assert declared.decode(found).architecture == candidate.architecture
    eight = Architecture.of({"layers.0.attn.q": [Mixture(expert=Lora(rank=1), experts=8)]})
    assert locate(space(), Candidate(architecture=eight)) is None


def test_heads_have_to_divide_the_features() -> None:
    with pytest.raises(SpaceError, match="5 does not divide the features"):
        space(router="poly", tasks=2, heads=5)
