"""LoRAs that were trained elsewhere, as the experts of a mixture: what is in their folders, and where it belongs.

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
#: Settings of peft with which a LoRA is more than scale * B A at linears.
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
#: Ways to start that take a part out of the model's weights, to which the LoRA does not belong then.
_TAKING = ("pissa", "olora", "corda", "loftq", "lora_ga")


class GivenError(ValueError):
    """A folder whose LoRA cannot be an expert."""


@dataclass(frozen=True, slots=True)
class Given:
    """A folder as peft's `save_pretrained` writes it. `shapes`: (R, D_in, D_out) by the path of the module, `keys`: of
    the tensors by path and name, `others`: of tensors that are no LoRA's.
    """

    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, int, int]]
    keys: Mapping[tuple[str, str], str]
    others: tuple[str, ...]

    @property
    def rank(self) -> int:
        return max(rank for rank, _, _ in self.shapes.values())

    def at(self, site: Site) -> str | None:
        """The path under which the folder has a LoRA for a site. The model may be wrapped in another on either side."""
        return next((path for path in self.shapes if _same(path, site.module)), None)

    def beyond(self, backbone: Backbone) -> list[str]:
        """What no expert at a linear of this model would have. A task head is none of it: studies train their own."""
        linears = [site.module for site in backbone.sites if site.role in LINEAR_ROLES]
        apart = [path for path in self.shapes if not any(_same(path, module) for module in linears)]
        heads = [f".{head}." for head in backbone.head_modules]
        return [name for name in (*apart, *self.others) if not any(head in f".{name}." for head in heads)]

    def scale(self, path: str) -> float:
        rank = self.shapes[path][0]
        alpha = _of_pattern(self.config.get("alpha_pattern") or {}, path, self.config["lora_alpha"])
        return float(alpha) / (sqrt(rank) if self.config.get("use_rslora") else rank)


@lru_cache(maxsize=64)
def read(folder: str) -> Given:
    """Raises GivenError: it cannot be read, or is no LoRA that can be an expert."""
    from safetensors import SafetensorError, safe_open

    path = Path(folder)
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        names: dict[tuple[str, str], str] = {}
        others: list[str] = []
        with safe_open(path / WEIGHTS, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (no mapping)
                if match := _KEY.fullmatch(key):
                    found.setdefault(match["module"], {})[match["factor"]] = tuple(tensors.get_slice(key).get_shape())
                    names[match["module"], match["factor"]] = key
                else:
                    others.append(key)
    except (OSError, ValueError, SafetensorError) as error:
        raise GivenError(f"{folder}: cannot be read as an adapter of peft: {error}") from None
    if config.get("peft_type") != "LORA":
        raise GivenError(f"{folder}: peft_type {config.get('peft_type')!r}; only LoRAs can be given")
    more = [name for name in _OTHERS if config.get(name)] + ["bias"] * (config.get("bias", "none") != "none")
    if more:
        raise GivenError(f"{folder}: {', '.join(f'{name}: {config[name]}' for name in more)}: more than a plain LoRA")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_TAKING):
        raise GivenError(
            f"{folder}: init_lora_weights: {start}: this LoRA is for what that start has left of the model's weights; "
            "save it with path_initial_model_for_weight_conversion"
        )
    shapes = {module: (*own["A"], own["B"][0]) for module, own in found.items() if len(own) == 2}
    if not shapes:
        raise GivenError(f"{folder}: there is no LoRA in {WEIGHTS}")
    return Given(path, config, shapes, names, tuple(others))  # type: ignore[arg-type]


def sites_of(folders: Sequence[str], backbone: Backbone) -> list[Site]:
    """Those that any of them has a LoRA for. Raises GivenError for one that has more than that."""
    library = [read(folder) for folder in folders]
    found = [site for site in backbone.sites if site.role in LINEAR_ROLES and any(one.at(site) for one in library)]
    for one in library if found else ():
        if beyond := one.beyond(backbone):
            raise GivenError(f"{one.folder}: {', '.join(beyond[:4])}: no linear that a LoRA can be given for here")
    return found


def stacked(folders: Sequence[str], site: Site, name: str, rank: int) -> Tensor:
    """A: [E, R, D_in] or B: [E, D_out, R] of a site, by `name`; B with the LoRA's own scale, 0 where there is none.
    Raises GivenError for another shape.
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
                f"{folder}: {path} is {inner} to {outer}, {site.name} {site.in_features} to {site.out_features}"
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
    """As peft looks a module's value up."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default
