"""The parameter count: the reference that other proxies must beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from typing_extensions import override

from autopeft.evaluators.base import Progress
from autopeft.evaluators.proxies.zero_cost import ZeroCost
from autopeft.search_space.architecture import Architecture


class NumParams(ZeroCost):
    """Minus the number of trainable parameters."""

    name: ClassVar[str] = "num_params"
    summary: ClassVar[str] = "the more trainable parameters, the better"
    source: ClassVar[str] = "Li et al. 2023, ZiCo, abstract: no proxy before theirs beats it consistently"

    @override
    def scores(self, architectures: Sequence[Architecture], progress: Progress | None = None) -> list[float]:
        return [-float(architecture.num_params(self.evaluator.backbone)) for architecture in architectures]
