"""The parameter count: the proxy to beat."""

from __future__ import annotations

from typing import ClassVar

from autopeft.evaluators.proxies.zero_cost import ZeroCost


class NumParams(ZeroCost):
    """Minus the trainable parameters."""

    name: ClassVar[str] = "num_params"
    summary: ClassVar[str] = "the more trainable parameters, the better"
    source: ClassVar[str] = "Li et al. 2023, ZiCo, abstract: no proxy before theirs beats it consistently"

    def scores(self, architectures, progress=None):
        return [-float(architecture.num_params(self.evaluator.backbone)) for architecture in architectures]
