"""One router for the sites of a layer."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from random import Random

import pytest
import torch
from torch import Tensor

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.search_space import AdapterChoice, Architecture, Candidate, Choice, Float, SearchSpace, SpaceError
from autopeft.search_space.adapters import (
    Lora,
    Mixture,
    spec_from_dict,
)
from autopeft.search_space.spaces.controls import controls
from autopeft.search_space.spaces.location import locate
from autopeft.testing.models import tiny, tokens

from ...support.mixtures import gates_in, load_moved, shared_router
from ...support.spaces import SMALL

torch.set_num_threads(1)


def test_the_sites_of_a_layer_share_a_router() -> None:
    declared = shared_router()
    candidate = declared.decode(declared.sample(Random(0)))
    routers = {site: spec.router for site, spec in candidate.architecture}  # type: ignore[attr-defined]
    leading = [site for site, router in routers.items() if router != "follow"]
    assert sorted(leading) == ["layers.0.attn.q", "layers.1.attn.q"]
    assert locate(declared, candidate) is not None
    assert declared.decode(locate(declared, candidate)).key == candidate.key  # type: ignore[arg-type]
    assert spec_from_dict(next(iter(candidate.architecture))[1].to_dict()).kind == "mixture"


def test_a_site_that_follows_has_the_gates_of_the_one_before() -> None:
    """At query and value, which read the same, as if each had the same router."""
    model, backbone = tiny("bert")
    lead = Mixture(expert=Lora(rank=2), experts=4)
    smaller = Mixture(expert=Lora(rank=1), experts=2, top_k=1)
    names = [f"layers.{layer}.attn.{part}" for layer in range(2) for part in "qv"]

    def led_by(spec: Mixture) -> Architecture:
        leaders = {name: f"{name[:-1]}q" for name in names}
        follow = {n: replace(spec, router="follow", leader=leaders[n]).canonical() for n in names}
        return Architecture.of({name: [spec if name.endswith("q") else follow[name]] for name in names})

    own = Architecture.of({name: [lead] for name in names})
    # Another mixture of the layer runs in between.
    between = {f"layers.{layer}.attn.k": [Mixture(expert=Lora(rank=1), experts=3)] for layer in range(2)}
    led, beside = led_by(lead), Architecture.of({**dict(led_by(smaller).adapters), **between})
    ids = tokens()
    with Attachment(model, backbone, [own], [1]) as attachment:
        attachment.eval()
        generator = torch.Generator().manual_seed(4)
        state = {name: v + torch.randn(v.shape, generator=generator) for name, v in attachment.state().items()}
        for layer in range(2):
            state[f"layers.{layer}.attn.v/mixture/router"] = state[f"layers.{layer}.attn.q/mixture/router"]
        attachment.load_state(state)
        expected = model(ids, attention_mask=torch.ones_like(ids)).logits
    with Attachment(model, backbone, [beside, led], [0, 1]) as attachment:
        attachment.eval()
        attachment.load_state({n: v for n, v in state.items() if n in attachment.state(1)}, 1)
        found = model(ids.repeat(2, 1), attention_mask=torch.ones_like(ids).repeat(2, 1)).logits[3:]
        assert not any("attn.v/mixture/router" in name for name in attachment.state(1))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("beside", "leading"),
    [
        (AdapterChoice(kind="ssf", at=("attn.q",), fields={"experts": 2}), ["token"]),
        (AdapterChoice(kind="lora", at=("attn.q", "attn.v"), fields={"experts": 4, "router": "sigmoid"}), ["token"]),
        (
            AdapterChoice(
                kind="lora", at=("attn.q", "attn.v"), fields={"experts": 4, "router": "sigmoid"}, router_per="layer"
            ),
            ["sigmoid", "token"],
        ),
    ],
)
def test_a_site_follows_the_mixture_of_its_own_declaration(
    beside: AdapterChoice, leading: list[str], first: bool
) -> None:
    """Of several at the site of the leader."""
    model, backbone = tiny("bert")
    own = AdapterChoice(kind="lora", at=("attn.q", "attn.v"), fields={"experts": 4}, router_per="layer")
    adapters = {"own": own, "beside": beside} if first else {"beside": beside, "own": own}
    declared = SearchSpace(backbone=backbone, adapters=adapters)
    architecture = declared.decode({}).architecture
    assert Architecture.from_dict(architecture.to_dict()) == architecture
    assert locate(declared, Candidate(architecture=architecture)) == {}

    found, here = gates_in(model, backbone, architecture), dict(architecture.adapters)
    for layer in range(2):
        at, followed = f"layers.{layer}.attn.q", []
        for spec in here[f"layers.{layer}.attn.v"]:
            if isinstance(spec, Mixture) and spec.leader:
                site, number = spec.leader.split("#")
                leader = here[site][int(number) - 1]
                assert isinstance(leader, Mixture)
                assert site == at
                assert leader.expert == spec.expert
                assert torch.equal(found[f"layers.{layer}.attn.v", spec], found[at, leader])
                followed.append(leader.router)
        assert sorted(followed) == leading
    before = json.loads(re.sub(r"#\d", "", json.dumps(architecture.to_dict())))
    gates_in(model, backbone, Architecture.from_dict(before))  # recipes without numbers load
    single = SearchSpace(backbone=backbone, adapters={"own": own}).decode({}).architecture
    assert {spec.to_dict()["leader"] for _, spec in single} == {"", "layers.0.attn.q", "layers.1.attn.q"}

    def logits(*architectures: Architecture) -> Tensor:
        with Attachment(model, backbone, architectures, [0] * len(architectures)) as attachment:
            attachment.eval()
            for k in range(len(architectures)):
                load_moved(attachment, k)
            return model(tokens().repeat(len(architectures), 1)).logits

    torch.testing.assert_close(logits(single, architecture), torch.cat([logits(single), logits(architecture)]))


def test_a_layer_without_a_router_has_nobody_to_follow() -> None:
    model, backbone = tiny("bert")
    fields = {"experts": 3, "router": Choice.of(["token", "uniform"])}
    choice = AdapterChoice(kind="lora", fields=fields, router_per="layer", vary={"router": "layer"})
    declared = SearchSpace(backbone=backbone, adapters={"lora": choice})
    for routers in (["token", "uniform"], ["uniform", "token"], ["uniform", "uniform"]):
        genes = {f"lora.router.layers.{layer}": router for layer, router in enumerate(routers)}
        candidate = declared.decode(genes)
        assert locate(declared, candidate) == genes
        gates_in(model, backbone, candidate.architecture)
    alike = AdapterChoice(kind="lora", fields={**fields, "router": "uniform"})
    assert SearchSpace(backbone=backbone, adapters={"lora": alike}).decode({}) == candidate
    assert "average" not in controls(candidate.architecture, backbone)


@pytest.mark.parametrize("kind", ["bitfit", "ssf"])
@pytest.mark.parametrize(("family", "leader"), [("bert", "attn.q"), ("gpt2", "norm.0"), ("llama", "attn.q")])
def test_the_site_that_runs_first_leads(kind: str, family: str, leader: str) -> None:
    """Of linears and norms: those of GPT-2 run ahead of the attention, those of BERT after it."""
    model, backbone = tiny(family)
    choice = AdapterChoice(kind=kind, fields={"experts": 3}, router_per="layer")
    if kind == "bitfit" and family == "llama":  # which has no biases
        return
    architecture = SearchSpace(backbone=backbone, adapters={"it": choice}).decode({}).architecture
    found = gates_in(model, backbone, architecture)
    assert len(found) == sum(1 for _ in architecture)
    leading = [name for name, spec in architecture if isinstance(spec, Mixture) and not spec.leader]
    assert leading == [*(f"layers.{layer}.{leader}" for layer in range(2)), *leading[2:]]
    assert all(backbone.site(name).layer is None for name in leading[2:])


def test_nobody_to_follow() -> None:
    model, backbone = tiny("bert")
    alone_ = Architecture.of({"layers.0.attn.q": [Mixture(router="follow")]})
    with Attachment(model, backbone, [alone_], [0]), pytest.raises(ValueError, match="has not run before it"):
        model(tokens())


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"fields": {"experts": 2}, "placement": "site"}, "on together"),
        ({"fields": {"experts": 4, "top_k": Choice.of([1, 2])}, "vary": {"top_k": "site"}}, "on together"),
        ({"fields": {"experts": Choice.of([2, 4])}, "vary": {"experts": "site"}}, "on together"),
        (
            {"fields": {"experts": 2, "router": Choice.of(["token", "sigmoid"])}, "vary": {"router": "site"}},
            "cannot vary per site",
        ),
        (
            {"fields": {"experts": 2, "balance": Float(low=0.0, high=0.1)}, "vary": {"balance": "site"}},
            "cannot vary per site",
        ),
        ({"fields": {"experts": 2, "router": "soft"}}, "has separate parameters for each site"),
        ({"kind": "bitfit", "fields": {"experts": 2}, "at": ("attn.q", "norm")}, "cannot tell whether the norms"),
        ({"fields": {}}, "set the number of experts"),
    ],
)
def test_what_cannot_share_a_router(choice, message) -> None:
    with pytest.raises(SpaceError, match=message):
        SearchSpace(backbone=SMALL, adapters={"it": AdapterChoice(**{"kind": "lora", "router_per": "layer", **choice})})
