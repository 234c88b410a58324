"""LoRAs in the form that servers compute exactly: one rank and one scale, with zeros where a module has less.

vLLM and SGLang scale every update by `lora_alpha / r`, and most versions ignore `rank_pattern` and `alpha_pattern`
without a word. llama.cpp scales by `lora_alpha` over the rank of the tensor. With one rank and one scale they all agree
with peft.

SGLang stacks q, k and v of a layer, and gate and up: it needs q and v where any of the three has a LoRA, and gate where
up has one (`LoRAAdapter.normalize_qkv_proj` and `normalize_gate_up_proj` in its source).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autopeft.search_space.adapters import AdapterSpec
from autopeft.search_space.adapters.lora import DRAWN, Lora
from autopeft.search_space.adapters.low_rank import LowRank
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.backbones.introspection import UnknownBackboneError, describe
from autopeft.studies.exporters.base import State
from autopeft.studies.exporters.peft_types import PEFT_TYPES
from autopeft.studies.recipes.recipe import Recipe
from autopeft.studies.recipes.tensors import values_of

if TYPE_CHECKING:
    from torch import nn

#: The values of vLLM's `max_lora_rank`, for which servers have room.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
#: Roles that a layer must have for SGLang, by the role that needs them.
_STACKED = {
    "attn.q": ("attn.v",),
    "attn.k": ("attn.q", "attn.v"),
    "attn.v": ("attn.q",),
    "mlp.up": ("mlp.gate",),
}


def plain(recipe: Recipe, servers: bool) -> Recipe:
    """Return the recipe with trained LoRAs as readers of their weights know them, whatever they were made of.

    B A - B0 A0 is a LoRA of twice the rank, [B, -B0] [A; A0], as in peft's conversion of such an adapter. Other types
    with a low-rank update become the LoRA of its two factors: for `servers` all of them, else those that peft lacks.
    """
    return recipe.model_copy(
        update={
            "architecture": {
                name: tuple(_plain(spec, servers) for spec in specs) for name, specs in recipe.architecture.items()
            }
        }
    )


def _plain(spec: AdapterSpec, servers: bool) -> AdapterSpec:
    if isinstance(spec, LowRank) and (servers or spec.kind not in PEFT_TYPES):
        return Lora(rank=spec.total_rank, alpha=float(spec.total_rank))
    if not isinstance(spec, Lora) or spec.init in DRAWN:
        return spec
    if not spec.has_offset:
        return replace(spec, init=Lora().init)
    return replace(spec, rank=2 * spec.rank, alpha=spec.scale * 2 * spec.rank, scaling="alpha", init=Lora().init)


def plain_state(recipe: Recipe, target: Recipe, state: State) -> State:
    """Return the tensors of `target`, the result of `plain`, from those of `recipe`."""
    import torch

    found = dict(state)
    for (name, spec, values), (_, form) in zip(values_of(recipe, state), target.adapters, strict=True):
        if isinstance(spec, LowRank) and isinstance(form, Lora):
            shapes = {tensor: p.shape for tensor, p in spec.parameters(recipe.sites[name]).items()}
            own = {tensor: value[tuple(slice(n) for n in shapes[tensor])] for tensor, value in values.items()}
            a, b = spec.matrices_of_one(own)
            found |= {f"{name}/{form.kind}/A": a, f"{name}/{form.kind}/B": b}
        elif isinstance(spec, Lora) and spec.has_offset:
            key = f"{name}/{spec.kind}"
            a0, b0 = found.pop(f"{key}/A0"), found.pop(f"{key}/B0")
            found[f"{key}/A"] = torch.cat([found[f"{key}/A"], a0])
            found[f"{key}/B"] = torch.cat([found[f"{key}/B"], -b0], dim=1)
    return found


def converted(recipe: Recipe, target: Recipe) -> list[str]:
    """Return a line on the types that became plain LoRAs in `target`, the result of `plain`."""
    kinds = [kind for kind in recipe.adapters.kinds if kind not in target.adapters.kinds]
    if not kinds:
        return []
    own, as_loras = (one.adapters.stored_bytes(one.host) for one in (recipe, target))
    known = all(kind in PEFT_TYPES for kind in kinds)
    return [
        f"{', '.join(kinds)}: written as the plain LoRAs that compute the same, with {as_loras:,} bytes instead of"
        f" {own:,}; trained on, these train all their values and share none"
        + (" (--to peft-patterns has the form of the training)" if known else "")
    ]


def served(recipe: Recipe, model: nn.Module) -> Recipe:
    """Return a recipe of plain LoRAs, one per site, with one rank and one scale for all; any other one unchanged.

    LoRAs that agree in rank, alpha and the rule alpha / rank keep them: every reader computes that, nothing is padded,
    and the file can be trained on. `model`: the backbone, for sites that are not in the recipe.
    """
    if recipe.adapters.kinds != (Lora.kind,):
        return recipe
    loras = {name: spec for name, spec in recipe.adapters if isinstance(spec, Lora)}
    found = {name: replace(spec, **_common(list(loras.values()))) for name, spec in loras.items()}
    sites = dict(recipe.sites)
    if not recipe.head_modules:  # servers of language models
        some = next(iter(found.values()))
        for site in _absent([sites[name] for name in found], model):
            sites[site.name], found[site.name] = site, some
    return recipe.model_copy(
        update={"sites": sites, "architecture": {name: (spec,) for name, spec in found.items()}},
    )


def _common(loras: list[Lora]) -> dict[str, Any]:
    """Return the fields that decide rank and scale, with one value for all."""
    rank, alpha, scaling = loras[0].rank, loras[0].alpha, "alpha"
    if {(one.rank, one.alpha, one.scaling) for one in loras} != {(rank, alpha, scaling)}:
        largest = max(one.rank for one in loras)
        rank = next((rank for rank in RANKS if rank >= largest), largest)
        alpha = float(rank)
    return {"rank": rank, "alpha": alpha, "scaling": scaling}


def _absent(adapted: list[Site], model: nn.Module) -> Iterator[Site]:
    """Yield the sites that have no LoRA and need one of zeros, because a server stacks them with an adapted one."""
    present = {(site.layer, site.role) for site in adapted}
    needed = {(layer, other) for layer, role in present for other in _STACKED.get(role, ())} - present
    if not needed:
        return
    try:
        sites = describe(model, id="").sites
    except UnknownBackboneError:  # sites that were named by hand; no server knows such a model
        return
    yield from (site for site in sites if (site.layer, site.role) in needed)


def served_state(recipe: Recipe, target: Recipe, state: State) -> State:
    """Return the tensors of `target`, the result of `served`, from those of `recipe`: padded with zeros, B scaled."""
    import torch

    if target is recipe:
        return state
    found = dict(state)
    for name, spec in target.adapters:
        assert isinstance(spec, Lora)
        site = target.sites[name]
        a, b = torch.zeros(spec.rank, site.in_features), torch.zeros(site.out_features, spec.rank)
        for own in recipe.architecture.get(name, ()):
            assert isinstance(own, Lora)
            a[: own.rank] = state[f"{name}/{own.kind}/A"]
            b[:, : own.rank] = state[f"{name}/{own.kind}/B"] * (own.scale / spec.scale)
        found |= {f"{name}/{spec.kind}/A": a, f"{name}/{spec.kind}/B": b}
    return found


def remarks_on(recipe: Recipe, target: Recipe) -> list[str]:
    """Return what a user has to know about serving a file of peft: its form, its size and who refuses it."""
    if recipe.adapters.kinds != (Lora.kind,):
        which = ", ".join(recipe.adapters.kinds)
        return [f"vLLM, SGLang and llama.cpp serve plain LoRAs, not {which}: export `merged` for them"]
    lines = []
    rank = next(spec.rank for _, spec in target.adapters if isinstance(spec, Lora))
    own, padded = (one.adapters.stored_bytes(one.host) for one in (recipe, target))
    if padded != own:
        lines.append(
            f"the adapters have {padded:,} bytes in the form for servers (rank {rank} everywhere, filled up with"
            f" zeros), and {own:,} bytes in the form of the training (--to peft-patterns)"
        )
    if recipe.head_modules:
        lines.append("llama.cpp and many versions of vLLM refuse adapters with a task head: export `merged` for them")
    else:
        least = next((one for one in RANKS if one >= rank), rank)
        lines.append(
            f"vLLM (--max-lora-rank {least} or more, its default is 16), SGLang and llama.cpp compute the same as peft,"
            " if they serve LoRAs of this family"
        )
    return lines
