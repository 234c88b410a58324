"""Whether routing earned its keep: each mixture among the finalists against what it is compared with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from autopeft.search_space.problem import Metric
from autopeft.search_space.spaces.controls import CONTROLS, controls
from autopeft.studies.analysis import statistics
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.analysis.statistics import Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Against:
    """A mixture's quality less that of a control, better is positive; `num_params`, `total_params`: of the control."""

    control: str
    num_params: int
    total_params: int
    difference: Estimate

    @property
    def verdict(self) -> str:
        if self.difference.num_seeds < 2:
            return "not told apart by one seed"
        if self.difference.low > 0:
            return "better"
        return "worse" if self.difference.high < 0 else "not told apart"

    def of(self, quality: Metric) -> tuple[float, float, float]:
        """The difference and the ends of its interval in the quality's own direction: of a loss, less is better."""
        d = self.difference
        return (d.value, d.low, d.high) if quality.maximise else (-d.value, -d.high, -d.low)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """`trial`: the candidate with mixtures. `num_params`: those that are trained, `total_params`: with those of LoRAs
    that are given, `active_params`: of all these what a token meets. `busiest`: the largest share of the tokens (or
    texts) that one expert gets, by site; an even load has 1/E. `averaged`: what the quality falls by if all experts are
    weighted alike after the training, None if that was not measured.
    """

    trial: int
    label: str
    num_params: int
    total_params: int
    active_params: int
    against: tuple[Against, ...]
    busiest: dict[str, float]
    averaged: float | None
    #: Whether every control has a training that ended well.
    complete: bool

    @property
    def earned(self) -> bool:
        """Whether it is better than everything that it was compared with."""
        return self.complete and all(one.difference.low > 0 and one.difference.num_seeds > 1 for one in self.against)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "earned": self.earned}

    def lines(self, quality: Metric) -> list[str]:
        """In the quality's own direction."""
        sign = 1.0 if quality.maximise else -1.0
        head = f"{self.label} ({_sizes(self)}, {self.active_params:,} of them for a token)"
        word = "routing earned its keep" if self.earned else "routing did not show that it earns its keep"
        found = [f"{head}: {word}"]
        for one in self.against:
            value, low, high = one.of(quality)
            interval = f"{value:+.4f} {quality.name} ({low:+.4f} to {high:+.4f}, 95 %)"
            found.append(f"  against {one.control}, {_sizes(one)}: {one.verdict}, {interval}")
        if self.averaged is not None:
            found.append(
                f"  its experts weighted alike after the training: {-sign * self.averaged:+.4f} {quality.name}"
            )
        if self.busiest:
            most = max(self.busiest, key=lambda site: self.busiest[site])
            found.append(f"  busiest expert: {self.busiest[most]:.0%} of what is routed at {most}")
        return found


def _sizes(one: Against | Verdict) -> str:
    trained = "" if one.num_params == one.total_params else f", {one.num_params:,} of them trained"
    return f"{one.total_params:,} parameters{trained}"


def verdicts(snapshot: Snapshot) -> list[Verdict]:
    """One for each candidate whose controls were trained."""
    quality, seed_sd = snapshot.quality, snapshot.seed_sd()
    sign = 1.0 if snapshot.metrics[quality].maximise else -1.0
    found = []
    for number, own in snapshot.compared().items():
        try:
            entry = snapshot.entry(number)
        except KeyError:
            continue
        if not entry.repeats:  # the run that it was chosen by would flatter it
            continue
        scores = entry.scores(quality)
        against = [
            Against(
                control=name,
                num_params=control.trial.candidate.architecture.num_params(snapshot.backbone),
                total_params=control.trial.candidate.architecture.total_params(snapshot.backbone),
                difference=statistics.paired_difference(scores, control.scores(quality), seed_sd=seed_sd),
            )
            for name in CONTROLS
            if (control := own.get(name))
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
