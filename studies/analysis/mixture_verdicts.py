"""Whether routing helps: each mixture among the finalists against its matched baselines."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from autopeft.search_space.metrics import Metric
from autopeft.search_space.spaces.controls import CONTROLS, controls
from autopeft.studies.analysis import statistics
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.analysis.statistics import Estimate

BETTER, WORSE, INCONCLUSIVE, ONE_SEED = VERDICTS = ("better", "worse", "inconclusive", "inconclusive (one seed)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A mixture against one of its matched baselines, the `control`.

    `difference`: quality of the mixture minus that of the baseline, larger is better. `num_params`, `total_params`:
    trainable and all adapter parameters of the baseline.
    """

    control: str
    num_params: int
    total_params: int
    difference: Estimate

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""
        if self.difference.num_seeds < 2:
            return ONE_SEED
        if self.difference.low > 0:
            return BETTER
        return WORSE if self.difference.high < 0 else INCONCLUSIVE

    def signed(self, quality: Metric) -> Estimate:
        """Return the difference in the metric's own direction (a loss falls)."""
        return self.difference.signed(1.0 if quality.maximise else -1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A candidate with mixtures, trial `trial`, against its matched baselines.

    `num_params`: trainable parameters; `total_params`: with those of pretrained LoRAs; `active_params`: the part of
    `total_params` that is active per token. `busiest`, by site: the largest share of the tokens (or texts) that one of
    E experts gets; a balanced load has 1/E. `averaged`: loss of quality if all experts are weighted equally after
    training; None if not measured.
    """

    trial: int
    label: str
    num_params: int
    total_params: int
    active_params: int
    against: tuple[Comparison, ...]
    busiest: dict[str, float]
    averaged: float | None
    #: Whether every matched baseline has a complete training.
    complete: bool

    @property
    def earned(self) -> bool:
        """Whether the mixture is better than every matched baseline."""
        return self.complete and all(one.difference.low > 0 and one.difference.num_seeds > 1 for one in self.against)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and `earned` as plain data for JSON."""
        return {**asdict(self), "earned": self.earned}

    def lines(self, quality: Metric) -> list[str]:
        """Return the result and a line per comparison, with differences in the metric's own direction."""
        sign = 1.0 if quality.maximise else -1.0
        head = f"{self.label} ({_sizes(self)}, {self.active_params:,} of them active per token)"
        result = "is better than" if self.earned else "is not shown to be better than"
        found = [f"{head}: the mixture {result} every matched baseline"]
        for one in self.against:
            own = one.signed(quality)
            interval = f"{own.value:+.4f} {quality.name} (95 % interval {own.low:+.4f} to {own.high:+.4f})"
            found.append(f"  against {one.control}, {_sizes(one)}: {one.verdict}, {interval}")
        if self.averaged is not None:
            change = f"{-sign * self.averaged:+.4f} {quality.name}"
            found.append(f"  with all experts weighted equally after training: {change}")
        if self.busiest:
            site = max(self.busiest, key=lambda name: self.busiest[name])
            found.append(f"  busiest expert: {self.busiest[site]:.0%} of the load at {site}")
        return found


def _sizes(one: Comparison | Verdict) -> str:
    trained = "" if one.num_params == one.total_params else f", {one.num_params:,} of them trained"
    return f"{one.total_params:,} parameters{trained}"


def verdicts(snapshot: Snapshot) -> list[Verdict]:
    """Return one verdict for each finalist whose matched baselines were trained."""
    quality, spread = snapshot.quality, snapshot.spread()
    sign = 1.0 if snapshot.metrics[quality].maximise else -1.0
    found = []
    for number, baselines in snapshot.matched_baselines().items():
        try:
            entry = snapshot.entry(number)
        except KeyError:
            continue
        if not entry.repeats:  # the run that it was selected by is biased upwards
            continue
        scores = entry.scores(quality)
        against = [
            Comparison(
                control=name,
                num_params=control.trial.candidate.architecture.num_params(snapshot.backbone),
                total_params=control.trial.candidate.architecture.total_params(snapshot.backbone),
                difference=statistics.paired_difference(scores, control.scores(quality), spread=spread),
            )
            for name in CONTROLS
            if (control := baselines.get(name))
        ]
        architecture = entry.trial.candidate.architecture
        measured = [run.measurement for run in entry.runs if run.measurement is not None]
        averaged = [m.values[quality] - m.averaged[quality] for m in entry.averaged]
        found.append(
            Verdict(
                trial=number,
                label=f"trial {number}",
                num_params=architecture.num_params(snapshot.backbone),
                total_params=architecture.total_params(snapshot.backbone),
                active_params=architecture.active_params(snapshot.backbone),
                against=tuple(against),
                busiest={site: max(route["load"]) for site, route in (measured[0].routes if measured else {}).items()},
                complete=len(against) == len(controls(architecture, snapshot.backbone)),
                averaged=sign * float(np.mean(averaged)) if averaged else None,
            )
        )
    return found
