"""Presets and baselines against the numbers and placements of their papers."""

from __future__ import annotations

from random import Random

import pytest

from autopeft.search_space import BASELINES, PRESETS, Backbone, SearchSpace
from autopeft.search_space.spaces.presets import MOLA, everywhere, linears, log2_sizes
from autopeft.testing.spaces import encoder

LLAMA_LINEARS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
GPT2_LINEARS = ("attn.qkv", "attn.o", "mlp.up", "mlp.down")
FAMILIES = {
    "bert": encoder(num_layers=2),
    "llama": encoder(num_layers=2, linears=LLAMA_LINEARS, bias=False),
    "gpt2": encoder(num_layers=2, linears=GPT2_LINEARS),
}


def space_of(preset: str, backbone: Backbone) -> SearchSpace:
    return SearchSpace(backbone=backbone, **PRESETS[preset].space(backbone))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_space_over_every_family(preset: str, family: str) -> None:
    backbone = FAMILIES[family]
    space = space_of(preset, backbone)
    rng = Random(0)
    for assignment in (space.smallest(), space.largest(), *(space.sample(rng) for _ in range(20))):
        architecture = space.decode(assignment).architecture
        for site, spec in architecture:
            assert backbone.site(site).role in spec.roles
            assert spec.fits(backbone.site(site))
    assert space.decode(space.largest()).architecture
    assert PRESETS[preset].summary
    assert PRESETS[preset].source


@pytest.mark.parametrize(("num_layers", "hidden_size", "points"), [(12, 768, 5_451_776), (24, 1024, 22_330_474_496)])
def test_the_space_of_autopeft_has_the_published_number_of_points(
    num_layers: int, hidden_size: int, points: int
) -> None:
    backbone = encoder(num_layers=num_layers, hidden_size=hidden_size, inner_size=4 * hidden_size)
    space = space_of("autopeft", backbone)
    assert space.cardinality == points == 11**3 * 2**num_layers


def test_sizes_of_autopeft() -> None:
    assert log2_sizes(768) == (0, 1, 3, 6, 12, 24, 48, 96, 192, 384, 768)
    assert log2_sizes(1024) == (0, *(2**k for k in range(1, 11)))
    assert log2_sizes(384) == (0, 1, 3, 6, 12, 24, 48, 96, 192, 384)
    assert log2_sizes(1) == (0, 1)


def test_placement_of_autopeft() -> None:
    space = space_of("autopeft", encoder())
    off = {f"layers.{i}.on": i in (0, 11) for i in range(12)}
    on = {f"{name}.on": True for name in ("serial.size", "parallel.size", "prefix.length")}
    sizes = {"serial.size": 24, "parallel.size": 96, "prefix.length": 3}
    assignment = space.complete({**off, **on, **sizes}, lambda gene: 1 / 0)
    adapters = dict(space.decode(assignment).architecture.adapters)
    assert adapters.keys() == {f"layers.{i}.{role}" for i in (0, 11) for role in ("attn", "mlp")}
    assert {spec.kind: spec.size for spec in adapters["layers.0.attn"]} == {"prefix": 3}
    assert {(spec.form, spec.size) for spec in adapters["layers.11.mlp"]} == {("serial", 24), ("parallel", 96)}


def test_lora_per_layer_has_a_rank_for_each_half_of_each_layer() -> None:
    space = space_of("lora-per-layer", encoder())
    assert space.cardinality == 7 ** (2 * 12)
    assert not space.decode(space.smallest()).architecture
    on = {"attn.rank.on.layers.3": True, "attn.rank.layers.3": 32}
    assignment = space.complete(on, lambda gene: False)
    assert [site for site, _ in space.decode(assignment).architecture.adapters] == [
        f"layers.3.attn.{part}" for part in ("k", "o", "q", "v")
    ]


def test_mam_has_the_published_placement() -> None:
    """He et al. 2022, section 4.6: prefix of 30 at attention, scaled parallel adapter of 512 beside the mlp."""
    space = space_of("mam", encoder())
    adapters = dict(space.decode({"prefix.length": 30, "parallel.size": 512}).architecture.adapters)
    assert space.contains({"prefix.length": 30, "parallel.size": 512})
    assert adapters.keys() == {f"layers.{i}.{role}" for i in range(12) for role in ("attn", "mlp")}
    (prefix,), (parallel,) = adapters["layers.4.attn"], adapters["layers.4.mlp"]
    assert (prefix.kind, prefix.length) == ("prefix", 30)
    assert (parallel.form, parallel.size, parallel.scale, parallel.init) == ("parallel", 512, 4.0, "zero")


def test_llm_adapters_have_the_published_placements() -> None:
    """Hu et al. 2023: series and parallel adapters of 256 at the mlp; LoRA of rank 32 on q, k, v, up and down."""
    space = space_of("llm-adapters", encoder(num_layers=1, linears=LLAMA_LINEARS, bias=False))
    published = [
        ({"type": "series", "series.size": 256}, ["mlp"]),
        ({"type": "parallel", "parallel.size": 256}, ["mlp"]),
        ({"type": "lora", "lora.rank": 32, "lora.alpha": 64.0}, ["attn.k", "attn.q", "attn.v", "mlp.down", "mlp.up"]),
    ]
    for assignment, roles in published:
        assert space.contains(assignment)
        architecture = space.decode(assignment).architecture
        assert [site for site, _ in architecture.adapters] == [f"layers.0.{role}" for role in roles]
    assert space.cardinality == 6 + 6 + 4 * 3
    fused = space_of("llm-adapters", encoder(num_layers=1, linears=GPT2_LINEARS))
    sites = {site for site, _ in fused.decode(published[2][0]).architecture}
    assert sites == {"layers.0.attn.qkv", "layers.0.mlp.up", "layers.0.mlp.down"}


@pytest.mark.parametrize(
    ("name", "num_params"),
    [
        ("head", 0),
        ("lora-r8-qv", 294_912),
        ("lora-all-linear", 12 * (4 * 8 * (768 + 768) + 2 * 8 * (768 + 3072))),
        ("houlsby", 12 * 2 * (2 * 64 * 768 + 64 + 768) + 25 * 2 * 768),  # with the norm of the embeddings
        ("ia3", 12 * (768 + 768 + 3072)),
        ("bitfit", 12 * (4 * 768 + 3072 + 768 + 2 * 768) + 768),
        ("full", 108_310_272),
    ],
)
def test_baselines_on_bert_base(name: str, num_params: int) -> None:
    assert BASELINES[name](encoder()).num_params(encoder()) == num_params


def test_baselines_on_a_fused_projection() -> None:
    architecture = BASELINES["lora-r8-qv"](FAMILIES["gpt2"])
    assert [site for site, _ in architecture] == ["layers.0.attn.qkv", "layers.1.attn.qkv"]
    assert not BASELINES["bitfit"](FAMILIES["llama"]), "there is no bias to train"
    assert {spec.kind for _, spec in BASELINES["ia3"](FAMILIES["gpt2"])} == {"ia3"}


@pytest.mark.parametrize("name", sorted(set(BASELINES) - {"head", "houlsby", *MOLA}))
def test_every_baseline_is_one_spec_everywhere(name: str) -> None:
    architecture = BASELINES[name](FAMILIES["bert"])
    assert len({spec for _, spec in architecture}) == 1
    (spec,) = {spec for _, spec in architecture}
    roles = tuple({FAMILIES["bert"].site(site).role for site, _ in architecture})
    assert everywhere(FAMILIES["bert"], spec, roles) == architecture


def test_mola_has_its_experts_in_the_quarters_of_any_depth() -> None:
    found = {name: BASELINES[name](encoder()) for name in MOLA}
    for name, experts in MOLA.items():
        by_layer = {encoder().site(site).layer: spec.num_experts for site, spec in found[name]}
        assert [by_layer[layer] for layer in range(12)] == [count for count in experts for _ in range(3)]
        assert {site.role for site in map(encoder().site, dict(found[name].adapters))} == set(linears(encoder()))
        declared = PRESETS[name].space(FAMILIES["bert"])  # of two layers
        assert [choice.fields["experts"] for choice in declared["adapters"].values()] == [experts[0], experts[2]]
    # The same number of experts, and so of parameters, for all of them.
    assert len({architecture.num_params(encoder()) for architecture in found.values()}) == 1
