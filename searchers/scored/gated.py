"""The searcher `gates`: what gates choose that were trained under several penalties, then `bo`."""

from __future__ import annotations

from collections.abc import Iterator

from autopeft.searchers.base import WHOLE, Suggestion
from autopeft.searchers.scored.from_scores import FromScores


class Gated(FromScores):
    """`Problem.scored` has what the gates choose, an architecture for each penalty on parameters. These are trained
    alone, in their order.

    After Single-Path NAS (Stamoulis et al. 2019) and TAPS (Wallingford et al. 2022), where the architecture that the
    gates choose is the result. Here it is what a search begins with.
    """

    name = "gates"
    summary = "differentiable: gates on every gene, trained with the weights under several penalties, propose; then bo"

    def planned(self) -> Iterator[Suggestion]:
        for entry in self.problem.scored:
            # To its end: a rung takes off by the first losses, and the gates have seen more than these.
            yield Suggestion(genes=entry.genes, state={"diagnostics": {"phase": self.name}, WHOLE: True})
