"""What practitioners run by hand: baselines by rule, and where a space cannot contain the copied defaults."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from autopeft.search_space.adapters import Lora
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.domains import Choice, Domain
from autopeft.search_space.spaces.presets import BASELINES, everywhere, linears, queries_and_values
from autopeft.search_space.spaces.space import SearchSpace

#: The baselines that are copied most: LoRA at every linear layer, and at queries and values.
COPIED = ("lora-all-linear", "lora-r8-qv")

#: What a report compares with: one untuned run, a sweep over learning rates, or a sweep at the mlp alone.
RuleKind = Literal["rule", "sweep", "mlp-only"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A configuration that a practitioner runs without a search.

    `architecture`: on a backbone; empty where the backbone lacks its sites. `learning_rate`: the rule's own one for a
    backbone, with which it is trained once; None: it is tuned over `baselines.learning_rates`. `remark`: on a backbone
    that the rule was not made for; empty for others. All other training settings are those of the study.
    """

    kind: RuleKind
    architecture: Callable[[Backbone], Architecture]
    learning_rate: Callable[[Backbone], float] | None = None
    remark: Callable[[Backbone], str] = lambda backbone: ""


def _all_linear(rank: int, alpha: float) -> Callable[[Backbone], Architecture]:
    return lambda backbone: everywhere(backbone, Lora(rank=rank, alpha=alpha), linears(backbone))


def _rslora(backbone: Backbone) -> Architecture:
    return everywhere(backbone, Lora(rank=64, alpha=64.0, scaling="rslora"), queries_and_values(backbone))


def _mlp_only(backbone: Backbone) -> Architecture:
    return everywhere(backbone, Lora(rank=10, alpha=20.0), linears(backbone, "mlp"))


#: The exponents of Tinker's formula by a part of the family's name.
TINKER_EXPONENTS = {"llama": 0.781, "qwen": 0.0775}


def _tinker_family(backbone: Backbone) -> str | None:
    family = backbone.family.lower()
    return next((name for name in TINKER_EXPONENTS if name in family), None)


def _tinker_rate(backbone: Backbone) -> float:
    """Return 5e-5 * 10 * (2000 / hidden size) ** P; Llama's P for families that the formula does not know."""
    exponent = TINKER_EXPONENTS[_tinker_family(backbone) or "llama"]
    rate = 5e-5 * 10 * (2000 / backbone.hidden_size) ** exponent
    # The last digit of a power depends on the machine, and a study may be resumed on another one.
    return float(f"{rate:.4g}")


def _tinker_remark(backbone: Backbone) -> str:
    if _tinker_family(backbone) is not None:
        return ""
    return f"its formula knows Llama and Qwen; for {backbone.family} it takes Llama's exponent"


#: Baselines by rule. On a quantised backbone they are QLoRA.
RULES: Mapping[str, Rule] = {
    # Unsloth's guide on LoRA hyperparameters (rank 16 or 32, alpha of the rank or twice as much, 2e-4 to start with,
    # all linear layers); TRL's table for LoRA has the same rate.
    "rule-unsloth": Rule(kind="rule", architecture=_all_linear(16, 32.0), learning_rate=lambda backbone: 2e-4),
    # `get_lr` of tinker_cookbook.hyperparam_utils, with the default rank and alpha of its trainings.
    "rule-tinker": Rule(
        kind="rule",
        architecture=_all_linear(32, 32.0),
        learning_rate=_tinker_rate,
        remark=_tinker_remark,
    ),
    # Its examples for LoRA: lora_rank 8, lora_target all, learning_rate 1.0e-4; alpha is twice the rank by default.
    "rule-llama-factory": Rule(kind="rule", architecture=_all_linear(8, 16.0), learning_rate=lambda backbone: 1e-4),
    # The structures of `rule-unsloth` and `rule-tinker` with tuned rates: they tell what the rate is worth. That of
    # `rule-llama-factory` is `lora-all-linear`.
    "sweep-all-linear-r16": Rule(kind="sweep", architecture=_all_linear(16, 32.0)),
    "sweep-all-linear-r32": Rule(kind="sweep", architecture=_all_linear(32, 32.0)),
    # method_comparison/MetaMathQA of HF peft, lora/llama-3.2-3B-rank64-rslora: alpha 64, at queries and values, which
    # are peft's default for Llama. It is among the most accurate there.
    "sweep-rslora-r64": Rule(kind="sweep", architecture=_rslora),
    # The same comparison, lora/llama-3.2-3B-rank10-target-mlp: alpha 20, at gate, up and down; it forgets little.
    "mlp-only-r10": Rule(kind="mlp-only", architecture=_mlp_only),
}

#: Every baseline that a study may name. The initial design of `bo` has the points of `BASELINES` alone: more of them
#: would change the searches of earlier studies.
ALL_BASELINES: Mapping[str, Callable[[Backbone], Architecture]] = {
    **BASELINES,
    **{name: rule.architecture for name, rule in RULES.items()},
}


def is_untuned(baseline: str) -> bool:
    """Return whether a baseline is trained at a learning rate of its own alone."""
    return baseline in RULES and RULES[baseline].learning_rate is not None


def left_out(space: SearchSpace) -> dict[str, tuple[str, ...]]:
    """Return by rule the roles at which the space has no LoRA of the rule's rank; rules that fit are not in it.

    A search cannot find what its space leaves out, so a baseline that wins from outside of it teaches it nothing.
    """
    offered = dict(_offered(space))
    found = {}
    for rule in COPIED:
        roles: dict[str, None] = {}
        for name, spec in BASELINES[rule](space.backbone):
            if isinstance(spec, Lora) and offered.get(name, 0.0) < spec.rank:
                roles[space.backbone.site(name).role] = None
        if roles:
            found[rule] = tuple(roles)
    return found


def _offered(space: SearchSpace) -> Iterator[tuple[str, float]]:
    """Yield sites and the largest rank of LoRA there, the smaller ones first."""
    domains = {gene.name: gene.domain for gene in space.genes}
    places = [place for place in space.placements if place.kind == Lora.kind]
    ranks = [
        (place.site.name, _largest(domains[place.genes["rank"]]) if "rank" in place.genes else place.fixed["rank"])
        for place in places
        if "rank" in place.genes or "rank" in place.fixed
    ]
    yield from sorted(((name, float(rank)) for name, rank in ranks), key=lambda pair: pair[1])


def _largest(domain: Domain) -> float:
    values = domain.choices if isinstance(domain, Choice) else (domain.high,)
    return max(float(value) for value in values)
