"""Every router over its row of `router_conformance.py`, and one that somebody else has written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.search_space import AdapterChoice, Candidate, Choice, SearchSpace
from autopeft.search_space.adapters import Lora, Mixture, Norm, spec_from_dict
from autopeft.search_space.adapters.mixture import MIXTURE_FIELDS, USED_BY_SOME
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.call import Call, Values
from autopeft.search_space.parameter import Parameter
from autopeft.search_space.problem import declared_costs
from autopeft.search_space.routers import ROUTERS, Router
from autopeft.search_space.routers.base import one_row_each
from autopeft.search_space.routers.mixing import RoutedSpec, product
from autopeft.search_space.runtime.bank import Bank
from autopeft.search_space.spaces.controls import controls
from autopeft.search_space.spaces.location import locate
from autopeft.testing.models import tiny, tokens

from ...support.conformance import descend
from ...support.mixtures import LENGTH, LINEAR, TEXTS, bank_of, batch, check_reference, leading
from ...support.router_conformance import ROWS, RouterRow

torch.set_num_threads(1)

every_router = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
with_gates = [row for row in ROWS.values() if ROUTERS[row.name].has_gates]
every_router_with_gates = pytest.mark.parametrize("row", with_gates, ids=[row.name for row in with_gates])


def test_every_router_has_a_row() -> None:
    assert list(ROWS) == list(ROUTERS)


@every_router
def test_what_a_router_says_of_itself(row: RouterRow) -> None:
    router = ROUTERS[row.name]
    assert router.name == row.name
    assert router.source
    assert router.summary
    assert not getattr(router, "__dict__", {}), "a router has no state"
    assert {*router.uses} <= {*USED_BY_SOME}
    assert router.has_gates or not router.can_lead, "what follows has gates of the leader"


def penalty(bank: Bank) -> Tensor:
    """[K], zero where a router has none."""
    assert bank.router is not None
    return torch.zeros(len(bank.specs)) if bank.router.last is None else bank.router.last.penalty


def gates(bank: Bank, x: Tensor) -> Tensor:
    """[K, M, S + E]."""
    spec = bank.specs[0]
    assert isinstance(spec, Mixture)
    return spec.routed_by.gates(spec, bank.slots(), x, bank.call)


@pytest.mark.parametrize("row", [row for row in with_gates if callable(row.logits)], ids=lambda row: row.name)
def test_a_router_equals_its_tokens_one_by_one(row: RouterRow) -> None:
    """Outputs and gradients, in a pack."""
    specs = [replace(spec, router_noise=0.0) for spec in row.pack()]
    bank = bank_of(specs, LINEAR)
    x, y = batch(2)
    # The directions of given LoRAs are computed in float32.
    check_reference(bank, specs, x, y, bank(x, y), tolerance=1e-4 if row.name == "arrow" else 1e-7)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 5), st.integers(1, 6), st.sampled_from([0.5, 1.0]), st.integers(0, 2), st.integers(0, 1000))
@every_router_with_gates
def test_gates_are_shares_and_the_load_is_what_was_sent(
    row: RouterRow, experts: int, top_k: int, top_p: float, shared: int, seed: int
) -> None:
    router = ROUTERS[row.name]
    shared = 0 if router.between_given else shared
    spec = row.mixture(experts=experts, top_k=top_k, top_p=top_p, shared_experts=shared).canonical()
    bank = bank_of([spec], LINEAR, seed=seed)
    assert bank.router is not None
    bank.router.seen = []
    found = gates(bank, batch(1)[0])
    assert found.shape == (1, TEXTS * LENGTH, shared + experts)
    assert found.dtype == bank.dtype
    assert (found[..., :shared] == 1).all()
    own = found[..., shared:]
    sent = (own > 0).sum(-1)
    if not router.follows:  # whose leader chooses
        assert (sent <= router.num_chosen(spec)).all()
        assert ((own.sum(-1) - 1).abs() < 1e-6)[sent > 1].all()
    assert (own >= 0).all()
    assert (own.sum(-1) <= 1 + 1e-6).all()
    if router.constant:
        assert (own == own[..., :1]).all()
    if (done := bank.router.last) is not None:
        assert float(done.load.sum()) == pytest.approx(1.0)
        assert shared + 1 - 1e-6 <= float(done.active) <= spec.num_active + 1e-6
        assert -1e-9 <= float(done.entropy) <= 1.0 + 1e-6


@every_router
def test_gradients_reach_what_a_router_trains(row: RouterRow) -> None:
    specs = row.pack()
    bank = bank_of(specs, LINEAR)
    x, y = batch(2)
    (bank(x, y).square().sum() + penalty(bank).sum()).backward()
    for name in specs[0].routed_by.parameters(specs[0], LINEAR):
        gradient = bank.values[name].grad
        assert gradient is not None
        for k in range(len(specs)):
            assert gradient[k].abs().max() > 0, name


@every_router
def test_parameters_are_those_that_are_declared(row: RouterRow) -> None:
    specs = row.pack()
    bank = bank_of(specs, LINEAR)
    for k, spec in enumerate(specs):
        own, declared = spec.routed_by.parameters(spec, LINEAR), spec.parameters(LINEAR)
        assert all(name.startswith("router") for name in own)
        assert not any(name.startswith("router") for name in declared.keys() - own.keys())
        values = bank.of_slot(k)
        assert {name: value.shape for name, value in values.items()} == {n: p.shape for n, p in declared.items()}
        trained = sum(value.numel() for name, value in values.items() if name in own or not spec.given)
        assert spec.num_params(LINEAR) == trained
        router = sum(values[name].numel() for name in own)
        assert spec.active_params(LINEAR) == router + spec.num_active * spec.expert.num_params(LINEAR)
        assert spec.total_params(LINEAR) == sum(value.numel() for value in values.values())


@every_router_with_gates
def test_flops_equal_counters(row: RouterRow) -> None:
    """Of a router that decides token by token; other decisions count as none."""
    spec = row.mixture().canonical()
    bank, (x, _) = bank_of([spec], LINEAR), batch(1)
    own = spec.routed_by.own_flops_per_token(spec, LINEAR)
    assert spec.flops_per_token(LINEAR) == own + spec.num_active * spec.expert.flops_per_token(LINEAR)
    gates(bank, x)  # what is computed once
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        gates(bank, x)
    assert own == (0 if spec.routed_by.per_text else counter.get_total_flops() / x.shape[1])


@every_router
def test_a_slot_alone_equals_the_slot_in_a_pack(row: RouterRow) -> None:
    specs = row.pack()
    bank = bank_of(specs, LINEAR)
    x, y = batch(2)
    found = bank(x, y)
    for k, spec in enumerate(specs):
        single = bank_of([spec], LINEAR)
        single.load_slot(0, bank.of_slot(k))
        if spec.routed_by.follows:
            assert single.router is not None
            single.router.tokens.lead(*leading([spec], LINEAR))
        torch.testing.assert_close(single(x[k : k + 1], y[k : k + 1])[0], found[k])
        torch.testing.assert_close(penalty(single)[0], penalty(bank)[k])


@every_router
def test_padding_has_no_influence(row: RouterRow) -> None:
    bank = bank_of(row.pack(), LINEAR)
    assert bank.router is not None
    assert bank.router.tokens.mask is not None
    bank.router.seen = []
    x, y = batch(2)
    real = bank.router.tokens.mask.flatten()
    with torch.no_grad():
        other = x.clone()
        other[:, ~real] += 5.0
        found, before = bank(x, y), bank.router.last
        padded, after = bank(other, y), bank.router.last
    torch.testing.assert_close(padded[:, real], found[:, real])
    for name in ("penalty", "load", "entropy", "active") if before is not None else ():
        torch.testing.assert_close(getattr(after, name), getattr(before, name))


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000))
@every_router
def test_what_is_canonical_is_the_same_network(row: RouterRow, seed: int) -> None:
    rng, router = Random(seed), ROUTERS[row.name]
    spec = row.mixture(
        Lora(rank=rng.choice([1, 2])),
        experts=rng.choice([1, 2, 3]),
        top_k=rng.choice([1, 2, 5]),
        top_p=rng.choice([0.4, 1.0]),
        tasks=3,
        balance=rng.choice([0.0, 0.1]),
        z_loss=rng.choice([0.0, 0.1]),
        router_noise=rng.choice([0.0, 0.1]),
    )
    same = spec.canonical()
    assert same.canonical() == same
    assert {name for name in USED_BY_SOME if getattr(same, name) != getattr(Mixture(), name)} <= {*router.uses}
    assert spec_from_dict(spec.to_dict()) == spec
    assert spec_from_dict(same.to_dict()) == same
    x, y = batch(1)
    banks = [bank_of([one], LINEAR) for one in (spec, same)]
    torch.testing.assert_close(banks[0](x, y), banks[1](x, y))
    torch.testing.assert_close(penalty(banks[0]), penalty(banks[1]), check_dtype=False)


def test_a_mixture_is_read_as_it_was_written() -> None:
    spec = Mixture(expert=Norm(), experts=3, router="sigmoid")
    assert spec_from_dict(spec.to_dict()) == spec
    assert set(MIXTURE_FIELDS) < set(spec.to_dict())


# From outside


class Cosine(Router):
    """ "token" by directions: z = t cos(W_r, x), with a temperature t that is trained."""

    name: ClassVar[str] = "cosine"
    source: ClassVar[str] = "Chi et al. 2022, On the Representation Collapse of Sparse Mixture of Experts, section 3.2"
    summary: ClassVar[str] = "by the angle to each expert"
    uses: ClassVar[tuple[str, ...]] = ("top_k", "balance")

    @override
    def problems(self, mixture: RoutedSpec) -> Iterator[str]:
        yield from super().problems(mixture)
        if mixture.experts < 2:
            yield "a router 'cosine' needs two experts"

    @override
    def parameters(self, mixture: RoutedSpec, site: Site) -> dict[str, Parameter]:
        return {"router": one_row_each(mixture, site.in_features), "router_t": Parameter(shape=(1,), init=1.0)}

    @override
    def own_flops_per_token(self, mixture: RoutedSpec, site: Site) -> int:
        return 2 * mixture.experts * site.in_features

    @override
    def logits(self, mixture: RoutedSpec, p: Values, x: Tensor, call: Call) -> Tensor:
        w = p["router"].to(x.dtype)
        return p["router_t"].to(x.dtype)[..., None] * product(normalize(w, dim=-1), normalize(x, dim=-1))


@pytest.fixture
def cosine() -> Iterator[str]:
    ROUTERS["cosine"] = Cosine()
    yield "cosine"
    del ROUTERS["cosine"]


def test_a_router_from_outside_is_declared_and_trained(cosine: str) -> None:
    model, backbone = tiny("bert")
    fields: dict[str, Any] = {"experts": Choice.of([2, 4]), "router": Choice.of(["token", cosine]), "top_k": 1}
    lora = AdapterChoice(kind="lora", at=("attn.q", "attn.v"), fields=fields, router_per="layer")
    space = SearchSpace(backbone=backbone, adapters={"lora": lora})
    genes = {"lora.experts": 4, "lora.router": cosine}
    candidate = space.decode(space.completed(genes))
    assert Candidate.from_dict(candidate.to_dict()) == candidate
    assert space.decode(locate(space, candidate) or {}).key == candidate.key
    assert {"average", "active", "total"} == controls(candidate.architecture, backbone).keys()
    leaders = [spec for _, spec in candidate.architecture if spec.routed_by is ROUTERS[cosine]]
    assert len(leaders) == backbone.num_layers
    assert all(spec.label.endswith("(cosine)") for spec in leaders)

    with Attachment(model, backbone, [candidate.architecture], [0]) as attachment:
        assert attachment.num_adapter_params() == declared_costs(candidate.architecture, backbone)["num_params"]
        attachment.routers.watch()
        before = attachment.state()
        losses = []
        for _ in range(3):
            logits = model(tokens(), attention_mask=torch.ones(3, 5)).logits
            loss = attachment.routers.penalised(logits.square().mean()[None]).sum()
            loss.backward()
            losses.append(loss.item())
            descend(attachment)
        moved = [name for name, value in attachment.state().items() if not torch.equal(value, before[name])]
        assert losses[-1] < losses[0]
        assert sum(name.endswith("/router") for name in moved) == len(leaders)
        assert sum(name.endswith("/router_t") for name in moved) == len(leaders)
        attachment.eval()
        with torch.no_grad():
            model(tokens(), attention_mask=torch.ones(3, 5))
        assert [found["active"] for found in attachment.routers.routes(0).values()] == [[1.0]] * len(leaders)


def test_a_router_from_outside_says_what_it_cannot_do(cosine: str) -> None:
    with pytest.raises(ValueError, match="needs two experts"):
        Mixture(experts=1, router=cosine)
    assert Mixture(router=cosine, top_p=0.5, z_loss=0.1).canonical() == Mixture(router=cosine)
