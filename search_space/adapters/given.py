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

from autopeft.search_space.adapters.peft_patterns import PatternError, Patterns
from autopeft.search_space.backbones.backbone import LINEAR_ROLES, Backbone, Site
from autopeft.search_space.domains import MOST

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

    `shapes`: (R, D_in, D_out) by the path of the module; `scales`: the factor of B A by the same path; `keys`: keys of
    the tensors by path and name ("A", "B"); `others`: keys of tensors that do not belong to a LoRA.
    """

    folder: Path
    shapes: Mapping[str, tuple[int, int, int]]
    scales: Mapping[str, float]
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

    def check(self, site: Site) -> None:
        """Raise GivenError if the LoRA for `site`, if there is one, has other features than the site."""
        path = self.at(site)
        if path is None:
            return
        rank, inner, outer = self.shapes[path]
        if (inner, outer) != (site.in_features, site.out_features):
            raise GivenError(
                f"{self.folder}: {path} has {inner} input and {outer} output features and rank {rank}; {site.name} has"
                f" {site.in_features} input and {site.out_features} output features"
            )


@lru_cache(maxsize=64)
def read(folder: str) -> Given:
    """Return the contents of a folder without its values.

    Raises GivenError if the folder cannot be read or does not contain a LoRA that can be an expert.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder)
    try:
        for file in (path / CONFIG, path / WEIGHTS):
            if not file.is_file():
                raise GivenError(f"{file}: no such file; given takes folders that peft's save_pretrained wrote")
        config = _config(path / CONFIG)
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        names: dict[tuple[str, str], str] = {}
        others: list[str] = []
        with safe_open(path / WEIGHTS, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (not a mapping)
                if match := _KEY.fullmatch(key):
                    tensor = tensors.get_slice(key)
                    if not tensor.get_dtype().startswith(("F", "BF")):
                        raise GivenError(f"{path / WEIGHTS}: {key} has no real numbers, but {tensor.get_dtype()}")
                    found.setdefault(match["module"], {})[match["factor"]] = tuple(tensor.get_shape())
                    names[match["module"], match["factor"]] = key
                else:
                    others.append(key)
    except GivenError:
        raise
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
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
    if not found:
        raise GivenError(f"{folder}: {WEIGHTS} has no LoRA weights")
    if len(found) > MOST_MODULES:
        raise GivenError(f"{path / WEIGHTS}: has LoRAs of {len(found):,} modules; it may have {MOST_MODULES:,}")
    shapes = {module: _shape(path / WEIGHTS, module, own) for module, own in found.items()}
    return Given(path, shapes, _scales(path / CONFIG, config, shapes), names, tuple(others))


#: Modules of a model that a LoRA may adapt.
MOST_MODULES = 5000
MOST_CONFIG_BYTES = 1_000_000

_PATTERN = "an object of patterns and numbers"
_MODULES = "a text or a list of texts"
#: What the settings that are read may be, besides null.
_TYPES: Mapping[str, str] = {
    "r": "a number",
    "lora_alpha": "a number",
    "use_rslora": "true or false",
    "bias": "a text",
    "rank_pattern": _PATTERN,
    "alpha_pattern": _PATTERN,
    "target_modules": _MODULES,
    "exclude_modules": _MODULES,
}


def _is(value: Any, what: str) -> bool:
    if what == "a number":
        return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < abs(value) <= MOST
    if what == "true or false":
        return isinstance(value, bool)
    if what == _PATTERN:
        return isinstance(value, dict) and all(_is(entry, "a number") for entry in value.values())
    texts = value if what == _MODULES and isinstance(value, list) else [value]
    return all(isinstance(text, str) for text in texts)


def _config(file: Path) -> dict[str, Any]:
    """Return the settings of a LoRA without those that are null. Raises GivenError."""
    if file.stat().st_size > MOST_CONFIG_BYTES:
        raise GivenError(f"{file}: is larger than {MOST_CONFIG_BYTES:,} bytes, so it is no configuration of a LoRA")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise GivenError(f"{file}: is nested too deeply") from None
    except ValueError as error:
        raise GivenError(f"{file}: is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise GivenError(f"{file}: is not a JSON object")
    config = {name: value for name, value in config.items() if value is not None}
    for name, what in _TYPES.items():
        if name in config and not _is(config[name], what):
            most = f" up to {MOST:,}" if what in ("a number", _PATTERN) else ""
            raise GivenError(f"{file}: {name} must be {what}{most}, got {config[name]!r:.40}")
    return config


def _shape(file: Path, module: str, own: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int]:
    """Return (R, D_in, D_out) of a pair of tensors. Raises GivenError."""
    shapes = " and ".join(f"lora_{name} {list(shape)}" for name, shape in sorted(own.items()))
    if len(own) < 2 or any(len(shape) != 2 or not all(shape) for shape in own.values()):
        raise GivenError(f"{file}: {module} needs matrices lora_A [rank, in] and lora_B [out, rank], has {shapes}")
    (rank, inner), (outer, other) = own["A"], own["B"]
    if rank != other:
        raise GivenError(f"{file}: the tensors of {module} differ in rank: {shapes}")
    return rank, inner, outer


def _scales(file: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int, int]]) -> Mapping[str, float]:
    """Return the factor of B A by the path of the module. Raises GivenError if peft would not load these LoRAs."""
    patterns, scales = Patterns(), {}
    targets, excluded = config.get("target_modules", "all-linear"), config.get("exclude_modules", ())
    try:
        for path, (rank, _, _) in shapes.items():
            if not patterns.names(targets, path) or (excluded and patterns.names(excluded, path)):
                raise GivenError(f"{file}: target_modules or exclude_modules leave out {path}, which has weights")
            said = patterns.value(config.get("rank_pattern", {}), path, config.get("r", rank))
            if said != rank:
                raise GivenError(f"{file}: says rank {said} for {path}, whose tensors have rank {rank}")
            alpha = patterns.value(config.get("alpha_pattern", {}), path, config.get("lora_alpha", PEFT_ALPHA))
            scales[path] = float(alpha) / (sqrt(rank) if config.get("use_rslora") else rank)
    except PatternError as error:
        raise GivenError(f"{file}: {error}") from None
    return scales


#: peft's default of `lora_alpha`.
PEFT_ALPHA = 8


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
        one.check(site)
        own = one.shapes[path][0]
        if own > rank:
            raise GivenError(f"{folder}: {path} has rank {own}, but the largest rank is {rank}")
        with safe_open(one.folder / WEIGHTS, framework="pt") as tensors:
            tensor = tensors.get_tensor(one.keys[path, name]).float()
        if name == "A":
            values[e, :own] = tensor
        else:
            values[e, :, :own] = one.scales[path] * tensor
    return values


def principal(folders: Sequence[str], site: Site, side: str, rest: Tensor) -> Tensor:
    """Return orthonormal directions in the shape of `rest`: rows for A: [N, D_in], columns for B: [D_out, N] (`side`).

    First come the leading singular vectors of all A, or B with the scale of each LoRA, at `site`. Where these have
    fewer than N, those of `rest` follow, made orthogonal. Raises GivenError as `stacked` does.
    """
    import torch

    values = stacked(folders, site, side, max(read(folder).rank for folder in folders))
    vectors = (values if side == "A" else values.mT).flatten(0, 1)
    _, sizes, rows = torch.linalg.svd(vectors, full_matrices=False)
    found = rows[sizes > LEAST_SIZE * sizes.max()]
    more = rest if side == "A" else rest.mT
    q, r = torch.linalg.qr(torch.cat([found, more])[: len(more)].mT)
    basis: Tensor = (q * r.diagonal().sign()).mT  # the first ones are those of `found`
    return basis if side == "A" else basis.mT


#: Singular values below this share of the largest are rounding.
LEAST_SIZE = 1e-6


def _same(path: str, module: str) -> bool:
    return path == module or path.endswith(f".{module}") or module.endswith(f".{path}")
