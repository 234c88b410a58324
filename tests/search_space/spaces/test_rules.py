"""Baselines by rule, and which of the usual rules a space leaves out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from autopeft.search_space import BASELINES, AdapterChoice, Choice, SearchSpace
from autopeft.search_space.domains import Int
from autopeft.search_space.spaces.rules import ALL_BASELINES, RULES, is_untuned, left_out
from autopeft.testing.spaces import BERT_LINEARS, SMALL, encoder

#: Two layers of SmolLM2-135M, and of BERT-base.
LLAMA_LINEARS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
LLAMA = replace(
    encoder(num_layers=2, hidden_size=576, inner_size=1536, linears=LLAMA_LINEARS, bias=False), family="llama"
)
BERT = replace(encoder(num_layers=2), family="bert")

LINEARS = tuple(role for role in SMALL.roles if role.startswith(("attn.", "mlp.")))


def space(at: tuple[str, ...], rank: object) -> SearchSpace:
    return SearchSpace(backbone=SMALL, adapters={"lora": AdapterChoice(kind="lora", at=at, fields={"rank": rank})})


def test_a_space_with_both_rules() -> None:
    assert left_out(space(LINEARS, Choice.of([0, 2, 8]))) == {}
    assert left_out(space(LINEARS, Int(low=1, high=16))) == {}
    assert left_out(space(LINEARS, 8)) == {}


def test_roles_without_lora() -> None:
    found = left_out(space(("attn.v",), Choice.of([0, 8])))
    assert found["lora-r8-qv"] == ("attn.q",)
    assert set(found["lora-all-linear"]) == set(LINEARS) - {"attn.v"}


@pytest.mark.parametrize("rank", [4, Choice.of([0, 1, 4])])
def test_ranks_that_are_too_small(rank: object) -> None:
    assert set(left_out(space(LINEARS, rank))) == {"lora-r8-qv", "lora-all-linear"}


def test_other_kinds_are_no_lora() -> None:
    bitfit = SearchSpace(backbone=encoder(), adapters={"bias": AdapterChoice(kind="bitfit")})
    assert set(left_out(bitfit)) == {"lora-r8-qv", "lora-all-linear"}


#: By rule: rank, alpha, scaling and the sites; the rate on SmolLM2 and on BERT-base, None where it is tuned.
BY_HAND: dict[str, tuple[int, float, str, str, tuple[float, float] | None]] = {
    "rule-unsloth": (16, 32.0, "alpha", "all", (2e-4, 2e-4)),
    # 5e-4 * (2000 / 576) ** 0.781 and 5e-4 * (2000 / 768) ** 0.781
    "rule-tinker": (32, 32.0, "alpha", "all", (1.322e-3, 1.056e-3)),
    "rule-llama-factory": (8, 16.0, "alpha", "all", (1e-4, 1e-4)),
    "sweep-all-linear-r16": (16, 32.0, "alpha", "all", None),
    "sweep-all-linear-r32": (32, 32.0, "alpha", "all", None),
    "sweep-rslora-r64": (64, 64.0, "rslora", "attn.q attn.v", None),
    "mlp-only-r10": (10, 20.0, "alpha", "mlp", None),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("backbone", [LLAMA, BERT], ids=["llama", "bert"])
def test_rank_alpha_sites_and_rate_of_each_rule(backbone: Any, name: str) -> None:
    rank, alpha, scaling, where, rates = BY_HAND[name]
    linears = LLAMA_LINEARS if backbone is LLAMA else BERT_LINEARS
    roles = {"all": linears, "mlp": linears[4:]}.get(where, tuple(where.split()))
    architecture = RULES[name].architecture(backbone)
    assert dict(architecture.adapters).keys() == {f"layers.{layer}.{role}" for layer in range(2) for role in roles}
    for _, spec in architecture:
        assert (spec.kind, spec.rank, spec.alpha, spec.scaling, spec.dropout) == ("lora", rank, alpha, scaling, 0.0)
    assert is_untuned(name) is (rates is not None)
    if rates is not None:
        rate = RULES[name].learning_rate
        assert rate is not None
        assert rate(backbone) == pytest.approx(rates[backbone is BERT], rel=1e-3)


def test_tinkers_formula_by_family() -> None:
    rule = RULES["rule-tinker"]
    assert rule.learning_rate is not None
    qwen = replace(LLAMA, family="qwen3", hidden_size=1024)
    assert rule.learning_rate(qwen) == pytest.approx(5e-4 * (2000 / 1024) ** 0.0775, rel=1e-3)
    assert rule.learning_rate(replace(LLAMA, hidden_size=2000)) == 5e-4
    assert rule.remark(LLAMA) == rule.remark(qwen) == ""
    assert rule.remark(BERT) == "its formula knows Llama and Qwen; for bert it takes Llama's exponent"


def test_rules_on_other_models() -> None:
    fused = encoder(num_layers=1, linears=("attn.qkv", "attn.o", "mlp.up", "mlp.down"))
    sites = {name: [site for site, _ in rule.architecture(fused)] for name, rule in RULES.items()}
    assert sites["sweep-rslora-r64"] == ["layers.0.attn.qkv"]
    assert len(sites["rule-unsloth"]) == 4
    without_mlp = encoder(num_layers=1, linears=("attn.q", "attn.v"))
    assert not RULES["mlp-only-r10"].architecture(without_mlp)


def test_the_search_begins_with_the_points_of_before() -> None:
    """The initial design of `bo` has the points of `BASELINES`: more of them would change earlier studies."""
    assert not RULES.keys() & BASELINES.keys()
    assert ALL_BASELINES.keys() == RULES.keys() | BASELINES.keys()


@pytest.mark.parametrize(
    ("rule", "tuned"),
    [
        ("rule-unsloth", "sweep-all-linear-r16"),
        ("rule-tinker", "sweep-all-linear-r32"),
        ("rule-llama-factory", "lora-all-linear"),
    ],
)
def test_every_untuned_rule_has_a_tuned_baseline_of_its_structure(rule: str, tuned: str) -> None:
    assert ALL_BASELINES[rule](LLAMA) == ALL_BASELINES[tuned](LLAMA)
