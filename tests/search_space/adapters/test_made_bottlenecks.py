"""Bottlenecks whose weights are made of other tensors: slow references, counts, and what sites share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.attachment.shared_weights import SharedWeights
from autopeft.search_space.adapters import (
    AdapterSpec,
    BiAdaptFormer,
    Compacter,
    Hyperformer,
    Mixture,
    Polyhistor,
    VlPet,
)
from autopeft.search_space.adapters.biadaptformer import binary
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import Backbone, Site
from autopeft.search_space.declaration import AdapterChoice
from autopeft.search_space.domains import Choice
from autopeft.search_space.runtime.bank import Bank
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.studies.config.loading import load_study
from autopeft.testing.models import tiny, tokens

from ...studies.engine.test_study import run
from ...support.tiny_study import save_study

torch.set_num_threads(1)

SITE = Site(
    name="layers.0.mlp",
    layer=0,
    role="mlp",
    module="down",
    input_module="up",
    in_features=8,
    out_features=12,
    bias=True,
)
ACTIVATIONS = {"relu": torch.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "none": lambda h: h}
SHARING = (Compacter(size=2), Hyperformer(size=3, embedding=4), Polyhistor(size=2, rank=2, embedding=3))


def reference(spec: Any, v: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The output for one token, of the values of one slot."""
    weights = {
        "biadaptformer": of_bits,
        "compacter": of_products,
        "hyperformer": of_a_network,
        "polyhistor": of_templates,
    }[spec.kind]
    down, down_bias, up, up_bias = weights(v)
    z = y if spec.form == "serial" else x
    change = up @ ACTIVATIONS[spec.activation](down @ z + down_bias) + up_bias
    if spec.kind == "hyperformer":
        i = the_input(v)
        change = F.layer_norm(change, change.shape) * (v["gain"] @ i) + v["shift"] @ i
    return y + spec.scale * change


def of_products(v: dict[str, Tensor]) -> tuple[Tensor, ...]:
    (a,) = (value for name, value in v.items() if name.startswith("A"))
    down = sum(torch.kron(a[i], v["down_s"][i] @ v["down_t"][i]) for i in range(len(a)))
    up = sum(torch.kron(a[i], v["up_s"][i] @ v["up_t"][i]) for i in range(len(a)))
    return down, v["down_bias"].flatten(), up, v["up_bias"]


def the_input(v: dict[str, Tensor]) -> Tensor:
    made = v["V"] @ torch.relu(v["U"] @ v["e"] + v["b"]) + v["c"]
    return (made - made.mean()) / (made.var(correction=0) + 1e-5).sqrt()


def of_a_network(v: dict[str, Tensor]) -> tuple[Tensor, ...]:
    i = the_input(v)
    return v["down"] @ i, v["down_bias"] @ i, v["up"] @ i, v["up_bias"] @ i


def of_templates(v: dict[str, Tensor]) -> tuple[Tensor, ...]:
    down = torch.kron(v["down_kernel"], (v["down_P"] @ v["e"]) @ (v["down_Q"] @ v["e"]))
    up = torch.kron(v["up_kernel"], (v["up_P"] @ v["e"]) @ (v["up_Q"] @ v["e"]))
    return down, v["down_bias"].flatten(), up, v["up_bias"]


def of_bits(v: dict[str, Tensor]) -> tuple[Tensor, ...]:
    down = torch.stack([one_unit(latent) for latent in v["down"]])
    up = torch.stack([one_unit(latent) for latent in v["up"].T], 1)
    return down, torch.zeros(len(down)).to(down), up, torch.zeros(len(up)).to(up)


def one_unit(latent: Tensor) -> Tensor:
    mean, deviation = float(latent.mean()), float(latent.std())
    levels = [mean + deviation * (0.67448975 if value > mean else -0.67448975) for value in latent.tolist()]
    return torch.tensor(levels).to(latent)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("form", ["serial", "parallel"])
@pytest.mark.parametrize("spec", [*SHARING, BiAdaptFormer()], ids=lambda spec: spec.kind)
def test_slots_of_a_pack_and_of_a_supernet_are_the_formula(spec: Any, form: str, shared: bool) -> None:
    fields = {"form": form, "activation": "tanh"}
    settings: list[dict[str, Any]] = [{"size": 3, "scale": 0.5}, {"size": 1}, {"size": 5}]
    specs = [type(spec)(**fields, **own) for own in settings]
    bank = Bank(SITE, specs, nn.Linear(8, 12), [0, 1, 2], bank_of_slot=[0, 0, 0] if shared else None).double().eval()
    with torch.no_grad():
        for value in bank.values.values():
            value.add_(0.3 * torch.randn_like(value))
        x, y = torch.randn(3, 4, 8, dtype=torch.double), torch.randn(3, 4, 12, dtype=torch.double)
        found = bank(x, y)
        for k, own in enumerate(specs):
            for m in range(4):
                expected = reference(own, bank.of_slot(k), x[k, m], y[k, m])
                torch.testing.assert_close(found[k, m], expected, atol=1e-6, rtol=1e-6)


def everywhere(spec: AdapterSpec, backbone: Backbone) -> Architecture:
    return Architecture.of({site.name: [spec] for site in backbone.select(roles=["attn", "mlp"])})


@pytest.mark.parametrize("spec", SHARING, ids=lambda spec: spec.kind)
def test_what_sites_share_is_one_tensor_that_learns_from_all(spec: AdapterSpec) -> None:
    model, backbone = tiny("bert")
    architecture = everywhere(spec, backbone)
    with Attachment(model, backbone, [architecture], [1]) as attachment:
        banks = [bank for bank in attachment.banks if bank.site.role != "head"]
        assert len(banks) == 4
        names = [name for name, parameter in spec.parameters(banks[0].site).items() if parameter.scope == "model"]
        assert names
        for name in names:
            assert len({bank.values[name].data_ptr() for bank in banks}) == 1
        state = {name: value for name, value in attachment.state().items() if not name.startswith("head.")}
        assert {f"shared.model/{spec.kind}/{name}" for name in names} == {n for n in state if n.startswith("shared.")}
        count = sum(value.numel() for value in state.values())
        assert count == architecture.num_params(backbone) == attachment.num_adapter_params()
        assert architecture.stored_bytes(backbone) == 4 * count
        # The gradient of what is shared is the sum of those that the sites give.
        with torch.no_grad():
            for value, _ in attachment.trainable():
                value.add_(0.1 * torch.randn_like(value))
        attachment.eval()
        value = banks[0].values[names[-1]]
        together = []
        for bank in banks:
            bank.values[names[-1]] = nn.Parameter(value.detach().clone())
            together.append(bank.values[names[-1]])
        model(tokens()).logits.square().sum().backward()
        parts = [own.grad for own in together]
        assert all(part.abs().max() > 0 for part in parts)
        for bank in banks:
            bank.values[names[-1]] = value
        value.grad = None
        model(tokens()).logits.square().sum().backward()
        torch.testing.assert_close(value.grad, sum(parts))


@pytest.mark.parametrize("spec", SHARING, ids=lambda spec: spec.kind)
def test_a_supernet_serves_sizes_that_differ_by_site(spec: AdapterSpec) -> None:
    model, backbone = tiny("bert")
    choice = AdapterChoice(kind=spec.kind, fields={"size": Choice.of([0, 1, 3])}, vary={"size": "site"})
    space = SearchSpace(backbone=backbone, adapters={"a": choice})
    weights = SharedWeights(model, space, seed=0)
    with torch.no_grad():
        for value, _ in weights.trainable():
            value.add_(0.1 * torch.randn_like(value))
    for seed in range(3):
        architecture = space.decode(space.sample(Random(seed))).architecture
        with Attachment(model, backbone, [architecture], [0], shared=weights) as attachment:
            attachment.eval()
            state, expected = attachment.state(), model(tokens()).logits
        with Attachment(model, backbone, [architecture], [5]) as attachment:
            attachment.load_state(state)
            attachment.eval()
            torch.testing.assert_close(model(tokens()).logits, expected, atol=1e-5, rtol=1e-5)


def test_compacter_has_as_many_weights_as_the_paper_says() -> None:
    backbone = tiny("bert")[1]
    layers, d, n, size = 2, 24, 4, 2
    k = n * size  # units
    biases = k + d
    both = everywhere(Compacter(size=size), backbone)
    after_mlp = Architecture.of({site.name: [Compacter(size=size)] for site in backbone.select(roles=["mlp"])})
    assert both.num_params(backbone) == 4 * layers * (k + d) + n**3 + 2 * layers * biases
    assert after_mlp.num_params(backbone) == 2 * layers * (k + d) + n**3 + layers * biases
    assert Compacter(blocks=7).grid(backbone.site("layers.0.mlp")) == 6, "it divides 24 features"


def test_a_network_makes_other_weights_for_each_site() -> None:
    model, backbone = tiny("bert")
    for spec in (Hyperformer(size=3), Polyhistor(size=2)):
        with Attachment(model, backbone, [everywhere(spec, backbone)], [1]) as attachment:
            made = [spec.layers(bank.slots()).down for bank in attachment.banks if bank.site.role != "head"]
            assert not any(torch.equal(made[0], other) for other in made[1:])


# Gates


@pytest.mark.parametrize("granularity", ["feature", "token", "both"])
@pytest.mark.parametrize("form", ["serial", "parallel"])
def test_a_gate_multiplies_the_sub_layer_with_the_update(granularity: str, form: str) -> None:
    fields: dict[str, Any] = {"granularity": granularity, "form": form}
    specs = [VlPet(size=size, scale=scale, **fields) for size, scale in ((3, 0.5), (1, 1.0), (5, 2.0))]
    site = replace(SITE, in_features=12)
    bank = Bank(site, specs, nn.Linear(12, 12), [0, 1, 2], bank_of_slot=[0, 0, 0]).double().eval()
    x, y = torch.randn(2, 3, 4, 12, dtype=torch.double)
    torch.testing.assert_close(bank(x, y), y)
    with torch.no_grad():
        for value in bank.values.values():
            value.add_(0.3 * torch.randn_like(value))
        found = bank(x, y)
        for k, spec in enumerate(specs):
            v = bank.of_slot(k)
            for m in range(4):
                z = y[k, m] if form == "serial" else x[k, m]
                change = v["up"] @ F.gelu(v["down"] @ z + v["down_bias"]) + v["up_bias"]
                h = y[k, m] + spec.scale * change
                gate = {
                    "feature": lambda v=v: 1 + v["g"],
                    "token": lambda v=v, x=x[k, m], h=h: 2 * torch.sigmoid(v["w"] @ (x + h) + v["c"]),
                    "both": lambda v=v, x=x[k, m]: 2 * torch.sigmoid(v["V"] @ F.gelu(v["U"] @ x + v["b"]) + v["c"]),
                }[granularity]()
                assert gate.shape == {"token": (1,)}.get(granularity, (12,))
                torch.testing.assert_close(found[k, m], h * gate, atol=1e-6, rtol=1e-6)


# One bit


def test_the_weights_of_a_unit_have_two_values() -> None:
    bank = Bank(SITE, [BiAdaptFormer(size=5)], nn.Linear(8, 12), [0])
    latent = bank.of_slot(0)
    layers = bank.specs[0].layers({name: value[None] for name, value in latent.items()})
    assert all(len(unit.unique()) == 2 for unit in (*layers.down[0], *layers.up[0].T))
    # As many are above the mean as of the latent weights, and no other reads their size.
    assert torch.equal(layers.down[0] > layers.down[0].mean(1, True), latent["down"] > latent["down"].mean(1, True))
    assert not layers.down_bias.any()
    assert not layers.up_bias.any()


def test_a_gradient_reaches_the_latent_weights() -> None:
    """That of the mean and the deviation is exact, that of the sign is one."""
    latent = torch.randn(3, 7, dtype=torch.double, requires_grad=True)
    weight = torch.randn(3, 7, dtype=torch.double)
    (found,) = torch.autograd.grad((binary(latent, 1) * weight).sum(), latent)

    def passed(value: Tensor) -> Tensor:
        mean, deviation = value.mean(1, True), value.std(1, keepdim=True)
        normal = (value - mean) / (deviation + 1e-5)
        start = (latent - latent.mean(1, True)) / (latent.std(1, keepdim=True) + 1e-5)
        step = (torch.where(start < 0, -0.67448975, 0.67448975) - start).detach()
        return mean + deviation * (normal + step)

    (expected,) = torch.autograd.grad((passed(latent) * weight).sum(), latent)
    torch.testing.assert_close(found, expected)
    assert (found != 0).all()


def test_training_flips_signs() -> None:
    model, backbone = tiny("bert")
    with Attachment(model, backbone, [everywhere(BiAdaptFormer(size=4), backbone)], [1]) as attachment:
        bank = attachment.banks[0]
        before = bank.specs[0].layers(bank.slots()).up.detach() > 0
        optimizer = torch.optim.Adam([value for value, _ in attachment.trainable()], lr=1e-2)
        for _ in range(3):
            model(tokens()).logits.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        after = bank.specs[0].layers(bank.slots()).up.detach() > 0
        assert (before != after).any()


def test_a_weight_takes_a_bit_and_a_unit_four_numbers() -> None:
    spec = BiAdaptFormer(size=5)
    bits = 5 * (8 + 12) + 5 * 4 * 32
    assert spec.stored_bits(SITE) == bits
    assert spec.num_params(SITE) == 5 * (8 + 12)
    mixture = Mixture(expert=spec, experts=3)
    router = sum(parameter.count for name, parameter in mixture.parameters(SITE).items() if name.startswith("router"))
    assert mixture.stored_bits(SITE) == 3 * bits + 32 * router


@pytest.mark.parametrize("kind", [BiAdaptFormer, Compacter, Hyperformer, Polyhistor, VlPet])
@pytest.mark.parametrize("field", ["size", "blocks", "rank", "embedding", "activation", "form", "granularity"])
def test_bad_fields_are_refused(kind: type[AdapterSpec], field: str) -> None:
    if hasattr(kind(), field):
        with pytest.raises(ValueError, match=field):
            kind(**{field: 0})


@pytest.mark.slow
def test_a_study_searches_them(tmp_path: Path) -> None:
    adapters = {spec.kind: {"size": [0, 1, 2]} for spec in (*SHARING, BiAdaptFormer(), VlPet())}
    changes = {"search": {"searcher": "random", "trials": 4, "batch": 2}, "finalists": {"seeds": 2, "most": 1}}
    snapshot = run(load_study(save_study(tmp_path, space={"adapters": adapters}, **changes)))
    trials = list(snapshot.search_trials)
    assert all(trial.state == "complete" for trial in trials), [trial.error for trial in trials]
