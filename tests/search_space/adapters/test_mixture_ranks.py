"""Mixtures of LoRAs of different ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autopeft.kernels import mixture_lora
from autopeft.search_space import Architecture
from autopeft.search_space.adapters import (
    Lora,
    Mixture,
    spec_from_dict,
)
from autopeft.search_space.runtime.bank import Bank
from autopeft.search_space.spaces.controls import controls

from ...support.mixtures import LINEAR, OUT, SETTINGS, WIDTH, bank_of, batch, check_reference, expert_of, mixture
from ...support.spaces import SMALL

torch.set_num_threads(1)

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
    if specs[0].implements("apply_linear", LINEAR):
        frozen: nn.Module = bank.base[0].double()
        torch.testing.assert_close(bank.apply_linear(x, None), bank(x, frozen(x)))


@pytest.mark.parametrize("name", SETTINGS)
def test_equal_ranks_are_the_ordinary_mixture(name: str) -> None:
    plain = mixture(replace(LORA, rank=2), name)
    ragged = replace(plain, ranks=(2,) * plain.num_experts_total)
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
