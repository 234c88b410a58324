"""The interface of proxies: cheap substitutes for the held-out loss of a trained candidate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from autopeft.evaluators.base import Progress
from autopeft.search_space.architecture import Architecture


class Proxy(ABC):
    """Scores architectures without training each of them. Lower is better; only the ranking has a meaning."""

    name: ClassVar[str]
    summary: ClassVar[str]
    #: Where the score is defined.
    source: ClassVar[str]

    @abstractmethod
    def scores(self, architectures: Sequence[Architecture], progress: Progress | None = None) -> list[float]:
        """Return one score per architecture, in order; NaN for an architecture without a score."""
