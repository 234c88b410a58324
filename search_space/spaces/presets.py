"""Presets (published search spaces) and baselines (fixed architectures that every front is compared with)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from autopeft.search_space.adapters import AdapterSpec, Bitfit, Bottleneck, Full, Ia3, Lora, Mixture, Norm
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import LINEAR_ROLES, Backbone
from autopeft.search_space.declaration import AdapterChoice, OneOf
from autopeft.search_space.domains import Choice, Domain, Value

Fields = dict[str, Domain | Value]


@dataclass(frozen=True, slots=True)
class Preset:
    """A published space. `space` returns the arguments of `SearchSpace` for a backbone, without `training`."""

    summary: str
    source: str
    space: Callable[[Backbone], dict[str, Any]]


def linears(backbone: Backbone, prefix: str = "") -> tuple[str, ...]:
    """Return the roles of the backbone's linear layers that begin with `prefix`."""
    return tuple(role for role in LINEAR_ROLES if role in backbone.roles and role.startswith(prefix))


def queries_and_values(backbone: Backbone) -> tuple[str, ...]:
    """Return the roles of queries and values, or that of the fused projection."""
    return ("attn.q", "attn.v") if "attn.q" in backbone.roles else ("attn.qkv",)


def log2_sizes(hidden_size: int) -> tuple[int, ...]:
    """Return 0 and hidden_size / 2^k for k = 9, ..., 0, rounded down: eleven sizes from 512 features on."""
    return (0, *sorted({hidden_size >> k for k in range(10)} - {0}))


def _autopeft(backbone: Backbone) -> dict[str, Any]:
    sizes = Choice.of(log2_sizes(backbone.hidden_size))
    bottleneck: Fields = {"size": sizes, "init": "zero", "activation": "relu"}
    return {
        "adapters": {
            "serial": AdapterChoice(kind="bottleneck", at=("mlp",), fields={**bottleneck, "form": "serial"}),
            "parallel": AdapterChoice(kind="bottleneck", at=("mlp",), fields={**bottleneck, "form": "parallel"}),
            "prefix": AdapterChoice(kind="prefix", at=("attn",), fields={"length": sizes}),
        },
        "layer_gate": True,
    }


def _lora_per_layer(backbone: Backbone) -> dict[str, Any]:
    rank = Choice.of((0, 1, 2, 4, 8, 16, 32))
    adapters = {
        part: AdapterChoice(
            kind="lora", at=linears(backbone, part), fields={"rank": rank, "alpha": 16.0}, vary={"rank": "layer"}
        )
        for part in ("attn", "mlp")
        if linears(backbone, part)
    }
    return {"adapters": adapters}


def _mam(backbone: Backbone) -> dict[str, Any]:
    sizes = Choice.of((8, 16, 32, 64, 128, 256, 512))
    parallel: Fields = {"form": "parallel", "init": "zero", "scale": 4.0, "size": sizes}
    return {
        "adapters": {
            "prefix": AdapterChoice(kind="prefix", at=("attn",), fields={"length": Choice.of((1, 5, 10, 30, 60))}),
            "parallel": AdapterChoice(kind="bottleneck", at=("mlp",), fields=parallel),
        }
    }


def _llm_adapters(backbone: Backbone) -> dict[str, Any]:
    sizes = Choice.of((16, 32, 64, 128, 256, 512))
    # As in the commands of the authors: no LoRA at the output of attention or the gate of the mlp.
    lora_roles = ("attn.q", "attn.k", "attn.v", "attn.qkv", "mlp.up", "mlp.down")
    lora: Fields = {"rank": Choice.of((4, 8, 16, 32)), "alpha": Choice.of((16.0, 32.0, 64.0))}
    return {
        "adapters": {
            "series": AdapterChoice(kind="bottleneck", at=("mlp",), fields={"size": sizes, "form": "serial"}),
            "parallel": AdapterChoice(kind="bottleneck", at=("mlp",), fields={"size": sizes, "form": "parallel"}),
            "lora": AdapterChoice(
                kind="lora", at=tuple(role for role in lora_roles if role in backbone.roles), fields=lora
            ),
        },
        "one_of": (OneOf(name="type", members=("series", "parallel", "lora")),),
    }


#: Experts per layer in the four quarters of the layers, lowest first (Gao et al. 2024, MoLA, section 3.3).
MOLA = {
    "mola-triangle": (8, 6, 4, 2),
    "mola-inverted": (2, 4, 6, 8),
    "mola-hourglass": (8, 2, 2, 8),
    "mola-rectangle": (5, 5, 5, 5),
}
#: The adapter of the paper at every linear layer, but for the number of experts.
MOLA_EXPERTS = Mixture(expert=Lora(rank=8), top_k=2)


def _quarters(backbone: Backbone) -> dict[int, tuple[int, ...]]:
    """Return the layers of each quarter; a model of fewer than four layers has fewer quarters."""
    found: dict[int, tuple[int, ...]] = {}
    for layer in range(backbone.num_layers):
        quarter = layer * len(MOLA["mola-rectangle"]) // backbone.num_layers
        found[quarter] = (*found.get(quarter, ()), layer)
    return found


def _mola(experts: tuple[int, ...], backbone: Backbone) -> dict[str, Any]:
    # One rank for each quarter: 8 as published, or less.
    fields: Fields = {"rank": Choice.of((2, 4, 8)), "alpha": 16.0, "top_k": MOLA_EXPERTS.top_k}
    adapters = {
        f"quarter{quarter}": AdapterChoice(
            kind="lora", at=linears(backbone), layers=layers, fields={**fields, "experts": experts[quarter]}
        )
        for quarter, layers in _quarters(backbone).items()
    }
    return {"adapters": adapters}


def _experts_per_layer(backbone: Backbone) -> dict[str, Any]:
    fields: Fields = {"rank": 8, "alpha": 16.0, "experts": Choice.of((0, 2, 4, 6, 8)), "top_k": 2}
    choice = AdapterChoice(kind="lora", at=linears(backbone), fields=fields, vary={"experts": "layer"})
    return {"adapters": {"lora": choice}}


PRESETS: dict[str, Preset] = {
    "autopeft": Preset(
        "serial and parallel bottlenecks and prefixes in log2 sizes, and one bit per layer",
        "Zhou et al. 2024, AutoPEFT, section 3.1",
        _autopeft,
    ),
    "lora-per-layer": Preset(
        "LoRA on the linears of attention and mlp, with a separate rank (0: none) in every layer",
        "after Hu et al. 2021, LoRA, section 7",
        _lora_per_layer,
    ),
    "mam": Preset(
        "a prefix in attention and a parallel bottleneck at the mlp",
        "He et al. 2022, Towards a Unified View, section 4.6",
        _mam,
    ),
    "llm-adapters": Preset(
        "one of a series adapter, a parallel adapter or LoRA, at their published sites",
        "Hu et al. 2023, LLM-Adapters, section 3",
        _llm_adapters,
    ),
    "experts-per-layer": Preset(
        "a mixture of LoRAs on all linears, with a separate number of experts (0: a plain LoRA) in every layer",
        "after Gao et al. 2024, Higher Layers Need More LoRA Experts (MoLA), section 3.3",
        _experts_per_layer,
    ),
    **{
        name: Preset(
            f"mixtures of LoRAs on all linears, {' '.join(map(str, experts))} experts in the quarters of the layers",
            "Gao et al. 2024, Higher Layers Need More LoRA Experts (MoLA), section 3.3",
            partial(_mola, experts),
        )
        for name, experts in MOLA.items()
    },
}


def everywhere(backbone: Backbone, spec: AdapterSpec, roles: tuple[str, ...] | None = None) -> Architecture:
    """Return the architecture with `spec` at every site of `roles` (default: those of its type) that it fits."""
    allowed = spec.default_roles if roles is None else roles
    sites = [site.name for site in backbone.sites if site.role in allowed and spec.fits(site)]
    return Architecture.of({name: [spec] for name in sites})


def mola(experts: tuple[int, ...], backbone: Backbone) -> Architecture:
    """Return MoLA as published: mixtures of LoRAs of rank 8 on all linears, top-2 routing.

    `experts`: experts per layer in each quarter, lowest first.
    """
    count = {layer: experts[quarter] for quarter, layers in _quarters(backbone).items() for layer in layers}
    roles = linears(backbone)
    sites = {site.name: site.layer for site in backbone.sites if site.role in roles}
    return Architecture.of(
        {name: [replace(MOLA_EXPERTS, experts=count[layer])] for name, layer in sites.items() if layer is not None}
    )


def houlsby(backbone: Backbone) -> Architecture:
    """Return Houlsby et al. 2019, sections 2.1 and 3.1: adapters of size 64 after both sub-layers, and all norms."""
    adapters = everywhere(backbone, Bottleneck(size=64, init="houlsby"), ("attn", "mlp"))
    return Architecture.of(dict(chain(adapters.adapters, everywhere(backbone, Norm()).adapters)))


BASELINES: dict[str, Callable[[Backbone], Architecture]] = {
    "head": lambda backbone: Architecture(),
    # The widely copied default of PEFT; a model with a fused projection has it there.
    "lora-r8-qv": lambda backbone: everywhere(backbone, Lora(rank=8), queries_and_values(backbone)),
    "lora-all-linear": lambda backbone: everywhere(backbone, Lora(rank=8), linears(backbone)),
    "houlsby": houlsby,
    "ia3": lambda backbone: everywhere(backbone, Ia3()),
    "bitfit": lambda backbone: everywhere(backbone, Bitfit()),
    **{name: partial(mola, experts) for name, experts in MOLA.items()},
    "full": lambda backbone: everywhere(backbone, Full()),
}
