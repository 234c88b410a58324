"""The task head: its linear layers as sites, and the banks that replace them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import nn

from autopeft.search_space.adapters.head import Head
from autopeft.search_space.backbones.backbone import Backbone, Site
from autopeft.search_space.runtime.bank import Bank


def head_sites(model: nn.Module, backbone: Backbone) -> tuple[Site, ...]:
    """Return the linear layers of the task head as sites. Raises ValueError for other trainable modules."""
    sites = []
    for head in backbone.head_modules:
        for name, module in model.get_submodule(head).named_modules(prefix=head):
            if isinstance(module, nn.Linear):
                sites.append(
                    Site(
                        name=f"head.{name}",
                        layer=None,
                        role="head",
                        module=name,
                        input_module=name,
                        in_features=module.in_features,
                        out_features=module.out_features,
                        bias=module.bias is not None,
                    )
                )
            elif any(True for _ in module.parameters(recurse=False)):
                raise ValueError(f"unsupported task head: {name!r} is a {type(module).__name__}, not a Linear")
    return tuple(sites)


def head_bank(site: Site, model: nn.Module, seeds: Sequence[int | str], pretrained: bool) -> Bank:
    """Return a bank for a linear of the task head, with a slot per seed: new weights, or copies of the model's."""
    base = cast(nn.Linear, model.get_submodule(site.module))
    bank = Bank(site, [Head()] * len(seeds), base, seeds)
    if pretrained:
        for k in range(len(seeds)):
            bank.load_slot(k, {"W": base.weight, "b": base.bias})
    return bank
