"""Pretrained LoRAs as the experts of a mixture: contents of their folders and assignment to sites.

Notation: E folders, R the largest rank among them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopeft.search_space.backbones.backbone import LINEAR_ROLES, Backbone, Site

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
#: Settings of peft that make a LoRA more than scale * B A at linears.
_OTHERS = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "target_parameters",
    "fan_in_fan_out",
    "layer_replication",
)
#: Initialisations that subtract a part from the model's weights, so that the LoRA does not fit the original weights.
_TAKING = ("pissa", "olora", "corda", "loftq", "lora_ga")


class GivenError(ValueError):
    """A folder does not contain a LoRA that can be an expert."""


@dataclass(frozen=True, slots=True)
class Given:
    """A folder that peft's `save_pretrained` wrote.

    `shapes`: (R, D_in, D_out) by the path of the module; `keys`: keys of the tensors by path and name ("A", "B");
    `others`: keys of tensors that do not belong to a LoRA.
    """

    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, int, int]]
    keys: Mapping[tuple[str, str], str]
    others: tuple[str, ...]

    @property
    def rank(self) -> int:
        """Largest rank in the folder."""
        return max(rank for rank, _, _ in self.shapes.values())

    def at(self, site: Site) -> str | None:
        """Return the path of the LoRA for `site`; None if there is none.

        The module path may have a prefix on either side, because each model may be wrapped in another one.
        """
        return next((path for path in self.shapes if _same(path, site.module)), None)

    def beyond(self, backbone: Backbone) -> list[str]:
        """Return the names of modules and tensors that no expert at a linear of `backbone` can contain.

        Task heads do not count, because studies train their own.
        """
        linears = [site.module for site in backbone.sites if site.role in LINEAR_ROLES]
        apart = [path for path in self.shapes if not any(_same(path, module) for module in linears)]
        heads = [f".{head}." for head in backbone.head_modules]
        return [name for name in (*apart, *self.others) if not any(head in f".{name}." for head in heads)]

    def scale(self, path: str) -> float:
        """Return the factor of B A at the module `path`."""
        rank = self.shapes[path][0]
        alpha = _of_pattern(self.config.get("alpha_pattern") or {}, path, self.config["lora_alpha"])
        return float(alpha) / (sqrt(rank) if self.config.get("use_rslora") else rank)


@lru_cache(maxsize=64)
def read(folder: str) -> Given:
    """Return the contents of a folder without its values.

    Raises GivenError if the folder cannot be read or does not contain a LoRA that can be an expert.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder)
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        names: dict[tuple[str, str], str] = {}
        others: list[str] = []
        with safe_open(path / WEIGHTS, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (not a mapping)
                if match := _KEY.fullmatch(key):
                    found.setdefault(match["module"], {})[match["factor"]] = tuple(tensors.get_slice(key).get_shape())
                    names[match["module"], match["factor"]] = key
                else:
                    others.append(key)
    except (OSError, ValueError, SafetensorError) as error:
        raise GivenError(f"{folder}: is not a readable peft adapter: {error}") from None
    if config.get("peft_type") != "LORA":
        raise GivenError(
            f"{folder}: has peft_type {config.get('peft_type')!r}, but only LoRAs can be pretrained experts"
        )
    more = [name for name in _OTHERS if config.get(name)] + ["bias"] * (config.get("bias", "none") != "none")
    if more:
        own = ", ".join(f"{name}: {config[name]}" for name in more)
        raise GivenError(f"{folder}: pretrained experts must be plain LoRAs, without {own}")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_TAKING):
        raise GivenError(
            f"{folder}: init_lora_weights: {start} changes the weights of the model, so this LoRA does not "
            "fit the original model; save it with path_initial_model_for_weight_conversion"
        )
    shapes = {module: (*own["A"], own["B"][0]) for module, own in found.items() if len(own) == 2}
    if not shapes:
        raise GivenError(f"{folder}: {WEIGHTS} has no LoRA weights")
    return Given(path, config, shapes, names, tuple(others))  # type: ignore[arg-type]


def sites_of(folders: Sequence[str], backbone: Backbone) -> list[Site]:
    """Return the sites for which any of the folders has a LoRA.

    Raises GivenError for a folder that contains anything else.
    """
    library = [read(folder) for folder in folders]
    found = [site for site in backbone.sites if site.role in LINEAR_ROLES and any(one.at(site) for one in library)]
    for one in library if found else ():
        if beyond := one.beyond(backbone):
            raise GivenError(
                f"{one.folder}: has weights that belong to no linear layer of this model: {', '.join(beyond[:4])}"
            )
    return found


def stacked(folders: Sequence[str], site: Site, name: str, rank: int) -> Tensor:
    """Return A: [E, R, D_in] or B: [E, D_out, R] (`name`) of the experts at `site`.

    B includes the scale of each LoRA. A folder without a LoRA for the site contributes zeros. Raises GivenError for a
    LoRA of another shape.
    """
    import torch
    from safetensors import safe_open

    shape = (rank, site.in_features) if name == "A" else (site.out_features, rank)
    values = torch.zeros(len(folders), *shape)
    for e, folder in enumerate(folders):
        one = read(folder)
        path = one.at(site)
        if path is None:
            continue
        own, inner, outer = one.shapes[path]
        if (inner, outer) != (site.in_features, site.out_features) or own > rank:
            raise GivenError(
                f"{folder}: {path} has {inner} input and {outer} output features and rank {own}; {site.name} has"
                f" {site.in_features} input and {site.out_features} output features, and the largest rank is {rank}"
            )
        with safe_open(one.folder / WEIGHTS, framework="pt") as tensors:
            tensor = tensors.get_tensor(one.keys[path, name]).float()
        if name == "A":
            values[e, :own] = tensor
        else:
            values[e, :, :own] = one.scale(path) * tensor
    return values


def _same(path: str, module: str) -> bool:
    return path == module or path.endswith(f".{module}") or module.endswith(f".{path}")


def _of_pattern(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """Return the value for the module `path` by peft's rule: the first pattern that matches, or the default."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default
