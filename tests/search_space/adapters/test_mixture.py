"""Mixtures against a router and experts that are written out token by token, and what must be equal to what."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.search_space import AdapterChoice, Architecture, Choice, SearchSpace
from autopeft.search_space.adapters import (
    ADAPTERS,
    AdapterSpec,
    Dora,
    Ia3,
    Lora,
    Mixture,
    Prefix,
)
from autopeft.search_space.backbones.backbone import LINEAR_ROLES
from autopeft.search_space.runtime.bank import Bank
from autopeft.testing.models import tiny, tokens

from ...support.conformance import descend
from ...support.mixtures import (
    EXPERTS,
    LENGTH,
    LINEAR,
    OUT,
    SETTINGS,
    WIDTH,
    alone,
    bank_of,
    batch,
    check_reference,
    forward,
    gates_in,
    load_moved,
    mixture,
)

torch.set_num_threads(1)

#: Types of experts that can sit at linears.
AT_LINEARS = [kind for kind, spec in ADAPTERS.items() if spec.can_be_expert and {*spec.roles} & {*LINEAR_ROLES}]


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
    monkeypatch.setattr("autopeft.evaluators.attachment.attachment.fuses", lambda *_: False)
    for one, two in zip(found, outputs_and_gradients(), strict=True):
        torch.testing.assert_close(one, two)


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


def test_penalties_are_those_of_the_papers_and_count_no_padding() -> None:
    spec = Mixture(expert=Lora(rank=1), experts=3, top_k=1, balance=0.3, z_loss=0.2)
    bank = bank_of([spec], LINEAR)
    x, y = batch(1)
    bank(x, y)
    z = x[0] @ bank.of_slot(0)["router"].T
    real = bank.router.tokens.mask.flatten()
    probabilities = z.softmax(-1)[real]
    share = torch.nn.functional.one_hot(probabilities.argmax(-1), 3).double().mean(0)
    expected = 0.3 * 3 * (share * probabilities.mean(0)).sum() + 0.2 * z[real].logsumexp(-1).square().mean()
    assert bank.router.last is not None
    torch.testing.assert_close(bank.router.last.penalty[0], expected)
    # Padding may be anything.
    with torch.no_grad():
        other = x.clone()
        other[0][~real] += 5.0
    bank(other, y)
    torch.testing.assert_close(bank.router.last.penalty[0], expected)


def test_the_bias_of_a_sigmoid_router_falls_where_too_much_arrives() -> None:
    bank = bank_of([Mixture(expert=Lora(rank=1), experts=3, top_k=1, router="sigmoid")], LINEAR)
    x, y = batch(1)
    bank(x, y)
    assert bank.router.last is not None
    bank.router.last.penalty.sum().backward()
    gradient = bank.values["router_bias"].grad
    torch.testing.assert_close(gradient[0], 0.01 * (bank.router.last.load[0] - 1 / 3))


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
        ({"router": "soft", "shared_experts": 1}, "does not support shared_experts"),
        ({"router": "poly", "expert": Ia3()}, "mixes the matrices of LoRAs"),
        ({"router": "poly", "ranks": (1, 2, 3, 4)}, "ranks: need trained experts of kind lora"),
        ({"expert": Dora(), "ranks": (1, 2, 3, 4)}, "ranks: need trained experts of kind lora"),
        ({"given": ("a", "b", "c", "d"), "ranks": (1, 2, 3, 4)}, "ranks: need trained experts of kind lora"),
        ({"ranks": (1, 2, 3, 4), "shared_experts": 1}, "got 4 values for 5 routed and shared experts"),
        ({"ranks": (1, 2, 0, 4)}, "ranks must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Mixture(**fields)


def test_a_causal_model_is_not_told_what_comes() -> None:
    model, backbone = tiny("llama-causal")
    spec = Mixture(expert=Lora(), router="sequence")
    architecture = Architecture.of({site.name: [spec] for site in backbone.sites if site.role == "attn.q"})
    with pytest.raises(ValueError, match="reads later tokens"):
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
        for n, task in enumerate(bank.router.tokens.domains.tolist()):
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
    assert bank.router.last is not None
    assert single.router.last is not None
    assert float(bank.router.last.active[1]) == float(single.router.last.active[0]) == 2.0
    torch.testing.assert_close(bank.router.last.load[1:], single.router.last.load)


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
    monkeypatch.setattr("autopeft.evaluators.attachment.attachment.fuses", lambda *_: False)
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
