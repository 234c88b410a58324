"""The search space: declarations, their genes, and what an assignment of them means."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autopeft.search_space import AdapterChoice, Choice, Float, Int, OneOf, SearchSpace, SpaceError
from autopeft.search_space.adapters import Lora
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.declaration import OFF
from autopeft.search_space.spaces.genes import Assignment
from autopeft.search_space.spaces.location import locate
from autopeft.searchers.enumerated import _points
from autopeft.testing.spaces import SMALL, encoder

from ...support.spaces import spaces

seeds = st.integers(0, 999)
many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def exact(data: Any) -> str:
    """Equal for equal values of equal types alone: floats to the bit, 16 apart from 16.0."""
    return json.dumps(data)


# Properties of every declaration


@many
@given(spaces(), seeds)
def test_samples_are_contained_and_encode_exactly(space: SearchSpace, seed: int) -> None:
    assignment = space.sample(Random(seed))
    assert space.contains(assignment)
    assert space.sample(Random(seed)) == assignment
    unit, mask = space.encode(assignment)
    assert len(unit) == len(mask) == len(space.genes)
    assert all(0.0 <= u <= 1.0 for u in unit)
    assert [gene.name for gene, active in zip(space.genes, mask, strict=True) if active] == list(assignment)
    assert exact(space.from_unit(unit)) == exact(assignment)


@many
@given(spaces(), seeds)
def test_any_point_of_the_cube_is_an_assignment_and_inactive_genes_never_matter(space: SearchSpace, seed: int) -> None:
    rng = Random(seed)
    point = [rng.random() for _ in space.genes]
    assignment = space.from_unit(point)
    assert space.contains(assignment)
    _, mask = space.encode(assignment)
    elsewhere = [u if active else rng.random() for u, active in zip(point, mask, strict=True)]
    assert exact(space.from_unit(elsewhere)) == exact(assignment)


@many
@given(spaces(), seeds)
def test_an_inactive_gene_or_a_missing_one_is_not_contained(space: SearchSpace, seed: int) -> None:
    assignment = space.sample(Random(seed))
    for gene in space.genes:
        if gene.name in assignment:
            rest = {name: value for name, value in assignment.items() if name != gene.name}
            assert not space.contains(rest)
            assert not space.contains({**assignment, gene.name: None})
        else:
            assert not space.contains({**assignment, gene.name: gene.domain.from_unit(0.5)})
    assert not space.contains({**assignment, "no.such.gene": 1})


@many
@given(spaces(), seeds)
def test_decoding_depends_on_the_values_alone(space: SearchSpace, seed: int) -> None:
    assignment = space.sample(Random(seed))
    candidate = space.decode(assignment)
    names = list(assignment)
    Random(seed).shuffle(names)
    shuffled = {name: assignment[name] for name in names}
    stored = json.loads(json.dumps(assignment))
    for same in (assignment, shuffled, stored):
        assert space.contains(same)
        assert space.decode(same) == candidate
        assert space.decode(same).key == candidate.key
    for site, spec in candidate.architecture:
        assert SMALL.site(site).role in spec.roles
    assert candidate.training.keys() == space.training.keys()


@many
@given(spaces(), seeds)
def test_neighbours_are_contained_and_differ_in_one_gene(space: SearchSpace, seed: int) -> None:
    assignment = space.sample(Random(seed))
    neighbours = list(space.neighbours(assignment))
    changed = set()
    for other in neighbours:
        assert space.contains(other)
        (name,) = [n for n in assignment if n in other and other[n] != assignment[n]]
        changed.add(name)
    assert changed == {gene.name for gene in space.genes if gene.name in assignment and gene.domain.cardinality != 1}
    assert len({exact(sorted(other.items())) for other in neighbours}) == len(neighbours)


@many
@given(spaces(), seeds)
def test_no_network_is_smaller_than_the_smallest_or_larger_than_the_largest(space: SearchSpace, seed: int) -> None:
    def num_params(assignment: Assignment) -> int:
        return space.decode(assignment).architecture.num_params(SMALL)

    smallest, largest = space.smallest(), space.largest()
    assert space.contains(smallest)
    assert space.contains(largest)
    assert num_params(smallest) <= num_params(space.sample(Random(seed))) <= num_params(largest)


@many
@given(spaces(), seeds)
def test_one_member_of_a_group_is_chosen_in_every_scope(space: SearchSpace, seed: int) -> None:
    assignment = space.sample(Random(seed))
    for group in space.one_of:
        genes = [gene for gene in space.genes if gene.name.split(".")[0] == group.name]
        assert genes
        for gene in genes:
            assert isinstance(gene.domain, Choice)
            assert (OFF in gene.domain.choices) == group.optional
            for member in set(gene.domain.choices) - {OFF}:
                # It is chosen and nothing else stands in its way: then it is there.
                alone = space.complete({gene.name: member}, lambda g: g.domain.from_unit(1.0))
                chosen = {name for name, value in alone.items() if value == member}
                assert gene.name in chosen
                kind = space.adapters[str(member)].kind
                assert kind in {spec.plain.kind for _, spec in space.decode(alone).architecture}
    names = [gene.name for gene in space.genes]
    assert len(set(names)) == len(names)
    assert {g.size for g in space.genes} - {None} <= set(names)
    assert assignment.keys() <= set(names)


@settings(max_examples=60, deadline=None)
@given(spaces())
def test_a_declaration_gives_the_same_genes_again(space: SearchSpace) -> None:
    again = SearchSpace(
        backbone=space.backbone,
        adapters=space.adapters,
        one_of=space.one_of,
        layer_gate=space.layer_gate,
        stages=space.stages,
        training=space.training,
    )
    assert again.genes == space.genes


@settings(max_examples=100, deadline=None)
@given(spaces(), st.integers(0, 2**32))
def test_a_candidate_is_found_again_in_its_space(space: SearchSpace, seed: int) -> None:
    candidate = space.decode(space.sample(Random(seed)))
    found = locate(space, candidate)
    assert found is not None
    assert space.contains(found)
    assert space.decode(found) == candidate


@settings(max_examples=60, deadline=None)
@given(spaces(), spaces(), st.integers(0, 2**32))
def test_a_candidate_of_another_space_is_the_same_one_or_none(one: SearchSpace, other: SearchSpace, seed: int) -> None:
    candidate = one.decode(one.sample(Random(seed)))
    found = locate(other, candidate)
    assert found is None or other.decode(found).architecture == candidate.architecture


# Equal networks have equal keys


def lora(**fields: Any) -> AdapterChoice:
    place = {key: fields.pop(key) for key in ("at", "layers", "placement", "vary") if key in fields}
    return AdapterChoice(kind="lora", fields=fields, **place)


def space_of(adapters: dict[str, AdapterChoice], **more: Any) -> SearchSpace:
    return SearchSpace(backbone=SMALL, adapters=adapters, **more)


def names(space: SearchSpace) -> list[str]:
    return [gene.name for gene in space.genes]


def test_a_layer_off_by_its_gate_equals_one_off_by_its_size() -> None:
    space = space_of({"a": lora(rank=Choice.of([0, 4]), vary={"rank": "layer"}, at=("attn.q",))}, layer_gate=True)
    on = {"layers.0.on": True, "layers.1.on": True, "a.rank.on.layers.0": True, "a.rank.layers.0": 4}
    by_size = {**on, "layers.2.on": True, "a.rank.on.layers.1": True, "a.rank.layers.1": 4, "a.rank.on.layers.2": False}
    by_gate = {**on, "layers.2.on": False, "a.rank.on.layers.1": True, "a.rank.layers.1": 4}
    assert space.contains(by_size)
    assert space.contains(by_gate)
    assert space.decode(by_size).key == space.decode(by_gate).key
    assert [site for site, _ in space.decode(by_gate).architecture.adapters] == ["layers.0.attn.q", "layers.1.attn.q"]


def test_a_size_per_site_equals_the_same_size_per_model() -> None:
    rank = Choice.of([2, 4])
    one = space_of({"a": lora(rank=rank, alpha=16)})
    each = space_of({"b": lora(rank=rank, alpha=16.0, vary={"rank": "site"})})
    everywhere = dict.fromkeys(names(each), 4)
    assert len(everywhere) == 6
    assert one.decode({"a.rank": 4}).key == each.decode(everywhere).key


def test_the_order_of_the_declaration_does_not_count() -> None:
    adapters = {
        "a": lora(rank=2, at=("attn.q",)),
        "b": lora(rank=4, at=("attn.q",)),
        "c": AdapterChoice(kind="bitfit", at=("attn.q",)),
    }
    orders = [space_of(dict(order)) for order in itertools.permutations(adapters.items())]
    assert len({space.decode({}).key for space in orders}) == 1
    assert len(orders[0].decode({}).architecture.adapters[0][1]) == 3


# Genes by granularity


@pytest.mark.parametrize(
    ("granularity", "suffixes"),
    [
        ("model", [""]),
        ("stage", [".stages.0", ".stages.1"]),
        ("layer", [".layers.0", ".layers.1", ".layers.2"]),
        ("site", [f".layers.{i}.attn.{r}" for i in range(3) for r in "qv"]),
    ],
)
def test_granularity(granularity: Any, suffixes: list[str]) -> None:
    choice = lora(rank=Choice.of([0, 2, 4]), placement=granularity, vary={"rank": granularity})
    space = space_of({"a": choice}, stages=2)
    genes = names(space)
    assert genes == [f"a.{key}{suffix}" for key in ("on", "rank.on", "rank") for suffix in suffixes]
    group = space_of({"a": lora(rank=2), "b": lora(rank=4)}, one_of=[OneOf(name="t", members=("a", "b"),
                                                                         per=granularity)], stages=2)  # fmt: skip
    assert names(group) == [f"t{suffix}" for suffix in suffixes]


def test_each_expert_has_a_gene_for_its_rank() -> None:
    """The shared ones first; the first one's is that of plain adapters, too."""
    rank = Choice.of([1, 2, 4])

    def own(experts: Any, shared: Any = 0, per: Any = "model") -> SearchSpace:
        vary = {"rank": "expert", "experts": per} if isinstance(experts, (Choice, Int)) else {"rank": "expert"}
        return space_of({"a": lora(rank=rank, experts=experts, shared_experts=shared, vary=vary)})

    def ranks(space: SearchSpace, **genes: Any) -> set[str]:
        """The genes of ranks that are active."""
        return {name for name in space.completed(genes) if name.startswith("a.rank")}

    first, second, third, fourth = (f"a.rank.experts.{e}" for e in range(4))
    assert names(own(2, shared=1)) == [first, second, third]
    assert names(own(Choice.of([0, 1, 3]))) == ["a.experts.on", "a.experts", first, second, third]
    several = own(Choice.of([0, 1, 3]))
    assert ranks(several, **{"a.experts.on": False}) == {first}
    assert ranks(several, **{"a.experts.on": True, "a.experts": 1}) == {first}
    assert ranks(several, **{"a.experts.on": True, "a.experts": 3}) == {first, second, third}
    shared = own(Int(low=1, high=2), shared=Choice.of([0, 2]))
    assert ranks(shared, **{"a.shared_experts": 0, "a.experts": 1}) == {third}
    assert ranks(shared, **{"a.shared_experts": 2, "a.experts": 2}) == {first, second, third, fourth}
    layers = own(Choice.of([0, 1, 2]), per="layer")
    for counts in itertools.product((0, 1, 2), repeat=3):
        genes: Assignment = {f"a.experts.on.layers.{layer}": count > 0 for layer, count in enumerate(counts)}
        genes |= {f"a.experts.layers.{layer}": count for layer, count in enumerate(counts) if count}
        assert ranks(layers, **genes) == {first, *([second] if 2 in counts else [])}
        point = layers.completed({**genes, first: 4, second: 1})
        for site, spec in layers.decode(point).architecture:
            count = counts[SMALL.site(site).layer or 0]
            assert (spec.num_experts, spec.num_experts_total, spec.size) == (count, max(1, count), 4)
            assert getattr(spec, "ranks", ()) == ((4, 1) if count == 2 else ())


@many
@given(spaces(), seeds)
def test_the_rank_of_an_expert_matters_where_it_is_active(space: SearchSpace, seed: int) -> None:
    assignment = space.sample(Random(seed))
    for gene in space.genes:
        if ".rank.experts." in gene.name and gene.name in assignment:
            for other in gene.domain.neighbours(assignment[gene.name]):
                assert space.decode({**assignment, gene.name: other}) != space.decode(assignment)


def test_stages_are_equal_groups_of_layers() -> None:
    choice = lora(rank=2, placement="stage", at=("attn.q",))
    space = SearchSpace(backbone=encoder(), adapters={"a": choice})
    assert space.stages == 4
    (first, *_) = names(space)
    assignment = {name: name == first for name in names(space)}
    sites = [site for site, _ in space.decode(assignment).architecture.adapters]
    assert sites == ["layers.0.attn.q", "layers.1.attn.q", "layers.2.attn.q"]
    assert space_of({"a": choice}).stages == 3, "a model of three layers has three stages unless told otherwise"


def test_sites_outside_the_layers_have_genes_of_their_own() -> None:
    norm = AdapterChoice(kind="norm", placement="layer")
    space = space_of({"a": norm}, layer_gate=True)
    assert set(names(space)) == {f"{gate}.{i}{on}" for gate, on in (("layers", ".on"), ("a.on.layers", ""))
                                 for i in range(3)} | {"a.on.norm.embed"}  # fmt: skip
    off = space.complete({f"layers.{i}.on": False for i in range(3)}, lambda gene: True)
    assert off["a.on.norm.embed"] is True
    assert [site for site, _ in space.decode(off).architecture] == ["norm.embed"]


def test_the_genes_of_an_absent_adapter_are_inactive() -> None:
    alpha = Float(low=1, high=64)
    space = space_of(
        {"a": lora(rank=Choice.of([0, 4]), alpha=alpha), "b": lora(rank=2, alpha=alpha), "c": lora(alpha=alpha)},
        one_of=[OneOf(name="t", members=("a", "b"), optional=True)],
    )
    assert names(space) == ["t", "a.rank.on", "a.rank", "a.alpha", "b.alpha", "c.alpha"]
    assert space.contains({"t": "off", "c.alpha": 2.0})
    assert space.contains({"t": "b", "b.alpha": 1.0, "c.alpha": 2.0})
    assert space.contains({"t": "a", "a.rank.on": False, "c.alpha": 2.0})
    assert not space.contains({"t": "a", "a.rank.on": False, "a.alpha": 2.0, "c.alpha": 2.0})


def test_a_type_is_chosen_among_those_that_have_a_site_there() -> None:
    space = space_of(
        {"linear": lora(rank=2, at=("attn.q",)), "beside": AdapterChoice(kind="bottleneck", at=("mlp",), layers=(0,))},
        one_of=[OneOf(name="t", members=("linear", "beside"), per="layer")],
    )
    domains = {gene.name: gene.domain for gene in space.genes}
    both, alone = Choice(choices=("linear", "beside")), Choice(choices=("linear",))
    assert domains == {"t.layers.0": both, "t.layers.1": alone, "t.layers.2": alone}
    for assignment in _points(space):
        assert len({SMALL.site(site).layer for site, _ in space.decode(assignment).architecture}) == 3


def test_names_of_groups_and_adapters_may_begin_alike() -> None:
    space = space_of(
        {"t": lora(rank=Choice.of([0, 2]), vary={"rank": "layer"}), "u": lora(rank=4)},
        one_of=[OneOf(name="t", members=("t", "u"), per="layer"), OneOf(name="t-", members=("u",))],
    )
    domains = {gene.name: gene.domain for gene in space.genes}
    assert domains["t.rank.on.layers.0"].cardinality == 2
    assert domains["t.layers.0"] == Choice(choices=("t", "u"))
    assert "t-" not in domains, "a member belongs to the first group that names it"


def test_completing_keeps_what_is_given() -> None:
    space = space_of({"a": lora(rank=Choice.of([0, 2, 4]), placement="model")})
    assert space.complete({"a.on": False, "a.rank": 4}, lambda gene: gene.domain.from_unit(0.9)) == {"a.on": False}
    assert space.complete({"a.rank": 2}, lambda gene: gene.domain.from_unit(0.9))["a.rank"] == 2


def test_locating_a_candidate() -> None:
    """What is told apart, what falls outside, and what the training must have."""
    rate = Float(low=1e-4, high=1e-2, log=True)
    space = space_of(
        {"a": lora(rank=Choice.of([0, 2, 4]), at=("attn.q",), vary={"rank": "layer"}),
         "b": lora(rank=Choice.of([4, 8]), at=("attn.q",), placement="model")},
        layer_gate=True,
        training={"learning_rate": rate, "epochs": 2.0},
    )  # fmt: skip

    def find(*ranks: int, **training: Any) -> Assignment | None:
        """LoRA of these ranks at the query of each layer."""
        sites = {f"layers.{i}.attn.q": [Lora(rank=rank) for rank in ranks] for i in range(3)}
        return locate(space, Candidate(architecture=Architecture.of(sites), training=training))

    both = find(2, 8)
    assert both is not None
    assert (both["b.on"], both["b.rank"], both["a.rank.layers.2"]) == (True, 8, 2)
    assert find(4, 4) is not None
    assert find(8) is not None
    assert find(2, 2) is None
    assert find(16) is None
    assert find(2, 4, 8) is None
    nothing = find()
    assert nothing is not None
    assert nothing["layers.0.on"] is False, "what nothing needs is off"
    middle, given_, outside = find(2), find(2, learning_rate=1e-2, epochs=5.0), find(2, learning_rate=1.0)
    assert middle is not None
    assert middle["training.learning_rate"] == rate.from_unit(0.5)
    assert given_ is not None
    assert given_["training.learning_rate"] == 1e-2
    assert outside is None
    elsewhere = Architecture.of({"layers.7.attn.q": [Lora(rank=2)]})
    assert locate(space, Candidate(architecture=elsewhere)) is None


# Extremes


def test_the_smallest_network_has_no_adapters_where_it_can() -> None:
    for adapters in ({"a": lora(rank=Choice.of([4, 0]))}, {"a": lora(rank=4, placement="site")}):
        space = space_of(adapters)
        assert not space.decode(space.smallest()).architecture
    space = space_of(
        {"big": lora(rank=9), "small": lora(rank=1), "mid": lora(rank=3)},
        one_of=[OneOf(name="t", members=("big", "small", "mid"), per="site")],
    )
    assert set(space.smallest().values()) == {"small"}
    assert set(space.largest().values()) == {"big"}


# Cardinality: what it counts


CARDINALITIES = [
    # A size with 0 and its "is it on" are one choice, so this is the number of distinct networks.
    (dict(adapters={"a": lora(rank=Choice.of([0, 2, 4]))}), 3),
    (dict(adapters={"a": lora(rank=Int(low=0, high=4), vary={"rank": "layer"})}), 5**3),
    (dict(adapters={"a": lora(rank=Choice.of([0, 2]), vary={"rank": "site"}, layers=(0, 2))}), 2**4),
    (dict(adapters={"a": lora(rank=2, placement="site")}), 2**6),
    (dict(adapters={"a": lora(rank=2), "b": lora(rank=4)}, one_of=[OneOf(name="t", members=("a", "b"), per="layer",
                                                                        optional=True)]), 3**3),
    # Types of the whole model are added up, each with its own genes.
    (
        dict(
            adapters={"a": lora(rank=Choice.of([2, 4, 8])), "b": lora(rank=Choice.of([0, 2])), "c": lora(rank=1),
                      "d": lora(rank=Choice.of([2, 3]))},
            one_of=[OneOf(name="t", members=("a", "b", "c"), optional=True)],
        ),
        (3 + 2 + 1 + 1) * 2,
    ),
    (dict(adapters={"a": lora(rank=2)}), 1),
]  # fmt: skip


@pytest.mark.parametrize(("declaration", "cardinality"), CARDINALITIES)
def test_cardinality_is_the_number_of_assignments(declaration: dict[str, Any], cardinality: int) -> None:
    training = {"learning_rate": Choice.of([1e-3, 1e-2]), "weight_decay": Float(low=0, high=1)}
    space = space_of(**declaration)
    assert space.cardinality == cardinality == len(list(_points(space)))
    assert space_of(**declaration, training=training).cardinality == cardinality, "the training is apart"


def test_cardinality_counts_genes_that_do_not_matter() -> None:
    rank, scaling = Choice.of([0, 2, 4]), Choice(choices=("alpha", "rslora"))
    space = space_of({"a": lora(rank=rank, scaling=scaling)}, layer_gate=True)
    assert space.cardinality == 2**3 * 3 * 2
    # All layers off; or some on, and then: off by size, or one of two sizes and two rules.
    assert len(list(_points(space))) == 1 + 7 * (1 + 2 * 2)


def test_cardinality_of_a_continuous_space() -> None:
    assert space_of({"a": lora(rank=Choice.of([2, 4]), alpha=Float(low=1, high=2))}).cardinality is None
    assert space_of({"a": lora(rank=Int(low=1, high=64, log=True))}).cardinality == 64


# Problems


def problems(adapters: dict[str, AdapterChoice], backbone=SMALL, **more: Any) -> list[tuple[str, str]]:
    with pytest.raises(SpaceError) as caught:
        SearchSpace(backbone=backbone, adapters=adapters, **more)
    for path, what in caught.value.problems:
        assert f"{'.'.join(path)}: {what}" in str(caught.value)
    return [(".".join(path), what) for path, what in caught.value.problems]


def per_expert(**fields: Any) -> AdapterChoice:
    return lora(**{"rank": SIZES, "experts": 2, **fields}, vary={"rank": "expert"})


SIZES = Choice.of([1, 2, 4])
a, b = lora(rank=2), lora(rank=4)
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"adapters": {}}, "adapters", "the space is empty"),
    ({"adapters": {"a": AdapterChoice(kind="lroa")}}, "adapters.a.kind", "unknown adapter 'lroa'; did you mean 'lora'"),
    ({"adapters": {"a": AdapterChoice(kind="qzx")}}, "adapters.a.kind", "unknown adapter 'qzx'; known: adapterbias"),
    ({"adapters": {"a.b": a}}, "adapters.a.b", "a name may contain only letters"),
    ({"adapters": {"a": lora(at=("mlp",))}}, "adapters.a.at",
     "lora cannot be attached at 'mlp'; did you mean 'mlp.up'"),
    ({"adapters": {"a": lora(at=("mlp.gate",))}}, "adapters.a.at",
     "this model has no site with role 'mlp.gate'; it has attn, "),
    ({"adapters": {"a": lora(at=("attn.q",), layers=(0, 3))}}, "adapters.a.layers", "no layer 3: the model has layers"),
    ({"adapters": {"a": lora(layers=())}}, "adapters.a.layers", "these layers have no site with role attn.q or attn.v"),
    ({"adapters": {"a": AdapterChoice(kind="full", layers=(1,))}}, "adapters.a.layers",
     "these layers have no site with role backbone"),
    ({"adapters": {"a": lora(rnak=2)}}, "adapters.a.rnak", "unknown field of lora; did you mean 'rank'?"),
    ({"adapters": {"a": lora(r=2)}}, "adapters.a.r", "unknown field of lora; did you mean 'rank'?"),
    ({"adapters": {"a": lora(target_modules="all")}}, "adapters.a.target_modules", "did you mean 'at'?"),
    ({"adapters": {"a": lora(layers_to_transform=1)}}, "adapters.a.layers_to_transform", "did you mean 'layers'?"),
    ({"adapters": {"a": lora(at=("query",))}}, "adapters.a.at",
     "lora cannot be attached at 'query'; did you mean 'attn.q'?"),
    ({"adapters": {"a": lora(rank=0)}}, "adapters.a.rank", "0 is the only size"),
    ({"adapters": {"a": lora(rank=Choice.of([0]))}}, "adapters.a.rank", "0 is the only size"),
    ({"adapters": {"a": lora(rank=Int(low=0, high=0))}}, "adapters.a.rank", "0 is the only size"),
    ({"adapters": {"a": lora(rank=Choice.of([-2, 0, 4]))}}, "adapters.a.rank", "rank must be at least 1, got -2"),
    ({"adapters": {"a": lora(rank=Float(low=1, high=8))}}, "adapters.a.rank",
     "must be a whole number, got a range from 1.0 to 8.0"),
    ({"adapters": {"a": lora(rank=True)}}, "adapters.a.rank", "must be a whole number, got True"),
    ({"adapters": {"a": lora(alpha="16")}}, "adapters.a.alpha", "must be a number, got '16'"),
    ({"adapters": {"a": lora(scaling=1)}}, "adapters.a.scaling", "must be a word, got 1"),
    ({"adapters": {"a": lora(dropout=Float(low=0, high=1))}}, "adapters.a.dropout", "dropout must be in [0, 1), got 1"),
    ({"adapters": {"a": lora(init="zero")}}, "adapters.a.init", "init must be one of kaiming"),
    ({"adapters": {"a": lora(rank=2, vary={"rank": "layer"})}}, "adapters.a.vary.rank", "only a field with a list"),
    ({"adapters": {"a": lora(rank=Choice.of([1, 2]), vary={"rank": "layers"})}}, "adapters.a.vary.rank",
     "unknown granularity 'layers'; did you mean 'layer'?"),
    ({"adapters": {"a": per_expert(rank=2)}}, "adapters.a.vary.rank", "only a field with a list or a range of values"),
    ({"adapters": {"a": per_expert(experts=0)}}, "adapters.a.vary.rank",
     "set the number of experts, such as experts: 4"),
    ({"adapters": {"a": lora(rank=SIZES, vary={"rank": "expert"})}}, "adapters.a.vary.rank",
     "only mixtures of experts"),
    ({"adapters": {"a": per_expert(rank=Choice.of([0, 2]))}}, "adapters.a.vary.rank",
     "rank of an expert must be at least 1"),
    ({"adapters": {"a": per_expert(router=Choice(choices=("token", "poly")), tasks=2)}}, "adapters.a.vary.rank",
     "router 'poly' mixes the matrices of LoRAs"),
    ({"adapters": {"a": AdapterChoice(kind="lora", given=("x",), vary={"rank": "expert"},
                                      fields={"rank": SIZES, "experts": 1})}}, "adapters.a.vary.rank",
     "pretrained LoRAs (given) have fixed ranks"),
    ({"adapters": {"a": AdapterChoice(kind="dora", fields={"rank": SIZES, "experts": 2}, vary={"rank": "expert"})}},
     "adapters.a.vary.rank", "only the rank of a lora can vary per expert"),
    ({"adapters": {"a": lora(experts=SIZES, vary={"experts": "expert"})}}, "adapters.a.vary.experts",
     "only the rank of a lora can vary per expert"),
    ({"adapters": {"a": lora(rank=2, placement="expert")}}, "adapters.a.placement", "unknown granularity 'expert'"),
    ({"adapters": {"a": lora(placement="head")}}, "adapters.a.placement", "unknown granularity 'head'; known: layer, "),
    ({"adapters": {"a": a}, "one_of": [OneOf(name="t", members=("a", "bb"))]}, "one_of.t", "unknown adapter name 'bb'"),
    ({"adapters": {"a": a}, "one_of": [OneOf(name="t", members=())]}, "one_of.t", "a group needs at least one member"),
    ({"adapters": {"a": a}, "one_of": [OneOf(name="t.u", members=("a",))]}, "one_of.t.u", "a name may contain"),
    ({"adapters": {"a": a}, "one_of": [OneOf(name="t", members=("a",), per="head")]}, "one_of.t.per", "unknown granul"),
    ({"adapters": {"off": a}, "one_of": [OneOf(name="t", members=("off",), optional=True)]}, "one_of.t",
     "'off' means that no member is on"),
    ({"adapters": {"a": lora(placement="site"), "b": b}, "one_of": [OneOf(name="t", members=("a", "b"))]},
     "adapters.a.placement", "group 't' already decides"),
    ({"adapters": {"a": a}, "stages": 4}, "stages", "must be between 1 and 3, the number of layers"),
    ({"adapters": {"a": a}, "stages": 0}, "stages", "must be between 1 and 3, the number of layers"),
    ({"adapters": {"a": a}, "training": {"learning_rte": 1.0}}, "training.learning_rte", "did you mean 'learning_rate"),
    ({"adapters": {"a": a}, "training": {"learning_rate": Float(low=-1, high=1)}}, "training.learning_rate",
     "must be positive, got -1"),
    ({"adapters": {"a": AdapterChoice(kind="dora", placement="site"), "b": AdapterChoice(kind="hira", at=("attn.q",)),
                   "c": a}}, "adapters.b", "may be on at layers.0.attn.q together with 'a', and only one of them"),
    ({"adapters": {"a": a}, "training": {"batch_size": 1.5}}, "training.batch_size", "must be a whole number"),
    ({"adapters": {"a": a}, "training": {"schedule": "cosin"}}, "training.schedule", "must be one of linear, cosine"),
]  # fmt: skip


@pytest.mark.parametrize(("declaration", "path", "what"), WRONG, ids=[f"{path}-{what}" for _, path, what in WRONG])
def test_one_problem(declaration: dict[str, Any], path: str, what: str) -> None:
    ((found_path, found),) = problems(**declaration)
    assert found_path == path
    assert what in found


def test_adapters_that_read_a_weight_may_take_turns_at_it() -> None:
    dora, hira = AdapterChoice(kind="dora"), AdapterChoice(kind="hira")
    space_of({"a": dora, "b": hira}, one_of=[OneOf(name="t", members=("a", "b"), per="site")])
    space_of({"a": replace(dora, at=("attn.q",)), "b": replace(hira, at=("attn.v",))})
    space_of({"a": replace(dora, layers=(0,)), "b": replace(hira, layers=(1, 2))})
    space_of({"a": dora, "b": replace(dora, fields={"experts": 2})})


def test_a_field_without_effect_makes_no_other_candidate() -> None:
    """Trained factors of FLoRA are not drawn from a key."""
    fields = {"factors": Choice.of(["trained", "frozen"]), "factors_key": Choice.of([0, 1])}
    space = space_of({"a": AdapterChoice(kind="flora", fields=fields)})
    assert len({space.decode(point).architecture for point in _points(space)}) == 3
    for point in _points(space):
        found = locate(space, space.decode(point))
        assert found is not None
        assert space.decode(space.completed(found)) == space.decode(point)


def test_two_groups_of_one_name() -> None:
    groups = [OneOf(name="t", members=("a",)), OneOf(name="t", members=("b",))]
    assert problems({"a": a, "b": b}, one_of=groups) == [("one_of.t", "two groups have this name: rename one")] * 2


def test_a_type_that_nothing_of_the_model_can_take() -> None:
    bare = encoder(num_layers=2, bias=False)
    bitfit = AdapterChoice(kind="bitfit")
    assert problems({"a": bitfit}, bare)[0] == (
        "adapters.a.at",
        "bitfit fits no site with role attn.q or attn.k or attn.v or attn.qkv or attn.o or mlp.gate or mlp.up or"
        " mlp.down or norm of this model: it needs modules with a bias; leave it out",
    )
    chosen = AdapterChoice(kind="bitfit", at=("attn.q",), layers=(1,))
    what = "bitfit fits no site with role attn.q of this model: it needs modules with a bias; leave it out"
    assert problems({"a": chosen}, bare) == [("adapters.a.at", what)]
    fused = encoder(num_layers=2, linears=("attn.qkv",))
    assert problems({"a": lora()}, fused) == [
        (
            "adapters.a.at",
            "this model has no site with role 'attn.q' or 'attn.v'; it has attn, attn.qkv, backbone, embed, mlp, norm"
            " (its query, key and value are one linear: use attn.qkv)",
        )
    ]


def test_a_type_that_other_sites_of_the_model_can_take() -> None:
    model = encoder(num_layers=2, bias=False)
    biased = [replace(site, bias=site.role == "mlp.up") for site in model.sites]
    found = problems({"a": AdapterChoice(kind="bitfit", at=("attn.q",))}, replace(model, sites=tuple(biased)))
    what = "bitfit fits no site with role attn.q of this model: it needs modules with a bias; set at to [mlp.up]"
    assert found == [("adapters.a.at", what)]


@pytest.mark.parametrize(
    ("kind", "change", "needs"),
    [
        ("prefix", {"attention_interface": False}, "attention by transformers' attention interface"),
        ("norm", {"known_norm": False}, "norms that are a LayerNorm or an RMSNorm"),
    ],
)
def test_a_type_that_a_family_cannot_take(kind: str, change: dict[str, Any], needs: str) -> None:
    """Families without transformers' attention interface (BLOOM), and with norms of their own (Cohere)."""
    model = encoder(num_layers=2)
    model = replace(model, sites=tuple(replace(site, **change) for site in model.sites))
    ((where, what),) = problems({"a": AdapterChoice(kind=kind)}, model)
    assert where == "adapters.a.at"
    assert needs in what
    assert what.endswith("leave it out")


def test_all_problems_come_at_once() -> None:
    adapters = {
        "a": lora(rnak=2, rank=0, alpha="x", at=("mlp", "mlp.gate"), layers=(7, -1), vary={"rnak": "layer"}),
        "b": AdapterChoice(kind="lorra"),
        "c": lora(rank=2, placement="layer"),
    }
    groups = [OneOf(name="t", members=("c", "cc"))]
    training = {"epoch": 1, "warmup": 2.0, "epochs": 0.0}
    found = problems(adapters, one_of=groups, stages=9, training=training)
    assert [path for path, _ in found] == [
        "stages", "adapters.a.at", "adapters.a.at", "adapters.a.layers", "adapters.a.layers", "adapters.a.rnak",
        "adapters.a.rank", "adapters.a.alpha", "adapters.a.vary.rnak", "adapters.b.kind", "adapters.c.placement",
        "one_of.t", "training.epoch", "training.warmup", "training.epochs",
    ]  # fmt: skip
