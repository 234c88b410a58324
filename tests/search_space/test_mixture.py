"""Mixtures against a router and experts that are written out token by token, and what must be equal to what."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.kernels import mixture_lora
from autopeft.search_space import AdapterChoice, Architecture, Candidate, Choice, Float, SearchSpace, SpaceError
from autopeft.search_space.adapters import (
    ADAPTERS,
    AdapterSpec,
    Bottleneck,
    Dora,
    Ia3,
    Lora,
    Mixture,
    Norm,
    Prefix,
    spec_from_dict,
)
from autopeft.search_space.adapters.mixture import MIXTURE_FIELDS
from autopeft.search_space.backbones.backbone import LINEAR_ROLES, Backbone, Site
from autopeft.search_space.problem import declared_costs
from autopeft.search_space.routers import ROUTERS, mixing
from autopeft.search_space.runtime.bank import Bank, Call, Tokens
from autopeft.search_space.spaces.controls import controls
from autopeft.search_space.spaces.location import locate
from autopeft.searchers.bo.encoding import Encoding
from autopeft.testing.models import tiny, tokens
from autopeft.testing.spaces import SMALL

from ..support.conformance import descend

torch.set_num_threads(1)

WIDTH, OUT, TEXTS, LENGTH = 6, 6, 3, 4
LINEAR = Site(
    name="q", layer=0, role="attn.q", module="q", in_features=WIDTH, out_features=OUT, input_module="q", bias=True
)
DOWN = replace(LINEAR, role="mlp.down")
SUBLAYER = replace(LINEAR, role="mlp")

EXPERTS: dict[str, tuple[AdapterSpec, Site]] = {
    "lora": (Lora(rank=2, alpha=3.0), LINEAR),
    "lora of rank 1": (Lora(rank=1, alpha=1.0), LINEAR),
    "dora": (Dora(rank=2), LINEAR),
    "ia3": (Ia3(), replace(LINEAR, role="attn.v")),
    "ia3 at the input": (Ia3(), DOWN),
    "serial": (Bottleneck(size=3, init="kaiming"), SUBLAYER),
    "parallel": (Bottleneck(size=2, form="parallel", activation="gelu", scale=2.0), SUBLAYER),
}
SETTINGS = {
    "token": {"top_k": 2},
    "switch": {"router": "token", "top_k": 1},
    "token, top_p": {"router": "token", "top_k": 4, "top_p": 0.6},
    "shared": {"router": "token", "top_k": 2, "shared_experts": 2},
    "sigmoid": {"top_k": 2},
    "sequence": {"top_k": 2},
    "task": {"top_k": 3, "tasks": 3},
    "soft": {},
    "uniform": {},
}
#: Types of experts that can sit at linears.
AT_LINEARS = [kind for kind, spec in ADAPTERS.items() if spec.can_be_expert and {*spec.roles} & {*LINEAR_ROLES}]


def mixture(expert: AdapterSpec, name: str, experts: int = 4, **fields) -> Mixture:
    own = {"router": name.split(",")[0] if name.split(",")[0] in ROUTERS else "token", **SETTINGS[name], **fields}
    return Mixture(expert=expert, experts=experts, **own)


def bank_of(specs: list[Mixture], site: Site, masked: bool = True, seed: int = 0) -> Bank:
    """A bank with values away from those of the start."""
    torch.manual_seed(0)
    bank = Bank(site, specs, nn.Linear(WIDTH, OUT), [seed + k for k in range(len(specs))])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in bank.values.values():
            value.add_(0.7 * torch.randn(value.shape[1:], generator=generator))
    mask = torch.ones(TEXTS, LENGTH, dtype=torch.bool)
    if masked:
        mask[1, 2:] = False
    bank.tokens = Tokens(length=LENGTH, mask=mask, domains=torch.tensor([2, 0, 1]))
    return bank.double().eval()


def batch(slots: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(slots, TEXTS * LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    y = torch.randn(slots, TEXTS * LENGTH, OUT, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), y.requires_grad_()


def expert_of(spec: Mixture, p: dict[str, Tensor], e: int) -> dict[str, Tensor]:
    """The parameters of expert e alone."""
    if spec.ranks:
        own = slice(sum(spec.ranks[:e]), sum(spec.ranks[: e + 1]))
        return {"A": p["A"][own], "B": p["B"][:, own]}
    return {name: value[e] for name, value in p.items() if not name.startswith("router")}


def alone(spec: Mixture, bank: Bank, p: dict[str, Tensor], e: int, x: Tensor, y: Tensor) -> Tensor:
    """What expert e of slot 0 makes of tokens [n, D]: its change of y, or of x."""
    one = Bank(bank.site, [spec.each[e]], bank.base[0], [0]).double().eval()
    values = {name: value[None] for name, value in expert_of(spec, p, e).items()}
    if spec.expert.acts_by("apply_input", bank.site):
        return (spec.expert.apply_input(values, x[None], one.call) - x)[0]
    return (spec.expert.apply(values, x[None], y[None], one.call) - y)[0]


def softmax(z: list[Tensor]) -> list[Tensor]:
    total = sum(math.e**v for v in z)
    return [math.e**v / total for v in z]


def reference(spec: Mixture, bank: Bank, k: int, x: Tensor, y: Tensor) -> Tensor:
    """Slot k's tokens, one after the other. x: [M, D_in], y: [M, D_out]."""
    p = bank.of_slot(k)
    acting = x if spec.expert.acts_by("apply_input", bank.site) else y
    mask, shared = bank.tokens.mask, spec.shared_experts
    if spec.router == "soft":
        return _soft_reference(spec, bank, p, x, y)
    out = []
    for m in range(len(x)):
        n = m // LENGTH
        gates = [0.0] * spec.experts
        if spec.router == "uniform":
            gates = [1 / spec.experts] * spec.experts
        else:
            if spec.router == "task":
                z = [p["router"][e, bank.tokens.domains[n]] for e in range(spec.experts)]
            else:
                text = [x[n * LENGTH + t] for t in range(LENGTH) if mask[n, t]]
                seen = sum(text) / len(text) if spec.router == "sequence" else x[m]
                z = [p["router"][e] @ seen for e in range(spec.experts)]
            weights = [1 / (1 + math.e**-v) for v in z] if spec.router == "sigmoid" else softmax(z)
            order = [w + p["router_bias"][e] for e, w in enumerate(weights)] if spec.router == "sigmoid" else weights
            best = sorted(range(spec.experts), key=lambda e: -order[e].item())[: spec.top_k]
            total = sum(w.item() for w in weights)
            kept, reached = [], 0.0
            for e in best:
                if reached < spec.top_p:
                    kept.append(e)
                    reached += weights[e].item() / total
            scale = 1.0 if len(kept) == 1 else sum(weights[e] for e in kept)
            for e in kept:
                gates[e] = weights[e] / scale
        token = acting[m]
        for e, gate in enumerate([1.0] * shared + gates):
            if isinstance(gate, Tensor) or gate:
                token = token + gate * alone(spec, bank, p, e, x[m : m + 1], y[m : m + 1])[0]
        out.append(token)
    return torch.stack(out)


def _soft_reference(spec: Mixture, bank: Bank, p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    acting = x if spec.expert.acts_by("apply_input", bank.site) else y
    out = []
    for n in range(TEXTS):
        here = [n * LENGTH + t for t in range(LENGTH)]
        real = [m for m in here if bank.tokens.mask[n, m - here[0]]]
        added = []
        for e in range(spec.experts):
            shares = softmax([p["router"][e] @ x[m] for m in real])
            mean_x = sum(share * x[m] for share, m in zip(shares, real, strict=True))
            mean_y = sum(share * y[m] for share, m in zip(shares, real, strict=True))
            added.append(alone(spec, bank, p, e, mean_x[None], mean_y[None])[0])
        for m in here:
            gates = softmax([p["router"][e] @ x[m] for e in range(spec.experts)])
            out.append(acting[m] + sum(gate * change for gate, change in zip(gates, added, strict=True)))
    return torch.stack(out)


def forward(bank: Bank, x: Tensor, y: Tensor) -> Tensor:
    acts = bank.specs[0].acts_by("apply_input", bank.site)
    return bank.apply_input(x) if acts else bank(x, y)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("expert", EXPERTS)
def test_a_mixture_equals_its_tokens_one_by_one(name: str, expert: str) -> None:
    spec, site = EXPERTS[expert]
    # A pack of two: a smaller mixture, which owns a part of what the other has, beside it.
    specs = [mixture(spec, name), mixture(spec, name, experts=3, **({"top_k": 1} if name == "token" else {}))]
    bank = bank_of(specs, site)
    x, y = batch(2)
    found = forward(bank, x, y)
    check_reference(bank, specs, x, y, found)


def check_reference(bank: Bank, specs: list[Mixture], x: Tensor, y: Tensor, found: Tensor) -> None:
    """Outputs and gradients of a bank are those of its tokens one by one."""
    expected = torch.stack([reference(s, bank, k, x[k], y[k]) for k, s in enumerate(specs)])
    torch.testing.assert_close(found, expected)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(3), dtype=found.dtype)
    wanted = [x, y, *bank.values.values()]
    grads = [
        torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True, materialize_grads=True)
        for out in (found, expected)
    ]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("kind", AT_LINEARS)
def test_experts_run_with_the_linear_as_they_do_after_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever of a mixture is one operation with its linear: outputs and gradients, from values as after training."""
    model, backbone = tiny("bert")
    model.double()
    expert = ADAPTERS[kind]()
    sites = [s.name for s in backbone.sites if s.role in {*LINEAR_ROLES} & {*expert.roles}]
    architecture = Architecture.of({name: [Mixture(expert=expert, experts=3)] for name in sites})

    def outputs_and_gradients() -> list[Tensor]:
        with Attachment(model, backbone, [architecture], [0]) as attachment:
            attachment.double().eval()
            load_moved(attachment)
            logits = model(tokens(), attention_mask=torch.ones(3, 5)).logits
            values = [value for value, _ in attachment.trainable()]
            return [logits, *torch.autograd.grad(logits.square().sum(), values)]

    found = outputs_and_gradients()
    monkeypatch.setattr(Attachment, "_fuses", lambda self, *_: False)
    for one, two in zip(found, outputs_and_gradients(), strict=True):
        torch.testing.assert_close(one, two)


def load_moved(attachment: Attachment, k: int = 0) -> None:
    """Values of a slot away from those of the start."""
    generator = torch.Generator().manual_seed(4)
    state = {name: v + 0.3 * torch.randn(v.shape, generator=generator) for name, v in attachment.state(k).items()}
    attachment.load_state(state, k)


def gates_in(model: nn.Module, backbone: Backbone, architecture: Architecture) -> dict[tuple[str, AdapterSpec], Tensor]:
    """Of a forward pass, by site and mixture."""
    found: dict[tuple[str, AdapterSpec], Tensor] = {}
    routed = mixing.routed

    def told(spec: Mixture, p: mixing.Values, x: Tensor, call: Call) -> Tensor:
        gates = found[call.bank.site.name, spec] = routed(spec, p, x, call)
        return gates

    with Attachment(model, backbone, [architecture], [0]) as attachment, pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "routed", told)
        attachment.eval()
        load_moved(attachment)
        model(tokens())
    return found


@pytest.mark.parametrize("router", ["token", "sigmoid"])
def test_all_experts_with_equal_weights_are_the_average(router: str) -> None:
    spec = Mixture(expert=Lora(rank=2), experts=3, router=router, top_k=3)
    bank, plain = bank_of([spec], LINEAR), bank_of([replace(spec, router="uniform")], LINEAR)
    with torch.no_grad():
        for name in ("router", "router_bias"):
            if name in bank.values:
                bank.values[name].zero_()
        plain.load_slot(0, {name: v for name, v in bank.of_slot(0).items() if not name.startswith("router")})
    x, y = batch(1)
    torch.testing.assert_close(bank(x, y), plain(x, y))
    one = sum(alone(spec, bank, bank.of_slot(0), e, x[0], y[0]) for e in range(3)) / 3
    torch.testing.assert_close(bank(x, y)[0], y[0] + one)


def test_one_expert_that_gets_all_is_the_plain_adapter() -> None:
    bank = bank_of([Mixture(expert=Lora(rank=2), experts=1)], LINEAR)
    plain = Bank(LINEAR, [Lora(rank=2)], bank.base[0], [0]).double()
    plain.load_slot(0, {name: value[0] for name, value in bank.of_slot(0).items() if name != "router"})
    x, y = batch(1)
    torch.testing.assert_close(bank(x, y), plain(x, y))


def test_experts_of_one_rank_are_a_mixture_of_loras() -> None:
    """SMoRA: with every rank an expert and the gates of a block alike, blocks of ranks are experts."""
    blocks, rank = 3, 2
    coarse = bank_of(
        [Mixture(expert=Lora(rank=rank, alpha=2.0), experts=blocks, top_k=blocks, router="uniform")], LINEAR
    )
    fine = bank_of([Mixture(expert=Lora(rank=1, alpha=1.0), experts=blocks * rank, router="uniform")], LINEAR)
    own = coarse.of_slot(0)
    a = own["A"].reshape(blocks * rank, 1, WIDTH)
    b = own["B"].movedim(-1, 1).reshape(blocks * rank, OUT, 1)
    fine.load_slot(0, {"A": a, "B": rank * b})  # 1 / 6 each, not 1 / 3
    x, y = batch(1)
    torch.testing.assert_close(coarse(x, y), fine(x, y))


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 5), st.integers(1, 3), st.integers(1, 6), st.sampled_from(["token", "sigmoid", "sequence"]),
    st.integers(0, 1000),
)  # fmt: skip
def test_gates_are_shares_and_the_load_is_what_was_sent(
    experts: int, rank: int, top_k: int, router: str, seed: int
) -> None:
    spec = Mixture(expert=Lora(rank=rank), experts=experts, router=router, top_k=top_k)
    bank = bank_of([spec], LINEAR, seed=seed)
    bank.seen = []
    x, y = batch(1)
    bank(x, y)
    found = bank.routing
    assert found is not None
    assert float(found.load.sum()) == pytest.approx(1.0)
    assert float(found.active) == pytest.approx(min(top_k, experts))
    assert -1e-9 <= float(found.entropy) <= 1.0 + 1e-6


def test_penalties_are_those_of_the_papers_and_count_no_padding() -> None:
    spec = Mixture(expert=Lora(rank=1), experts=3, top_k=1, balance=0.3, z_loss=0.2)
    bank = bank_of([spec], LINEAR)
    x, y = batch(1)
    bank(x, y)
    z = x[0] @ bank.of_slot(0)["router"].T
    real = bank.tokens.mask.flatten()
    probabilities = z.softmax(-1)[real]
    share = torch.nn.functional.one_hot(probabilities.argmax(-1), 3).double().mean(0)
    expected = 0.3 * 3 * (share * probabilities.mean(0)).sum() + 0.2 * z[real].logsumexp(-1).square().mean()
    assert bank.routing is not None
    torch.testing.assert_close(bank.routing.penalty[0], expected)
    # Padding may be anything.
    with torch.no_grad():
        other = x.clone()
        other[0][~real] += 5.0
    bank(other, y)
    torch.testing.assert_close(bank.routing.penalty[0], expected)


def test_the_bias_of_a_sigmoid_router_falls_where_too_much_arrives() -> None:
    bank = bank_of([Mixture(expert=Lora(rank=1), experts=3, top_k=1, router="sigmoid")], LINEAR)
    x, y = batch(1)
    bank(x, y)
    assert bank.routing is not None
    bank.routing.penalty.sum().backward()
    gradient = bank.values["router_bias"].grad
    torch.testing.assert_close(gradient[0], 0.01 * (bank.routing.load[0] - 1 / 3))


def test_costs_equal_counters() -> None:
    spec = Mixture(expert=Lora(rank=2), experts=4, shared_experts=1, top_k=2)
    bank = bank_of([spec], LINEAR)
    own = bank.of_slot(0)
    assert spec.num_params(LINEAR) == sum(value.numel() for value in own.values())
    assert spec.stored_bits(LINEAR) == 32 * spec.num_params(LINEAR)
    met = sum(value[:3].numel() for name, value in own.items() if name != "router") + own["router"].numel()
    assert spec.active_params(LINEAR) == met
    # Token by token, with the experts that it is sent to and no others.
    x, _ = batch(1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for m in range(3):
            z = own["router"] @ x[0, m]
            for e in (0, *(1 + z.topk(2).indices)):
                own["B"][e] @ (own["A"][e] @ x[0, m, :, None])
    # A matrix times a vector is no operation that the counter knows.
    router = 3 * 2 * 4 * WIDTH
    assert counter.get_total_flops() + router == 3 * spec.flops_per_token(LINEAR)


@pytest.mark.parametrize(
    ("expert", "fields", "other"),
    [
        (Lora(rank=2, dropout=0.3), {"top_k": 1, "router_noise": 0.5, "balance": 0.1}, {"top_k": 2}),
        (Dora(rank=2, dropout=0.3), {"shared_experts": 1}, {"top_k": 1}),
        (Lora(rank=2, dropout=0.3), {"router": "soft"}, {"router_noise": 0.2}),
        (Lora(rank=2), {"router": "sigmoid", "z_loss": 0.1}, {"top_k": 3}),
        (Lora(rank=2, dropout=0.3), {"ranks": (1, 4, 2, 1), "router_noise": 0.5}, {"top_k": 1}),
        (Lora(rank=2, dropout=0.3), {"ranks": (1, 4, 2, 1), "router": "soft"}, {}),
    ],
)
def test_a_slot_alone_equals_the_slot_in_a_pack_while_training(expert: AdapterSpec, fields, other) -> None:
    model, backbone = tiny("bert")
    smaller = {"experts": len(fields.get("ranks", "12")), **fields}
    specs = [
        Mixture(expert=expert, experts=4, **fields).canonical(),
        Mixture(expert=replace(expert, rank=3, alpha=4.0), **{**smaller, "router_noise": 0.0, **other}).canonical(),
    ]
    sites = [site.name for site in backbone.sites if site.role in ("attn.q", "mlp.up")]
    made = [Architecture.of({name: [spec] for name in sites}) for spec in specs]
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])

    def steps(architectures: list[Architecture], seeds: list[int]) -> list[dict[str, Tensor]]:
        slots = len(architectures)
        with Attachment(model, backbone, architectures, seeds) as attachment:
            for number in range(3):
                ids = tokens(seed=number).repeat(slots, 1)
                logits = model(ids, attention_mask=mask.repeat(slots, 1)).logits
                attachment.routers.penalised(logits.square().view(slots, -1).mean(1)).sum().backward()
                descend(attachment)
            return [attachment.state(k) for k in range(slots)]

    together = steps(made, [5, 6])
    for k, architecture in enumerate(made):
        (single,) = steps([architecture], [5 + k])
        assert single.keys() == together[k].keys()
        for name, value in single.items():
            torch.testing.assert_close(
                together[k][name], value, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_what_routers_do_is_told_by_site() -> None:
    model, backbone = tiny("bert")
    spec = Mixture(expert=Lora(rank=1), experts=3, router="token", top_k=2)
    architecture = Architecture.of({site.name: [spec] for site in backbone.sites if site.role == "attn.q"})
    with Attachment(model, backbone, [architecture], [0]) as attachment:
        attachment.eval()
        attachment.routers.watch()
        with torch.no_grad():
            model(tokens(), attention_mask=torch.ones(3, 5))
            model(tokens(2, seed=1), attention_mask=torch.ones(2, 5))
        routes = attachment.routers.routes(0)
        attachment.routers.watch()
        assert attachment.routers.routes(0) == {}
    assert len(routes) == 2
    for found in routes.values():
        assert sum(found["load"]) == pytest.approx(1.0, abs=1e-3)
        assert found["active"] == [2.0]


def test_bad_mixtures() -> None:
    for fields, message in (
        ({"expert": Prefix()}, "cannot be an expert"),
        ({"expert": Mixture()}, "cannot be an expert"),
        ({"router": "dice"}, "router must be one of"),
        ({"experts": 0}, "experts must be at least 1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"router": "soft", "shared_experts": 1}, "no shared ones"),
        ({"router": "poly", "expert": Ia3()}, "parameters of LoRAs"),
        ({"router": "poly", "ranks": (1, 2, 3, 4)}, "ranks are for LoRAs"),
        ({"expert": Dora(), "ranks": (1, 2, 3, 4)}, "ranks are for LoRAs"),
        ({"given": ("a", "b", "c", "d"), "ranks": (1, 2, 3, 4)}, "ranks are for LoRAs"),
        ({"ranks": (1, 2, 3, 4), "shared_experts": 1}, "4 ranks for 5 experts"),
        ({"ranks": (1, 2, 0, 4)}, "ranks must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Mixture(**fields)


def test_a_causal_model_is_not_told_what_comes() -> None:
    model, backbone = tiny("llama-causal")
    spec = Mixture(expert=Lora(), router="sequence")
    architecture = Architecture.of({site.name: [spec] for site in backbone.sites if site.role == "attn.q"})
    with pytest.raises(ValueError, match="looks ahead"):
        Attachment(model, backbone, [architecture], [0])


@pytest.mark.parametrize("heads", [1, 3])
def test_poly_mixes_parameters_for_each_task_and_block(heads: int) -> None:
    specs = [
        Mixture(expert=Lora(rank=2, alpha=3.0), experts=4, router="poly", tasks=3, heads=heads),
        Mixture(expert=Lora(rank=1), experts=2, router="poly", tasks=3, heads=heads),
    ]
    bank = bank_of(specs, LINEAR)
    x, y = batch(2)
    expected = []
    for k, spec in enumerate(specs):
        p, texts = bank.of_slot(k), []
        for n, task in enumerate(bank.tokens.domains.tolist()):
            a, b = torch.zeros_like(p["A"][0]), torch.zeros_like(p["B"][0])
            for h in range(heads):
                shares = [1 / (1 + math.e ** -p["router"][e, task, h]) for e in range(spec.experts)]
                own = slice(h * WIDTH // heads, (h + 1) * WIDTH // heads)
                a[:, own] = sum(s * p["A"][e][:, own] for e, s in enumerate(shares)) / sum(shares)
                b[own] = sum(s * p["B"][e][own] for e, s in enumerate(shares)) / sum(shares)
            here = slice(n * LENGTH, (n + 1) * LENGTH)
            texts.append(y[k, here] + spec.expert.scale * x[k, here] @ a.T @ b.T)  # type: ignore[attr-defined]
        expected.append(torch.cat(texts))
    found = bank(x, y)
    torch.testing.assert_close(found, torch.stack(expected))
    wanted = [x, *bank.values.values()]
    for one, two in zip(*(torch.autograd.grad(out.square().sum(), wanted) for out in (found, torch.stack(expected))),
                        strict=True):  # fmt: skip
        torch.testing.assert_close(one, two)


# Ranks that differ

LORA = Lora(alpha=3.0)


def of_ranks(name: str, **fields) -> Mixture:
    ranks = (2, 1, 3, 1, 4, 1) if name == "shared" else (1, 4, 2, 1)
    return mixture(LORA, name, ranks=ranks, **fields)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_experts_of_different_ranks_equal_their_tokens_one_by_one(
    name: str, gathered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a pack with another scale and number of active experts; alone, and with the frozen linear."""
    monkeypatch.setattr(mixture_lora, "is_routed", lambda *_: gathered)
    specs = [
        of_ranks(name),
        replace(of_ranks(name, **({"top_k": 1} if name == "token" else {})), expert=Lora(alpha=2.0, scaling="rslora")),
    ]
    bank = bank_of(specs, LINEAR)
    x, y = batch(2)
    found = bank(x, y)
    check_reference(bank, specs, x, y, found)
    for k, spec in enumerate(specs):
        single = bank_of([spec], LINEAR)
        single.load_slot(0, bank.of_slot(k))
        torch.testing.assert_close(single(x[k : k + 1], y[k : k + 1])[0], found[k])
    if specs[0].acts_by("apply_linear", LINEAR):
        frozen: nn.Module = bank.base[0].double()
        torch.testing.assert_close(bank.apply_linear(x, None), bank(x, frozen(x)))


@pytest.mark.parametrize("name", SETTINGS)
def test_equal_ranks_are_the_ordinary_mixture(name: str) -> None:
    plain = mixture(replace(LORA, rank=2), name)
    ragged = replace(plain, ranks=(2,) * plain.num_rows)
    assert ragged.canonical() == plain.canonical()
    for count in ("num_params", "stored_bits", "active_params", "flops_per_token"):
        assert getattr(ragged, count)(LINEAR) == getattr(plain, count)(LINEAR)
    x, y = batch(1)
    banks = [bank_of([spec], LINEAR) for spec in (plain, ragged)]
    own = banks[0].of_slot(0)
    together = {"A": own["A"].flatten(0, 1), "B": own["B"].movedim(0, 1).flatten(1)}
    banks[1].load_slot(0, {**own, **together})
    found = [bank(x, y) for bank in banks]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in found))


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_what_an_expert_starts_with_does_not_depend_on_the_others(init: str) -> None:
    def starting(*ranks: int) -> list[Tensor]:
        spec = Mixture(expert=Lora(init=init), experts=len(ranks), ranks=ranks).canonical()
        values = Bank(LINEAR, [spec], nn.Linear(WIDTH, OUT), [7]).of_slot(0)
        return [expert_of(spec, values, e)["A"] for e in range(len(ranks))]

    mixed = starting(2, 3, 1, 2)
    for other in (starting(2, 3), starting(2, 2, 2, 2), starting(3, 3), starting(1, 3, 1)):
        alike = [(one, two) for one, two in zip(mixed, other, strict=False) if len(one) == len(two)]
        assert alike
        assert all(torch.equal(one, two) for one, two in alike)


def test_costs_of_different_ranks_equal_counters() -> None:
    spec = Mixture(experts=4, shared_experts=1, top_k=2, ranks=(3, 1, 4, 2, 1))
    bank = bank_of([spec], LINEAR)
    own = bank.of_slot(0)
    assert spec.num_params(LINEAR) == sum(value.numel() for value in own.values())
    assert spec.stored_bits(LINEAR) == 32 * spec.num_params(LINEAR)
    # The shared one and the two largest of the others.
    met = [expert_of(spec, own, e) for e in (0, 2, 3)]
    assert spec.active_params(LINEAR) == own["router"].numel() + sum(v.numel() for p in met for v in p.values())
    x, _ = batch(1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for expert in met:
            expert["B"] @ (expert["A"] @ x[0, 0, :, None])
    assert counter.get_total_flops() + 2 * 4 * WIDTH == spec.flops_per_token(LINEAR)
    # All ranks side by side, and no rank that an expert does not have.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        bank(x, x)
    assert counter.get_total_flops() == x.shape[1] * 2 * (11 * (WIDTH + OUT) + 4 * WIDTH)


def test_one_network_of_different_ranks_has_one_key() -> None:
    spec = Mixture(expert=Lora(rank=8), experts=3, ranks=[1, 4, 2])  # type: ignore[arg-type]
    assert spec == Mixture(expert=Lora(rank=1), experts=3, ranks=(1, 4, 2))
    assert (spec.expert.size, spec.label) == (4, "3 x lora 1-4 (token)")
    assert spec_from_dict(spec.to_dict()) == spec == spec.canonical()
    assert "ranks" not in Mixture().to_dict(), "keys of before stay what they were"
    assert replace(spec, ranks=(2, 2, 2)).canonical() == Mixture(expert=Lora(rank=2), experts=3)


def test_controls_of_different_ranks() -> None:
    spec = Mixture(experts=3, top_k=1, ranks=(1, 4, 2))
    found = controls(Architecture.of({"layers.0.attn.q": [spec]}), SMALL)
    instead = {name: own.adapters[0][1][0] for name, own in found.items()}
    assert instead["average"] == replace(spec, router="uniform").canonical()
    site = SMALL.site("layers.0.attn.q")
    for name, num_params in (("active", spec.active_params(site)), ("total", spec.num_params(site))):
        assert instead[name] == Lora(rank=num_params // (2 * 16))


# In a space


def space(**fields) -> SearchSpace:
    own = {"rank": Choice.of([1, 2]), "experts": Choice.of([0, 2, 4]), "top_k": Choice.of([1, 4]), **fields}
    lora = AdapterChoice(kind="lora", at=("attn.q", "attn.v"), fields=own, vary={"experts": "layer"})
    return SearchSpace(backbone=SMALL, adapters={"lora": lora})


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
        ({"router": "task"}, "needs to know how many"),
        ({"router": "soft", "shared_experts": 1}, "router 'soft' does not support shared_experts"),
        ({"experts": Choice.of([0])}, "0 is the only size"),
    ],
)
def test_what_a_space_says_of_bad_mixtures(fields, message) -> None:
    with pytest.raises(SpaceError, match=message):
        space(**fields)


def test_fields_of_mixtures_need_experts() -> None:
    with pytest.raises(SpaceError, match="say how many experts"):
        SearchSpace(backbone=SMALL, adapters={"lora": AdapterChoice(kind="lora", fields={"top_k": 2})})
    with pytest.raises(SpaceError, match="unknown field of prefix"):
        SearchSpace(backbone=SMALL, adapters={"p": AdapterChoice(kind="prefix", fields={"experts": 2})})


def test_a_mixture_is_read_as_it_was_written() -> None:
    spec = Mixture(expert=Norm(), experts=3, router="sigmoid")
    assert spec_from_dict(spec.to_dict()) == spec
    assert set(MIXTURE_FIELDS) < set(spec.to_dict())


# One router for the sites of a layer


def shared_router(**fields) -> SearchSpace:
    own = {"rank": 2, "experts": Choice.of([2, 4]), "balance": 0.05, **fields}
    lora = AdapterChoice(
        kind="lora", at=("attn.q", "attn.v", "mlp.up"), fields=own, vary={"experts": "layer"}, router_per="layer"
    )
    return SearchSpace(backbone=tiny("bert")[1], adapters={"lora": lora})


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


def test_mixtures_at_one_site_have_random_streams_of_their_own() -> None:
    """The first of them that which it has alone."""
    model, backbone = tiny("bert")
    specs = [Mixture(expert=Lora(rank=2, dropout=0.1), router=router) for router in ("token", "sigmoid")]
    both, *single = (Architecture.of({"layers.0.attn.q": own}) for own in (specs, specs[:1], specs[1:]))
    with Attachment(model, backbone, [both, *single], [5, 5, 5]) as attachment:
        streams = [{key: s.get_state() for key, s in attachment.dropout_streams(k).items()} for k in range(3)]
        states = [attachment.state(k) for k in range(3)]
    one, two = (f"layers.0.attn.q/mixture{nth}" for nth in ("", "#2"))
    for name in ("A", "router"):
        assert not torch.equal(states[0][f"{one}/{name}"], states[0][f"{two}/{name}"])
        assert torch.equal(states[1][f"{one}/{name}"], states[2][f"{one}/{name}"])
        assert any(torch.equal(states[0][f"{key}/{name}"], states[1][f"{one}/{name}"]) for key in (one, two))
    assert not torch.equal(streams[0][one], streams[0][two])
    with Attachment(model, backbone, [both], [5]) as attachment:
        alone_ = attachment.state()
    assert all(torch.equal(value, states[0][name]) for name, value in alone_.items())


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
    with Attachment(model, backbone, [alone_], [0]), pytest.raises(ValueError, match="has run before it"):
        model(tokens())


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"fields": {"experts": 2}, "placement": "site"}, "on together"),
        ({"fields": {"experts": 4, "top_k": Choice.of([1, 2])}, "vary": {"top_k": "site"}}, "on together"),
        ({"fields": {"experts": Choice.of([2, 4])}, "vary": {"experts": "site"}}, "on together"),
        ({"fields": {"experts": 2, "router": Choice.of(["token", "sigmoid"])}, "vary": {"router": "site"}}, "vary it"),
        ({"fields": {"experts": 2, "balance": Float(low=0.0, high=0.1)}, "vary": {"balance": "site"}}, "vary it"),
        ({"fields": {"experts": 2, "router": "soft"}}, "no other can follow"),
        ({"kind": "bitfit", "fields": {"experts": 2}, "at": ("attn.q", "norm")}, "before its attention is not known"),
        ({"fields": {}}, "say how many experts"),
    ],
)
def test_what_cannot_share_a_router(choice, message) -> None:
    with pytest.raises(SpaceError, match=message):
        SearchSpace(backbone=SMALL, adapters={"it": AdapterChoice(**{"kind": "lora", "router_per": "layer", **choice})})


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


# Corners that were wrong once


def test_a_router_learns_where_one_expert_is_left() -> None:
    """Scaled to 1, the one that is chosen would have a gate that does not move."""
    for fields in ({"top_k": 1}, {"top_k": 4, "top_p": 0.05}):
        bank = bank_of([Mixture(expert=Lora(rank=2), experts=4, balance=0.0, **fields)], LINEAR)
        x, y = batch(1)
        bank(x, y).square().sum().backward()
        assert bank.values["router"].grad.abs().max() > 1e-3


def test_one_expert_of_a_sigmoid_router_is_one_network() -> None:
    two = Mixture(expert=Lora(rank=2), router="sigmoid", experts=1, top_k=2)
    banks = [bank_of([spec], LINEAR) for spec in (two, two.canonical())]
    x, y = batch(1)
    torch.testing.assert_close(banks[0](x, y), banks[1](x, y))


def test_a_top_p_of_1_limits_nothing_in_a_pack_either() -> None:
    """Of experts that are so improbable that their share is lost in the sum of the others."""
    specs = [mixture(Lora(rank=2), "token", top_p=top_p) for top_p in (0.5, 1.0)]
    bank, single = bank_of(specs, LINEAR), bank_of(specs[1:], LINEAR, seed=1)
    for own in (bank, single):
        with torch.no_grad():
            own.values["router"].mul_(1000)
    x, y = batch(2)
    torch.testing.assert_close(bank(x, y)[1:], single(x[1:], y[1:]))
    assert bank.routing is not None
    assert single.routing is not None
    assert float(bank.routing.active[1]) == float(single.routing.active[0]) == 2.0
    torch.testing.assert_close(bank.routing.load[1:], single.routing.load)


def test_gates_are_not_rounded_to_a_backbone_of_lower_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    model, backbone = tiny("bert")
    model.bfloat16()
    lead = Mixture(expert=Lora(rank=2), experts=3)
    here = {
        "q": lead,
        "k": replace(lead, router="uniform"),
        "v": replace(lead, router="follow", leader="layers.0.attn.q"),
    }
    architecture = Architecture.of({f"layers.0.attn.{part}": [spec.canonical()] for part, spec in here.items()})

    fused = gates_in(model, backbone, architecture)
    monkeypatch.setattr(Attachment, "_fuses", lambda self, *_: False)
    after = gates_in(model, backbone, architecture)
    assert len(fused) == 3
    assert fused.keys() == after.keys()
    for key, gates in fused.items():
        assert gates.dtype == torch.float32
        assert torch.equal(gates, after[key])


@pytest.mark.parametrize("router", ["token", "sigmoid"])
def test_left_padded_texts_are_generated_with_a_cache(router: str) -> None:
    model, backbone = tiny("llama-causal")
    spec = Mixture(expert=Lora(rank=2), experts=4, router=router)
    architecture = Architecture.of({site.name: [spec] for site in backbone.sites if site.role in ("attn.q", "mlp.up")})
    ids, mask = tokens(2), torch.ones(2, 5, dtype=torch.long)
    ids[0, :2] = mask[0, :2] = 0
    with Attachment(model, backbone, [architecture], [0]) as attachment:
        attachment.eval()
        load_moved(attachment)
        found, expected = (
            model.generate(  # type: ignore[operator]
                ids, attention_mask=mask, min_new_tokens=4, max_new_tokens=4, do_sample=False, use_cache=cached,
                output_logits=True, return_dict_in_generate=True,
            )
            for cached in (True, False)
        )  # fmt: skip
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000))
def test_what_is_canonical_is_the_same_network(seed: int) -> None:
    rng = Random(seed)
    spec = Mixture(
        expert=Lora(rank=rng.choice([1, 2])),
        experts=rng.choice([1, 2, 3]),
        router=rng.choice(["token", "sigmoid", "sequence", "task", "poly", "soft", "uniform"]),
        top_k=rng.choice([1, 2, 5]),
        top_p=rng.choice([0.4, 1.0]),
        tasks=3,
        balance=rng.choice([0.0, 0.1]),
        z_loss=rng.choice([0.0, 0.1]),
    )
    same = spec.canonical()
    assert same.canonical() == same
    x, y = batch(1)
    banks = [bank_of([one], LINEAR) for one in (spec, same)]
    if spec.tasks != same.tasks:  # a router that does not read them
        assert spec.router not in ("task", "poly")
    torch.testing.assert_close(banks[0](x, y), banks[1](x, y))
    penalties = [bank.routing.penalty if bank.routing else torch.zeros(1) for bank in banks]
    torch.testing.assert_close(penalties[0], penalties[1], check_dtype=False)


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


def test_norms_have_experts_too() -> None:
    model, backbone = tiny("bert")
    declared = SearchSpace(
        backbone=backbone, adapters={"norm": AdapterChoice(kind="norm", fields={"experts": Choice.of([2, 3])})}
    )
    architecture = declared.decode(declared.largest()).architecture
    with Attachment(model, backbone, [architecture], [0]) as attachment:
        model(tokens()).logits.sum().backward()
        assert attachment.num_adapter_params() == architecture.num_params(backbone)


def test_routes_of_a_slot_have_its_own_experts() -> None:
    model, backbone = tiny("bert")
    made = [Architecture.of({"layers.0.attn.q": [Mixture(expert=Lora(rank=1), experts=e)]}) for e in (2, 5)]
    with Attachment(model, backbone, made, [0, 1]) as attachment, torch.no_grad():
        attachment.eval()
        attachment.routers.watch()
        model(tokens().repeat(2, 1))
        assert [len(attachment.routers.routes(k)["layers.0.attn.q/mixture"]["load"]) for k in (0, 1)] == [2, 5]


def test_heads_have_to_divide_the_features() -> None:
    with pytest.raises(SpaceError, match="5 blocks do not fit"):
        space(router="poly", tasks=2, heads=5)
