"""Synthetic problems with exactly known fronts, on real spaces over a backbone of twelve layers.

Accuracy is that of the head alone plus the gain of the adapters, which is largest at one learning rate:

    accuracy = 0.45 + 0.17 * gain(sizes) * exp(-ln(rate / best_rate(type, num_params))^2 / 2),  gain in [0, 1]

The best rate falls with the number of parameters and lies within the range, so a front is that of the gains. These are
sums over layers or stages, of which `best_sums` finds the non-dominated ones, or few enough to enumerate. Costs are
those that the adapter types declare. The candidate without adapters is excluded from a front: a study does not train it
either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from autopeft.benchmarks.race.base import RaceProblem, best_sums, pareto
from autopeft.search_space.adapters import AdapterSpec, Bitfit, Bottleneck, Lora, Prefix
from autopeft.search_space.backbones.backbone import Backbone, Site
from autopeft.search_space.declaration import AdapterChoice, OneOf
from autopeft.search_space.domains import Choice, Float, Value
from autopeft.search_space.problem import Objective, Problem, declared_costs
from autopeft.search_space.spaces.genes import Assignment
from autopeft.search_space.spaces.presets import PRESETS, linears, log2_sizes
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.studies.analysis.pareto import Floats

HEAD, SPAN = 0.45, 0.17
STD_ERR = 0.012
RATES = Float(low=5e-4, high=1e-2, log=True)
NUM_TRIALS = 200
#: Options [n, 1 + costs] of one decision: minus its gain, then the costs that count.
Options = list[list[float]]


def made_up_backbone(num_layers: int, hidden_size: int = 768, num_key_value_heads: int = 12) -> Backbone:
    """Return the sites of an encoder with heads of 64 features; `Site.module` names no real module."""
    wide, narrow = 4 * hidden_size, 64 * num_key_value_heads
    sizes = {
        "attn.q": (hidden_size, hidden_size),
        "attn.k": (hidden_size, narrow),
        "attn.v": (hidden_size, narrow),
        "attn.o": (hidden_size, hidden_size),
        "mlp.up": (hidden_size, wide),
        "mlp.down": (wide, hidden_size),
        "attn": (hidden_size, hidden_size),
        "mlp": (hidden_size, hidden_size),
    }
    heads: dict[str, Any] = {"num_key_value_heads": num_key_value_heads, "head_dim": 64}
    sites = [
        Site(name=f"layers.{layer}.{role}", layer=layer, role=role, module=role, input_module=role, in_features=inner,
             out_features=outer, bias="." in role, **(heads if role == "attn" else {}))
        for layer in range(num_layers)
        for role, (inner, outer) in sizes.items()
    ]  # fmt: skip
    return Backbone(id="made-up", revision=None, family="encoder", sites=tuple(sites), hidden_size=hidden_size,
                    num_layers=num_layers, num_params=12 * num_layers * hidden_size**2, head_modules=("classifier",),
                    num_head_params=2 * hidden_size, causal=False)  # fmt: skip


# Parts of all problems


@dataclass(frozen=True, slots=True)
class Part:
    """Gain and best learning rate of a candidate."""

    gain: float
    rate: float


def _accuracy(part: Part, rate: float) -> float:
    return HEAD + SPAN * part.gain * math.exp(-(math.log(rate / part.rate) ** 2) / 2)


def _rate(num_params: float, largest: float, rate: float = 1.5e-3) -> float:
    """Return the best learning rate; `rate` is that of the largest candidate."""
    falling: float = rate * (largest / max(num_params, 1.0)) ** 0.15
    return min(max(falling, RATES.low), RATES.high)


def _saturating(size: float, half: float) -> float:
    return size / (size + half)


def _problem(
    name: str,
    summary: str,
    space: SearchSpace,
    part: Callable[[Assignment, float], Part],
    front: Floats,
    objectives: Sequence[str] = ("accuracy", "num_params"),
) -> RaceProblem:
    """Return the race problem of a front.

    `part`: of genes and their number of parameters. `front`: [n, 1 + costs], see `Options`.
    """

    def values(genes: Assignment) -> dict[str, float]:
        costs = declared_costs(space.decode(genes).architecture, space.backbone)
        lr = genes["training.learning_rate"]
        return {"accuracy": _accuracy(part(genes, costs["num_params"]), float(lr)), **costs}

    front = front[front[:, 1] > 0]
    points = {"accuracy": HEAD - SPAN * front[:, 0]}
    points |= {cost: front[:, 1 + i] for i, cost in enumerate(objectives[1:])}
    problem = Problem(space=space, objectives=tuple(map(Objective.of, objectives)), num_trials=NUM_TRIALS)
    return RaceProblem.of(name, summary, problem, values, {"accuracy": STD_ERR}, points)


def _sites(backbone: Backbone, roles: Iterable[str], layers: Iterable[int]) -> list[Site]:
    roles, layers = set(roles), set(layers)
    return [site for site in backbone.sites if site.role in roles and site.layer in layers]


def _params(spec: AdapterSpec, sites: Iterable[Site]) -> int:
    return sum(spec.num_params(site) for site in sites)


def _with_single(tables: Sequence[Options]) -> Floats:
    """Return the best sums and each option alone: the cheapest candidate may gain nothing, but it is not empty."""
    return np.vstack([best_sums(tables), *map(np.asarray, tables)])


def _stage(layer: int, num_layers: int, stages: int) -> int:
    return layer * stages // num_layers


# A rank in every layer

ATTN = (0.0, 0.0, 0.0, 0.05, 0.0, 0.0, 0.12, 0.18, 0.0, 0.15, 0.10, 0.0)
MLP = (0.0, 0.08, 0.0, 0.0, 0.12, 0.0, 0.0, 0.0, 0.20, 0.0, 0.0, 0.0)


def per_layer(attn: Sequence[float] = ATTN, mlp: Sequence[float] = MLP) -> RaceProblem:
    """Return the problem of a LoRA rank in every layer.

    `attn`, `mlp`: by layer, the largest share of the gain that adapters there can add.
    """
    backbone = made_up_backbone(len(attn))
    preset = PRESETS["lora-per-layer"].space(backbone)
    space = SearchSpace(backbone=backbone, **preset, training={"learning_rate": RATES})
    shares = {(part, layer): share for part, row in (("attn", attn), ("mlp", mlp)) for layer, share in enumerate(row)}
    largest = space.decode(space.largest()).architecture.num_params(backbone)
    whole = sum(shares.values())

    def gain(share: float, rank: float) -> float:
        return share / whole * _saturating(rank, 2) / _saturating(32, 2)

    def part(genes: Assignment, num_params: float) -> Part:
        ranks = {(part, layer): genes.get(f"{part}.rank.layers.{layer}", 0) for part, layer in shares}
        total = sum(gain(share, float(ranks[place])) for place, share in shares.items())
        return Part(total, _rate(num_params, largest))

    tables = [
        [[0.0, 0.0]]
        + [
            [-gain(share, rank), _params(Lora(rank=rank), _sites(backbone, linears(backbone, part), [layer]))]
            for rank in (1, 2, 4, 8, 16, 32)
        ]
        for (part, layer), share in shares.items()
    ]
    summary = "LoRA of its own rank in 24 places, of which 8 matter; front by dynamic programming"
    return _problem("per-layer", summary, space, part, _with_single(tables))


# Types that exclude each other


@dataclass(frozen=True, slots=True)
class TypeModel:
    """One type: its largest gain, the size of half that, its best rate when largest, its searched field."""

    most: float
    half: float
    rate: float
    size: str
    field: str
    #: Share of the gain by value of the field.
    shares: Mapping[Value, float]
    at: tuple[str, ...]
    sizes: tuple[int, ...]
    fixed: Mapping[str, Value]

    def spec(self, size: int) -> AdapterSpec:
        """Return the adapter of a size."""
        return Lora(rank=size) if self.size == "rank" else Bottleneck(size=size)


RANKS, SIZES = (1, 2, 4, 8, 16, 32), (8, 16, 32, 64, 128, 256)
ACTIVATIONS: dict[Value, float] = {"relu": 0.96, "gelu": 1.0, "tanh": 0.9}
ALPHAS: dict[Value, float] = {16.0: 0.95, 32.0: 1.0, 64.0: 0.92}
KINDS = {
    "series": TypeModel(1.1, 30, 8e-4, "size", "activation", ACTIVATIONS, ("mlp",), SIZES, {"form": "serial"}),
    "parallel": TypeModel(0.9, 12, 1.5e-3, "size", "activation", ACTIVATIONS, ("mlp",), SIZES, {"form": "parallel"}),
    "lora": TypeModel(0.7, 1.5, 3e-3, "rank", "alpha", ALPHAS, ("attn.q", "attn.v"), RANKS, {}),
}  # fmt: skip
STAGE_SHARES = (0.1, 0.2, 0.3, 0.4)


def types(num_layers: int = 12, stage_shares: Sequence[float] = STAGE_SHARES) -> RaceProblem:
    """Return the problem of three exclusive adapter types. `stage_shares`: shares of the gain by stage."""
    backbone = made_up_backbone(num_layers)
    stages = len(stage_shares)
    adapters = {
        name: AdapterChoice(
            kind="lora" if name == "lora" else "bottleneck",
            at=kind.at,
            fields={kind.size: Choice.of(kind.sizes), kind.field: Choice.of(tuple(kind.shares)), **kind.fixed},
            vary={kind.size: "stage"},
        )
        for name, kind in KINDS.items()
    }
    group = OneOf(name="type", members=tuple(KINDS))
    training = {"learning_rate": RATES}
    space = SearchSpace(backbone=backbone, adapters=adapters, one_of=[group], stages=stages, training=training)
    layers = [[layer for layer in range(num_layers) if _stage(layer, num_layers, stages) == s] for s in range(stages)]
    every = {name: _sites(backbone, kind.at, range(num_layers)) for name, kind in KINDS.items()}
    largest = {name: _params(kind.spec(kind.sizes[-1]), every[name]) for name, kind in KINDS.items()}

    def gain(kind: TypeModel, stage: int, size: float, value: Value) -> float:
        return kind.most * kind.shares[value] * stage_shares[stage] * _saturating(size, kind.half)

    def part(genes: Assignment, num_params: float) -> Part:
        name = str(genes["type"])
        kind, value = KINDS[name], genes[f"{name}.{KINDS[name].field}"]
        sizes = [float(genes[f"{name}.{kind.size}.stages.{stage}"]) for stage in range(stages)]
        total = sum(gain(kind, stage, size, value) for stage, size in enumerate(sizes))
        return Part(total, _rate(num_params, largest[name], kind.rate))

    def options(kind: TypeModel, value: Value, stage: int) -> Options:
        sites = _sites(backbone, kind.at, layers[stage])
        return [[-gain(kind, stage, size, value), _params(kind.spec(size), sites)] for size in kind.sizes]

    fronts = [
        best_sums([options(kind, value, stage) for stage in range(stages)])
        for kind in KINDS.values()
        for value in kind.shares
    ]
    summary = "series or parallel bottlenecks or LoRA, each best at another budget and rate; front by types and stages"
    return _problem("types", summary, space, part, np.vstack(fronts))


# AutoPEFT's space: three sizes times a subset of the layers

LAYER_SHARES = (-0.03, -0.02, 0.0, 0.04, 0.06, 0.12, 0.14, 0.10, 0.16, 0.14, 0.16, 0.08)


def autopeft(layer_shares: Sequence[float] = LAYER_SHARES, hidden_size: int = 768) -> RaceProblem:
    """Return the problem over AutoPEFT's space.

    `layer_shares`: the gain of each layer that is on; adapters in some lower layers reduce the accuracy.
    """
    backbone = made_up_backbone(len(layer_shares), hidden_size)
    preset = PRESETS["autopeft"].space(backbone)
    space = SearchSpace(backbone=backbone, **preset, training={"learning_rate": RATES})
    sizes = log2_sizes(hidden_size)
    largest = space.decode(space.largest()).architecture.num_params(backbone)
    whole = sum(share for share in layer_shares if share > 0)

    def use(serial: float, parallel: float, prefix: float) -> float:
        """Return the gain in [0, 1]: each adapter closes a part of the remaining gap. Long prefixes close less."""
        gap = 1 - 0.6 * _saturating(serial, 48)
        gap *= 1 - 0.75 * _saturating(parallel, 24)
        return 1 - gap * (1 - 0.35 * prefix / 8 * math.exp(1 - prefix / 8))

    def part(genes: Assignment, num_params: float) -> Part:
        found = [float(genes.get(name, 0)) for name in ("serial.size", "parallel.size", "prefix.length")]
        on = sum(share for layer, share in enumerate(layer_shares) if genes[f"layers.{layer}.on"])
        return Part(use(*found) * on / whole, _rate(num_params, largest))

    def params(serial: int, parallel: int, prefix: int) -> int:
        """Return the parameters in one layer."""
        attn, mlp = (_sites(backbone, [role], [0]) for role in ("attn", "mlp"))
        bottlenecks = sum(_params(Bottleneck(size=size), mlp) for size in (serial, parallel) if size)
        return bottlenecks + (_params(Prefix(length=prefix), attn) if prefix else 0)

    # Layers cost the same: among subsets of n layers the n best are optimal.
    best = np.cumsum(sorted(layer_shares, reverse=True)) / whole
    front = [
        [-use(*triple) * share, n * params(*triple)]
        for triple in product(sizes, repeat=3)
        if any(triple)
        for n, share in enumerate(best, 1)
    ]
    summary = "the preset: three sizes shared by the layers that are on; front by sizes and number of layers"
    return _problem("autopeft", summary, space, part, np.asarray(front))


# Three objectives

LENGTHS = (1, 2, 4, 8, 16, 32)
THIRDS = (0.2, 0.3, 0.5)


def three(num_layers: int = 12, stage_shares: Sequence[float] = THIRDS) -> RaceProblem:
    """Return a problem with three objectives.

    With few key and value heads a prefix costs operations, biases cost parameters, and LoRA some of both.
    """
    backbone = made_up_backbone(num_layers, num_key_value_heads=3)
    stages = len(stage_shares)
    at = {"lora": ("attn.q", "attn.v"), "prefix": ("attn",), "biases": ("attn.q", "mlp.up")}
    rank, length = Choice.of((0, 1, 2, 4, 8, 16)), Choice.of(LENGTHS)
    adapters = {
        "lora": AdapterChoice(kind="lora", at=at["lora"], fields={"rank": rank}, vary={"rank": "stage"}),
        "prefix": AdapterChoice(kind="prefix", at=at["prefix"], placement="stage", fields={"length": length}),
        "biases": AdapterChoice(kind="bitfit", at=at["biases"], placement="stage"),
    }
    space = SearchSpace(backbone=backbone, adapters=adapters, stages=stages, training={"learning_rate": RATES})
    layers = [[layer for layer in range(num_layers) if _stage(layer, num_layers, stages) == s] for s in range(stages)]
    largest = space.decode(space.largest()).architecture.num_params(backbone)

    def gains(stage: int, rank: float, length: float, biases: bool) -> tuple[float, float, float]:
        share = stage_shares[stage]
        return (
            0.55 * share * _saturating(rank, 1.5) / _saturating(16, 1.5),
            0.30 * share * _saturating(length, 6) / _saturating(32, 6),
            0.15 * share * biases,
        )

    def curved(total: float | Floats) -> Any:
        return (1 - np.exp(-2 * total)) / (1 - np.exp(-2.0))

    def part(genes: Assignment, num_params: float) -> Part:
        total = 0.0
        for stage in range(stages):
            length = float(genes["prefix.length"]) if genes[f"prefix.on.stages.{stage}"] else 0.0
            rank = float(genes.get(f"lora.rank.stages.{stage}", 0))
            total += sum(gains(stage, rank, length, bool(genes[f"biases.on.stages.{stage}"])))
        return Part(float(curved(total)), _rate(num_params, largest))

    def option(gain: float, name: str, spec: AdapterSpec, stage: int) -> list[float]:
        sites = _sites(backbone, at[name], layers[stage])
        return [-gain, _params(spec, sites), sum(spec.flops_per_token(site) for site in sites)]

    def options(stage: int, length: int) -> list[Options]:
        """Return the decisions of one stage, whose gains add up."""
        nothing = [0.0, 0.0, 0.0]
        loras = [option(gains(stage, r, 0, False)[0], "lora", Lora(rank=r), stage) for r in (1, 2, 4, 8, 16)]
        prefix = option(gains(stage, 0, length, False)[1], "prefix", Prefix(length=length), stage)
        biases = option(gains(stage, 0, 0, True)[2], "biases", Bitfit(), stage)
        return [[nothing, *loras], [nothing, prefix], [nothing, biases]]

    # The stages share the length of the prefix; given that, everything is a sum.
    fronts = [_with_single([t for stage in range(stages) for t in options(stage, length)]) for length in LENGTHS]
    front = pareto(np.vstack(fronts))
    front[:, 0] = -curved(-front[:, 0])
    summary = "accuracy, parameters and operations with LoRA, prefixes and biases; front by sums over stages"
    return _problem("three", summary, space, part, front, ("accuracy", "num_params", "flops_per_token"))
