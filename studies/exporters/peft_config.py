"""A recipe as a configuration of HF peft: its class and arguments, or the reasons why there is none.

Every exporter that configures peft uses this. A peft configuration has one adapter type, one dropout and one
initialisation; ranks and alphas can differ by module, through patterns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from autopeft.search_space.adapters import AdapterSpec
from autopeft.search_space.adapters.lora import FROM_SITE, Lora
from autopeft.studies.exporters.base import Assessment, approximate, unsupported
from autopeft.studies.exporters.peft_types import PEFT_TYPES
from autopeft.studies.exporters.peft_types.base import Placed, most_common
from autopeft.studies.recipes.recipe import Recipe

# Families whose linear layers store [D_in, D_out], which peft has to know.
_TRANSPOSED_FAMILIES = ("gpt2",)
_NOT_IN_PEFT = {
    "bitfit": "peft trains biases only together with LoRA, and then all of them",
    "adapterbias": "peft has no AdapterBias",
    "bottleneck": "peft has no bottleneck adapters",
    "dense": "peft has no dense deltas (`merged` is exact)",
    "eigenlorax": "peft has no EigenLoRAx",
    "flora": "peft has no FLoRA",
    "full": "full fine-tuning is not an adapter",
    "hydra": "peft has no Hydra",
    "lily": "peft averages the gates over the tokens of all texts of a batch, which gives other outputs",
    "mos": "peft has no MoS",
    "mixture": "peft cannot train routed experts (`peft` and `merged` export trained LoRAs, weighted equally)",
    "prefix": "peft shifts the token positions by its prefix and has one length for all layers",
    "sparseadapter": "peft has no bottleneck adapters",
    "ssf": "peft has no SSF (scale and shift)",
}


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
    obstacles = (
        _obstacles(placed) or _obstacles_of_weights(placed, recipe) or PEFT_TYPES[placed[0][1].kind].obstacles(placed)
    )
    if obstacles:
        return PeftPlan(unsupported(*obstacles))
    own_type = PEFT_TYPES[placed[0][1].kind]
    config = own_type.config
    arguments: dict[str, Any] = {
        "task_type": recipe.task_class.peft_task_type,
        # Complete names, because peft matches suffixes: "layers.1.q" would also match "other.layers.1.q".
        "target_modules": [site.module for site, _ in placed],
    }
    if recipe.head_modules:
        arguments["modules_to_save"] = list(recipe.head_modules)
    if config != "LNTuningConfig" and _is_transposed(recipe):
        arguments["fan_in_fan_out"] = True
    own, lost = own_type.arguments(placed)
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
        if spec.kind not in PEFT_TYPES
    ]
    if reasons:
        return reasons
    majority = most_common(spec.kind for _, spec in placed)
    seen: set[str] = set()
    for site, spec in placed:
        if spec.kind != majority:
            reasons.append(f"{site.name} {spec.kind}: peft supports one adapter type per file, here {majority}")
        elif site.module in seen:
            reasons.append(f"{site.name} {spec.kind}: peft supports one adapter per module, this is the second")
        seen.add(site.module)
    return reasons


def _obstacles_of_weights(placed: Placed, recipe: Recipe) -> list[str]:
    """Return what prevents a type of peft from adapting weights as this model stores them."""
    reasons = []
    for site, spec in placed:
        own = PEFT_TYPES[spec.kind]
        if recipe.backbone.quantization is not None and own.quantised:
            reasons.append(f"{site.name} {spec.kind}: {own.quantised}, which is quantised")
        elif _is_transposed(recipe) and own.transposed:
            reasons.append(f"{site.name} {spec.kind}: {own.transposed}, which {recipe.backbone.family} has")
    return reasons


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


def flat_vectors(recipe: Recipe) -> list[str]:
    """Return the parts of the names of vectors that have two dimensions in peft."""
    return list(dict.fromkeys(f".{own.flat}." for kind in recipe.adapters.kinds if (own := PEFT_TYPES[kind]).flat))


def decayed_vectors(recipe: Recipe) -> list[str]:
    """Return a line for each vector that transformers' Trainer decays in its own groups and the study does not."""
    if recipe.training.weight_decay == 0.0:
        return []
    return [
        f"{name} {spec.kind}: weight_decay {recipe.training.weight_decay} also applies to its {own.decayed}"
        for name, spec in recipe.adapters
        if (own := PEFT_TYPES[spec.kind]).decayed
    ]
