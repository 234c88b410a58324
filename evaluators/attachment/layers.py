"""The layers of a model: their paths, and other forward functions for those that training runs with gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from posixpath import commonpath
from typing import TYPE_CHECKING, Any

from torch import nn

from autopeft.evaluators.attachment.hooks import ForwardReplacement
from autopeft.search_space.backbones.backbone import Backbone

if TYPE_CHECKING:
    from autopeft.evaluators.attachment.attachment import Attachment

Forward = Callable[..., Any]


def layer_paths(backbone: Backbone) -> list[str]:
    """Return the module paths of the layers: the common parts of the paths of their sites."""
    paths = []
    for layer in range(backbone.num_layers):
        inside = [site.module.replace(".", "/") for site in backbone.sites if site.layer == layer]
        paths.append(commonpath(inside).replace("/", "."))
    return paths


@contextmanager
def wrapped_layers(attachment: Attachment, wrap: Callable[[int, Forward], Forward]) -> Iterator[None]:
    """Run the layers from the lowest adapter on by `wrap(layer, its forward function)` within the block.

    The layers below keep nothing for the backward pass.
    """
    model = attachment.model[0]
    modules = {model.get_submodule(path): n for n, path in enumerate(layer_paths(attachment.backbone))}
    replacements = [
        ForwardReplacement(module, wrap(layer, module.forward))
        for module, layer in modules.items()
        if layer >= attachment.depth
    ]
    try:
        yield
    finally:
        for replacement in replacements:
            replacement.remove()


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Let a decoder keep no keys and values of its layers within the block.

    A pass over whole rows has no use for them. They take the memory of two projections in every layer, and a layer that
    runs again for its backward pass would append them twice.
    """
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    before = [(config, config.use_cache) for config in configs.values() if getattr(config, "use_cache", None)]
    for config, _ in before:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in before:
            config.use_cache = value
