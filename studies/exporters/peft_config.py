"""A recipe as a configuration of HF peft: its class and arguments, or the reasons why there is none.

Every exporter that configures peft uses this. A peft configuration has one adapter type, one dropout and one
initialisation; ranks and alphas can differ by module, through patterns.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

from autopeft.search_space.adapters import AdapterSpec
from autopeft.search_space.adapters.lora import FROM_SITE, Lora
from autopeft.search_space.adapters.shira import Shira
from autopeft.search_space.adapters.vera import Vera
from autopeft.search_space.backbones.backbone import Site
from autopeft.studies.exporters.base import Assessment, approximate, unsupported
from autopeft.studies.recipes.recipe import Recipe

_LORA_INITS = {"kaiming": True, "gaussian": "gaussian"} | {name: name for name in ("pissa", "pissa_niter_4", "olora")}
# Families whose linear layers store [D_in, D_out], which peft has to know.
_TRANSPOSED_FAMILIES = ("gpt2",)
_NOT_IN_PEFT = {
    "bitfit": "peft trains biases only together with LoRA, and then all of them",
    "bottleneck": "peft has no bottleneck adapters",
    "full": "full fine-tuning is not an adapter",
    "mixture": "peft cannot train routed experts (`peft` and `merged` export trained LoRAs, weighted equally)",
    "prefix": "peft shifts the token positions by its prefix and has one length for all layers",
    "ssf": "peft has no SSF (scale and shift)",
}

Placed = Sequence[tuple[Site, AdapterSpec]]


@dataclass(frozen=True, slots=True)
class PeftPlan:
    """A configuration of peft: the name of its class in `peft`, and the arguments.

    Both are empty where `fit` is "unsupported".
    """

    fit: Assessment
    config: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        """Make the configuration, an instance of peft's class."""
        import peft

        return getattr(peft, self.config)(**self.arguments)


def plan(recipe: Recipe) -> PeftPlan:
    """Return the configuration of a recipe's adapters and task head."""
    placed = [(recipe.sites[name], spec) for name, spec in recipe.adapters]
    obstacles = _obstacles(placed) or _shira_obstacles(placed, recipe)
    if obstacles:
        return PeftPlan(unsupported(*obstacles))
    config, own_arguments = _TYPES[placed[0][1].kind]
    arguments: dict[str, Any] = {
        "task_type": recipe.task_class.peft_task_type,
        # Complete names, because peft matches suffixes: "layers.1.q" would also match "other.layers.1.q".
        "target_modules": [site.module for site, _ in placed],
    }
    if recipe.head_modules:
        arguments["modules_to_save"] = list(recipe.head_modules)
    if config != "LNTuningConfig" and _is_transposed(recipe):
        arguments["fan_in_fan_out"] = True
    own, lost = own_arguments(placed)
    init = own.get("init_lora_weights")
    if reason := _init_obstacle(recipe, init):
        lost.append(f"init {init}: {reason} (affects only training)")
        again = init == "pissa_niter_4" and recipe.backbone.quantization is None
        own["init_lora_weights"] = "pissa" if again else True
    return PeftPlan(approximate(*lost, *_lost_in_int8(recipe)), config, arguments | own)


def _init_obstacle(recipe: Recipe, init: Any) -> str:
    """Return why peft cannot start the LoRAs of this model so; empty if it can."""
    if init == "pissa_niter_4":
        return "peft draws other random numbers for it when it loads the adapter again; its pissa is exact"
    if init in FROM_SITE and recipe.backbone.quantization is not None:
        return f"peft does not take it from weights in {recipe.backbone.quantization}"
    if init == "olora" and _is_transposed(recipe):
        return f"peft does not support transposed weights with it, which {recipe.backbone.family} has"
    return ""


def _is_transposed(recipe: Recipe) -> bool:
    """Return whether the weights are [D_in, D_out]; bitsandbytes stores them as [D_out, D_in] in every family."""
    return recipe.backbone.family in _TRANSPOSED_FAMILIES and recipe.backbone.quantization is None


def _lost_in_int8(recipe: Recipe) -> list[str]:
    if recipe.backbone.quantization != "int8":
        return []
    return [
        "backbone in int8: bitsandbytes' LLM.int8() rounds the inputs of its linears too, here only weights are rounded"
    ]


def _obstacles(placed: Placed) -> list[str]:
    if not placed:
        return ["the recipe has no adapters: only the task head was trained"]
    reasons = [
        f"{site.name} {spec.kind}: {_NOT_IN_PEFT.get(spec.kind, 'peft has no such adapter')}"
        for site, spec in placed
        if spec.kind not in _TYPES
    ]
    if reasons:
        return reasons
    majority = _most_common(spec.kind for _, spec in placed)
    seen: set[str] = set()
    for site, spec in placed:
        if spec.kind != majority:
            reasons.append(f"{site.name} {spec.kind}: peft supports one adapter type per file, here {majority}")
        elif site.module in seen:
            reasons.append(f"{site.name} {spec.kind}: peft supports one adapter per module, this is the second")
        seen.add(site.module)
    keys = {spec.projection_key for _, spec in placed if isinstance(spec, Vera)}
    if len(keys) > 1:
        reasons.append(
            f"{placed[0][0].name} vera: peft supports one pair of projections per file, here there are {len(keys)}"
        )
    return reasons


def _shira_obstacles(placed: Placed, recipe: Recipe) -> list[str]:
    sparse = [(site, spec) for site, spec in placed if isinstance(spec, Shira)]
    if recipe.backbone.quantization is not None:
        return [f"{site.name} shira: peft adds it to the weight itself, which is quantised" for site, _ in sparse]
    if _is_transposed(recipe):
        family = recipe.backbone.family
        return [
            f"{site.name} shira: peft does not support transposed weights, which {family} has" for site, _ in sparse
        ]
    ranks = [spec.rank for _, spec in sparse]
    return [
        f"{site.name} shira: rank {spec.rank}, but peft supports one rank for all, here {_most_common(ranks)}"
        for site, spec in sparse
        if spec.rank != _most_common(ranks)
    ]


def _most_common(values: Iterable[Any]) -> Any:
    """Return the most frequent value; of several, the first."""
    return Counter(values).most_common(1)[0][0]


def _patterns(by_module: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """Return the value of most modules, and the other values by a pattern that matches their module alone."""
    default = _most_common(by_module.values())
    return default, {anchored(module): value for module, value in by_module.items() if value != default}


def anchored(module: str) -> str:
    """Return a pattern for this module alone; without the anchor, peft also matches the end of longer names."""
    return f"^{re.escape(module)}"


def _whole(number: float) -> float:
    """Return 16.0 as 16, because peft and tools that read its files expect integers."""
    return int(number) if number == int(number) else number


def _lora(placed: Placed) -> tuple[dict[str, Any], list[str]]:
    loras = [(site, spec) for site, spec in placed if isinstance(spec, Lora)]
    root = all(spec.scaling == "rslora" for _, spec in loras)
    ranks = {site.module: spec.rank for site, spec in loras}
    # One flag decides how alpha becomes a scale; where the rules are mixed, alpha is converted to keep each scale.
    alphas = {
        site.module: _whole(spec.alpha if root or spec.scaling == "alpha" else spec.alpha * sqrt(spec.rank))
        for site, spec in loras
    }
    rank, rank_pattern = _patterns(ranks)
    alpha, alpha_pattern = _patterns(alphas)
    dropout = _most_common(spec.dropout for _, spec in loras)
    init = _most_common(spec.init for _, spec in loras)
    lost = _lost_values(placed, {"dropout": dropout, "init": init})
    if init not in _LORA_INITS:
        reason = f"peft needs a pass over rows for init {init!r}" if init in FROM_SITE else f"peft has no init {init!r}"
        lost += [f"{site.name} {spec.kind}: {reason} (affects only training)" for site, spec in loras]
    arguments = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": dropout,
        "init_lora_weights": _LORA_INITS.get(init, True),
        "bias": "none",
        "use_rslora": root,
        "use_dora": loras[0][1].kind == "dora",
    }
    return arguments, lost


def _lost_values(placed: Placed, common: Mapping[str, Any]) -> list[str]:
    """Return a line for each field of a site that differs from the `common` value, which peft gets."""
    return [
        f"{site.name} {spec.kind}: {name} {own} becomes {value}, one for all sites (affects only training)"
        for site, spec in placed
        for name, value in common.items()
        if (own := getattr(spec, name)) != value
    ]


def _vera(placed: Placed) -> tuple[dict[str, Any], list[str]]:
    veras = [spec for _, spec in placed if isinstance(spec, Vera)]
    # A smaller rank is the largest rank with zeros in the additional rows.
    rank = max(spec.rank for spec in veras)
    common = {name: _most_common(getattr(spec, name) for spec in veras) for name in ("dropout", "d_initial")}
    arguments = {
        "r": rank,
        "projection_prng_key": veras[0].projection_key,
        "save_projection": True,
        "vera_dropout": common["dropout"],
        "d_initial": common["d_initial"],
    }
    return arguments, _lost_values(placed, {"rank": rank, **common})


def _shira(placed: Placed) -> tuple[dict[str, Any], list[str]]:
    shiras = [(site, spec) for site, spec in placed if isinstance(spec, Shira)]
    lost = [
        f"{site.name} shira: scale {spec.scale} becomes part of the values (affects only training)"
        for site, spec in shiras
        if spec.scale != 1.0
    ]
    return {"r": shiras[0][1].rank, "mask_type": "random"}, lost


def _ia3(placed: Placed) -> tuple[dict[str, Any], list[str]]:
    return {"feedforward_modules": [site.module for site, _ in placed if site.role == "mlp.down"]}, []


def _norm(placed: Placed) -> tuple[dict[str, Any], list[str]]:
    return {}, []


# By adapter type: the class of peft's configuration and a function for the arguments of that class.
_TYPES: dict[str, tuple[str, Callable[[Placed], tuple[dict[str, Any], list[str]]]]] = {
    "lora": ("LoraConfig", _lora),
    "dora": ("LoraConfig", _lora),
    "vera": ("VeraConfig", _vera),
    "shira": ("ShiraConfig", _shira),
    "ia3": ("IA3Config", _ia3),
    "norm": ("LNTuningConfig", _norm),
}


#: The module of peft that has a tensor of a LoRA, by the tensor's name.
_IN_PEFT = {"A": "lora_A", "B": "lora_B", "m": "lora_magnitude_vector"}


def rate_factors(recipe: Recipe) -> dict[str, float]:
    """Return the factors of the learning rate that are not 1, by the part of a parameter's name in peft that has it."""
    found: dict[str, dict[str, float]] = {}
    for name, spec in recipe.adapters:
        site = recipe.sites[name]
        for tensor, parameter in spec.parameters(site).items():
            if parameter.trainable:
                suffix = _suffix(spec, tensor)
                found.setdefault(suffix, {})[f"base_model.model.{site.module}{suffix}"] = spec.rate_of(tensor)
    factors: dict[str, float] = {}
    for suffix, of_modules in found.items():
        values = set(of_modules.values())
        factors |= {suffix: values.pop()} if suffix != "." and len(values) == 1 else of_modules
    return {part: factor for part, factor in factors.items() if factor != 1.0}


def frozen_parts(recipe: Recipe) -> list[str]:
    """Return the parts of the names of parameters that peft trains and the study does not."""
    loras = [(name, spec) for name, spec in recipe.adapters if isinstance(spec, Lora)]
    frozen = [f"base_model.model.{recipe.sites[name].module}.lora_A." for name, spec in loras if spec.freeze_a]
    return [".lora_A."] if frozen and len(frozen) == len(loras) else frozen


def _suffix(spec: AdapterSpec, tensor: str) -> str:
    return f".{_IN_PEFT[tensor]}." if isinstance(spec, Lora) else "."


def decayed_vectors(recipe: Recipe) -> list[str]:
    """Return a line for each vector that transformers' Trainer decays in its own groups and the study does not."""
    if recipe.training.weight_decay == 0.0 or rate_factors(recipe):  # these need parameter groups of their own
        return []
    names = {"dora": "magnitude", "vera": "vectors", "shira": "values", "ia3": "scale"}
    return [
        f"{name} {spec.kind}: weight_decay {recipe.training.weight_decay} also applies to its {names[spec.kind]}"
        for name, spec in recipe.adapters
        if spec.kind in names
    ]
