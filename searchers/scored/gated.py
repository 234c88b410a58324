"""The searcher `gates`: the architectures that trained gates choose under several penalties, then `bo`."""

from __future__ import annotations

from collections.abc import Iterator

from typing_extensions import override

from autopeft.searchers.base import WHOLE, Suggestion
from autopeft.searchers.scored.from_scores import FromScores


class Gated(FromScores):
    """Search that starts from `Problem.scored`, the architectures that gates chose, one per penalty on parameters.

    Each is trained alone, in that order. In Single-Path NAS (Stamoulis et al. 2019) and TAPS (Wallingford et al. 2022)
    the architecture that the gates choose is the result; here it is where the search starts.
    """

    name = "gates"
    summary = "differentiable: gates on every gene, trained with the weights under several penalties, propose; then bo"

    @override
    def queue(self) -> Iterator[Suggestion]:
        for entry in self.problem.scored:
            # Trained to its end: a rung prunes by the first losses, and the gates have seen more than these.
            yield Suggestion(genes=entry.genes, state={"diagnostics": {"phase": self.name}, WHOLE: True})
