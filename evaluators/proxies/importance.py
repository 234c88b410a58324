"""Proxies that measure the importance of each sub-layer of the frozen model and weight adapters by it.

Notation: the residual branch of a sub-layer reads x from the residual stream and adds c to it, both [N, T, D].

One measurement over a few minibatches serves any number of architectures:

    score = - sum over adapters of importance(sub-layer) * log(1 + parameters)

The logarithm, because each doubling of a size has about the same effect; without it the score would rank like
`num_params`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum, log1p, nan
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from autopeft.evaluators.base import Progress
from autopeft.evaluators.proxies.zero_cost import ZeroCost
from autopeft.evaluators.training.base import TrainingEvaluator
from autopeft.search_space.adapters import AdapterSpec
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import Site

SUBLAYERS = ("attn", "mlp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A residual branch: x is the input of the module `entrance`, c the output of the module `exit`."""

    layer: int
    sublayer: str
    entrance: str
    exit: str


class Importance(ZeroCost):
    """See the top of this file. The measurement runs at the first call of `scores` and is cached.

    A norm has the mean importance of its layer, and a site outside the layers the mean of all sub-layers. Training the
    backbone itself counts as adapters of equal size in all sub-layers.
    """

    _importances: Mapping[Branch, float] | None = None

    @abstractmethod
    def measure(self, branches: Sequence[Branch], progress: Progress) -> list[float]:
        """Return the importance of each branch; call `progress` after each step."""

    def importances(self, progress: Progress | None = None) -> Mapping[Branch, float]:
        """Return the importance of every residual branch, measured at the first call."""
        if self._importances is None:
            branches = residual_branches(self.evaluator)
            measured = self.measure(branches, progress or (lambda done, of: None))
            self._importances = dict(zip(branches, measured, strict=True))
        return self._importances

    @override
    def scores(self, architectures: Sequence[Architecture], progress: Progress | None = None) -> list[float]:
        self.importances(progress)
        backbone = self.evaluator.backbone
        return [-fsum(self._worth(backbone.site(name), spec) for name, spec in a) for a in architectures]

    def _worth(self, site: Site, spec: AdapterSpec) -> float:
        importances = self.importances()
        if site.role == "backbone":
            return fsum(importances.values()) * log1p(spec.num_params(site) / max(1, len(importances)))
        layer = {branch.sublayer: value for branch, value in importances.items() if branch.layer == site.layer}
        sublayer = site.role.partition(".")[0]
        importance = layer[sublayer] if sublayer in layer else _mean(layer or importances)
        return importance * log1p(spec.num_params(site))


def _mean(importances: Mapping[Any, float]) -> float:
    return fsum(importances.values()) / len(importances) if importances else nan


@torch.no_grad()
def residual_branches(evaluator: TrainingEvaluator) -> list[Branch]:
    """Return the branches of the attention and mlp sub-layers, traced with the forward pass of one example.

    - In a pre-norm layer (its attention reads the output of a norm of the layer), x is the input of that norm. In
      others (BERT), x is the input of the sub-layer itself.
    - c is the output of the sub-layer's last linear, or of a norm directly after it (Gemma 2), which would undo any
      scaling of c.
    """
    model, backbone = evaluator.model, evaluator.backbone
    sublayers = [site for site in backbone.sites if site.role in SUBLAYERS]
    norms = [site for site in backbone.sites if site.role == "norm" and site.layer is not None]
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    paths = {path for site in (*sublayers, *norms) for path in (site.module, site.input_module)}

    def trace(path: str) -> Any:
        # Holding the tensors prevents the reuse of their addresses.
        def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[path], outputs[path] = args[0], output

        return model.get_submodule(path).register_forward_hook(hook)

    handles = [trace(path) for path in paths]
    try:
        evaluator.task.scores(model, evaluator.batch("train", [0]))
    finally:
        for handle in handles:
            handle.remove()

    branches = []
    for layer in range(backbone.num_layers):
        layer_norms = [site.module for site in norms if site.layer == layer]
        norm_before = {outputs[norm].data_ptr(): norm for norm in layer_norms}
        norm_after = {inputs[norm].data_ptr(): norm for norm in layer_norms}
        layer_sites = [site for site in sublayers if site.layer == layer]
        if layer_sites and inputs[layer_sites[0].input_module].data_ptr() not in norm_before:
            norm_before = {}  # post-norm: the output of a norm is the residual stream itself
        for site in layer_sites:
            entrance = norm_before.get(inputs[site.input_module].data_ptr(), site.input_module)
            exit = norm_after.get(outputs[site.module].data_ptr(), site.module)
            branches.append(Branch(layer=layer, sublayer=site.role, entrance=entrance, exit=exit))
    return branches
