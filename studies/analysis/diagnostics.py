"""What a searcher reports of its state with a trial: `searcher_state["diagnostics"]`, shown by status and report.

- `phase`: "initial", "model" or "evolution"; the searcher `proxy` also has "audit" and "proxy", `gates` also "gates",
  `shrink` also "shrink".
- `note`: a sentence for the user, or empty.
- `rank_correlation`, by metric: between the surrogate's predictions and the values of held-out trials.
- `relevance`, by metric: each gene's share of the surrogate's sensitivity.
- `audit`: how well proxy scores rank trainings, see `searchers/scored/ranking.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from autopeft.search_space.problem import SEARCH, Trial

STATE = "diagnostics"
#: Least trials of a rank correlation that is shown. Of n independent pairs, Spearman's correlation has the standard
#: error 1 / sqrt(n - 1) (Kendall and Gibbons, Rank Correlation Methods, 1990, ch. 4): a third for 10 trials.
LEAST_RANKED = 10
#: Genes that fit into a line of text.
SHOWN_GENES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostics:
    """Diagnostics of one trial. `trial`: its number; the module's docstring describes the other fields."""

    trial: int
    phase: str = ""
    note: str = ""
    rank_correlation: Mapping[str, float] = field(default_factory=dict)
    relevance: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    audit: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data for JSON."""
        return asdict(self)

    def lines(self, num_held_out: int) -> Iterator[tuple[str, str]]:
        """Yield pairs of a heading and a line of text. `num_held_out`: see the function of this name."""
        yield "phase", f"{self.phase} (trial {self.trial})" + (f": {self.note}" if self.note else "")
        if self.rank_correlation and num_held_out < LEAST_RANKED:
            yield "surrogate", f"too few trials for a rank correlation: {num_held_out}, at least {LEAST_RANKED} needed"
        elif self.rank_correlation:
            figures = ", ".join(f"{name} {value:.2f}" for name, value in self.rank_correlation.items())
            yield "surrogate", f"rank correlation with {num_held_out} held-out trials: {figures}"
        if self.audit:
            (low, high), (top_low, top_high) = self.audit["tau_interval"], self.audit["top_interval"]
            tau, top = f"{self.audit['tau']:.2f}", f"{self.audit['top_tau']:.2f}"
            whole = f"Kendall's tau {tau} ({low:.2f} to {high:.2f})"
            half = f"better half {top} ({top_low:.2f} to {top_high:.2f})"
            yield "audit", f"proxy scores against {self.audit['num']} trainings: {whole}, {half}"
        for metric, shares in self.relevance.items():
            most = sorted(shares.items(), key=lambda pair: -pair[1])[:SHOWN_GENES]
            yield "relevance", f"for {metric}: " + ", ".join(f"{gene} {share:.0%}" for gene, share in most)


def diagnostics(trials: Sequence[Trial]) -> list[Diagnostics]:
    """Return the diagnostics of the trials that have some, in the order of the trials."""
    fields = Diagnostics.__dataclass_fields__.keys() - {"trial"}
    found = ((trial.number, trial.searcher_state.get(STATE)) for trial in trials)
    return [
        Diagnostics(trial=number, **{key: state[key] for key in fields & state.keys()})
        for number, state in found
        if isinstance(state, Mapping)
    ]


def num_held_out(trials: Sequence[Trial], number: int, batch: int) -> int:
    """Return the number of trials of the search with values that a surrogate knew when it proposed trial `number`.

    They are in earlier batches of `batch` trials each. Baselines, which some surrogates also model, are not counted.
    """
    earlier = [t for t in trials if t.role == SEARCH and t.state != "infeasible" and t.number < number]
    known = earlier[: len(earlier) // batch * batch]
    return sum(trial.state in ("complete", "pruned") for trial in known)
