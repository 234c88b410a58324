"""What a searcher tells of its own state with a trial: `searcher_state["diagnostics"]`, shown by status and report.

`phase`: "initial", "model" or "evolution", of the searcher `proxy` also "audit" or "proxy", of `gates` also
"gates"; `note`: a sentence, if there is something to say; `rank_correlation` by metric: how well its surrogate ranks
trials that were left out; `relevance` by metric: shares of the genes that matter most to it; `audit`: how well scores
rank trainings, see `searchers/ranking.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from autopeft.search_space.problem import Trial

STATE = "diagnostics"
#: Genes that a line of text has room for.
SHOWN_GENES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostics:
    """`trial`: the number of the trial that came with it; for the rest see above."""

    trial: int
    phase: str = ""
    note: str = ""
    rank_correlation: Mapping[str, float] = field(default_factory=dict)
    relevance: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    audit: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> Iterator[tuple[str, str]]:
        """A word and what is to be said of it."""
        yield "phase", f"{self.phase} (trial {self.trial})" + (f": {self.note}" if self.note else "")
        if self.rank_correlation:
            figures = ", ".join(f"{name} {value:.2f}" for name, value in self.rank_correlation.items())
            yield "surrogate", f"rank correlation with trials left out: {figures}"
        if self.audit:
            (low, high), (top_low, top_high) = self.audit["tau_interval"], self.audit["top_interval"]
            tau, top = f"{self.audit['tau']:.2f}", f"{self.audit['top_tau']:.2f}"
            whole = f"Kendall's tau {tau} ({low:.2f} to {high:.2f})"
            half = f"better half {top} ({top_low:.2f} to {top_high:.2f})"
            yield "audit", f"scores against {self.audit['num']} trainings: {whole}, {half}"
        for metric, shares in self.relevance.items():
            most = sorted(shares.items(), key=lambda pair: -pair[1])[:SHOWN_GENES]
            yield "matters", f"for {metric}: " + ", ".join(f"{gene} {share:.0%}" for gene, share in most)


def diagnostics(trials: Sequence[Trial]) -> list[Diagnostics]:
    """Those of the trials that came with some, in their order."""
    known = Diagnostics.__dataclass_fields__.keys() - {"trial"}
    found = ((trial.number, trial.searcher_state.get(STATE)) for trial in trials)
    return [
        Diagnostics(trial=number, **{key: told[key] for key in known & told.keys()})
        for number, told in found
        if isinstance(told, Mapping)
    ]
