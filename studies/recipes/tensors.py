"""The tensors of each adapter of a trained recipe, with those that its sites share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from autopeft.search_space.adapters import AdapterSpec
from autopeft.search_space.sharing import key_of
from autopeft.studies.recipes.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor


def values_of(recipe: Recipe, state: Mapping[str, Tensor]) -> Iterator[tuple[str, AdapterSpec, dict[str, Tensor]]]:
    """Yield site, adapter and its tensors by name, with those that follow from a key.

    Tensors that sites share have the size of the largest site.
    """
    import torch

    from autopeft.search_space.runtime.init import initialise, stream
    from autopeft.search_space.runtime.pool import pools_of

    pools = pools_of([recipe.adapters.placed(recipe.host)], [recipe.seed], torch.device("cpu"), draw=False)
    for name, spec in recipe.adapters:
        site = recipe.sites[name]
        values = tensors_at(state, name, spec.kind)
        for tensor, parameter in spec.parameters(site).items():
            if parameter.scope != "site":
                key = key_of(parameter, tensor, site, spec.kind)
                values[tensor] = state[key.path] if parameter.stored else pools[key].value.detach()[0]
            elif not parameter.stored:
                words = (parameter.key, site.name, spec.kind, tensor)  # as a bank draws it
                values[tensor] = initialise(parameter, stream(*words), None)
        yield name, spec, values


def tensors_at(state: Mapping[str, Tensor], site: str, kind: str) -> dict[str, Tensor]:
    """Return the tensors of a site and a kind by their own names."""
    prefix = f"{site}/{kind}/"
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
