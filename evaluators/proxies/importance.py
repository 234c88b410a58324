"""Proxies that know how much each sub-layer of the frozen model matters, and weigh adapters by it.

Notation: a sub-layer's residual branch takes x from the residual stream and adds c to it, both [N, T, D].

One measurement over a few minibatches, then any number of architectures by arithmetic:

    score = - sum over adapters of importance(sub-layer) * log(1 + parameters)

The logarithm, because each doubling of a size brings about the same; a share of the parameters would rank like
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

from autopeft.evaluators.base import Progress
from autopeft.evaluators.proxies.zero_cost import ZeroCost
from autopeft.evaluators.training.base import TrainingEvaluator
from autopeft.search_space.adapters import AdapterSpec
from autopeft.search_space.backbones.backbone import Site

SUBLAYERS = ("attn", "mlp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A residual branch: x enters the module `entrance`, c leaves the module `exit`."""

    layer: int
    sublayer: str
    entrance: str
    exit: str


class Importance(ZeroCost):
    """See the top of this file. Measures at the first call of `scores`.

    A norm has the mean importance of its layer, a site outside the layers that of all, and training the backbone itself
    spreads its parameters evenly over the sub-layers.
    """

    _known: Mapping[Branch, float] | None = None

    @abstractmethod
    def measure(self, branches: Sequence[Branch], progress: Progress) -> list[float]:
        """The importance of each."""

    def importances(self, progress: Progress | None = None) -> Mapping[Branch, float]:
        if self._known is None:
            branches = residual_branches(self.evaluator)
            measured = self.measure(branches, progress or (lambda done, of: None))
            self._known = dict(zip(branches, measured, strict=True))
        return self._known

    def scores(self, architectures, progress=None):
        self.importances(progress)
        backbone = self.evaluator.backbone
        return [-fsum(self._worth(backbone.site(name), spec) for name, spec in a) for a in architectures]

    def _worth(self, site: Site, spec: AdapterSpec) -> float:
        known = self.importances()
        if site.role == "backbone":
            return fsum(known.values()) * log1p(spec.num_params(site) / max(1, len(known)))
        layer = {branch.sublayer: value for branch, value in known.items() if branch.layer == site.layer}
        sublayer = site.role.partition(".")[0]
        importance = layer[sublayer] if sublayer in layer else _mean(layer or known)
        return importance * log1p(spec.num_params(site))


def _mean(importances: Mapping[Any, float]) -> float:
    return fsum(importances.values()) / len(importances) if importances else nan


@torch.no_grad()
def residual_branches(evaluator: TrainingEvaluator) -> list[Branch]:
    """The branches of the attention and mlp sub-layers, found by watching one example on its way.

    - In a pre-norm layer (its attention reads what one of its own norms made) x enters that norm. Elsewhere (BERT) x is
      what the sub-layer itself reads.
    - c is what leaves the sub-layer's last linear, or a norm right behind it (Gemma 2), which would undo any scale.
    """
    model, backbone = evaluator.model, evaluator.backbone
    sublayers = [site for site in backbone.sites if site.role in SUBLAYERS]
    norms = [site for site in backbone.sites if site.role == "norm" and site.layer is not None]
    read: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}
    paths = {path for site in (*sublayers, *norms) for path in (site.module, site.input_module)}

    def watch(path: str) -> Any:
        # The tensors are kept, so that none takes the place of another in memory.
        def hook(module: Any, args: tuple, output: Tensor) -> None:
            read[path], made[path] = args[0], output

        return model.get_submodule(path).register_forward_hook(hook)

    handles = [watch(path) for path in paths]
    try:
        evaluator.task.scores(model, evaluator.batch("train", [0]))
    finally:
        for handle in handles:
            handle.remove()

    branches = []
    for layer in range(backbone.num_layers):
        own = [site.module for site in norms if site.layer == layer]
        maker = {made[norm].data_ptr(): norm for norm in own}
        reader = {read[norm].data_ptr(): norm for norm in own}
        here = [site for site in sublayers if site.layer == layer]
        if here and read[here[0].input_module].data_ptr() not in maker:
            maker = {}  # post-norm: what a norm made is the residual stream itself
        for site in here:
            entrance = maker.get(read[site.input_module].data_ptr(), site.input_module)
            exit = reader.get(made[site.module].data_ptr(), site.module)
            branches.append(Branch(layer=layer, sublayer=site.role, entrance=entrance, exit=exit))
    return branches
