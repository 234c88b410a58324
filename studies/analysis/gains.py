"""What the recommended member gains over the baselines by rule, at which cost, and what of it the rate alone gains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import numpy as np

from autopeft.search_space.architecture import Candidate
from autopeft.search_space.problem import Trial
from autopeft.search_space.spaces.rules import ALL_BASELINES, RULES, RuleKind, is_untuned
from autopeft.studies.analysis.front import Front, interval
from autopeft.studies.analysis.recommendation import difference_text
from autopeft.studies.analysis.snapshot import Entry, Snapshot
from autopeft.studies.analysis.statistics import Estimate, SeedSpread, estimate, paired_difference

#: What a tuned baseline of the same structure tells.
RATE = "learning_rate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """The recommended member against one baseline by rule. Differences are in the metric's own direction.

    `difference`: quality of the recommended member minus that of the baseline; None where the comparison cannot be
    made, which the sentence explains. `cost_ratios`: what the recommended member costs over what the baseline costs, by
    metric. `others`: the differences in the further qualities among the objectives, such as forgetting, by metric.
    For an untuned rule, `tuned` names what has its structure at a tuned learning rate, and `difference` is the sum of
    `learning_rate` (that minus the rule) and `structure` (the recommended member minus that). They are None where the
    study has no such baseline; where the recommended member has the structure itself, `structure` is None.
    """

    baseline: str
    kind: RuleKind
    sentence: str
    trial: int | None = None
    difference: Estimate | None = None
    cost_ratios: Mapping[str, float] = field(default_factory=dict)
    others: Mapping[str, Estimate] = field(default_factory=dict)
    tuned: str | None = None
    learning_rate: Estimate | None = None
    structure: Estimate | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data for JSON."""
        estimates = {"difference": self.difference, "learning_rate": self.learning_rate, "structure": self.structure}
        return {
            "baseline": self.baseline,
            "kind": self.kind,
            "trial": self.trial,
            "cost_ratios": dict(self.cost_ratios),
            "others": {name: interval(found) for name, found in self.others.items()},
            "tuned": self.tuned,
            **{name: None if found is None else interval(found) for name, found in estimates.items()},
            "sentence": self.sentence,
        }


def gains(snapshot: Snapshot, front: Front) -> list[Gain]:
    """Return a comparison with every untuned rule, with the best of the sweeps, and with the mlp alone.

    Only baselines of the study are compared. Empty until the recommended member has been trained with fresh seeds: the
    run that it was selected by is biased upwards. The best sweep is the one with the highest mean over its fresh seeds.
    """
    found = front.recommendation
    if found is None:
        return []
    comparison = _Comparison(snapshot, front, found.recommended)
    return list(comparison.gains()) if comparison.recommended.repeats else []


def other_qualities(snapshot: Snapshot, front: Front) -> list[str]:
    """Return a sentence on each further quality of the recommended member, and on its difference to the best one's."""
    found = front.recommendation
    if found is None:
        return []
    labels = {row.trial: row.label for row in front.rows}
    recommended, best = snapshot.entry(found.recommended), snapshot.entry(found.best)
    sentences = []
    for name in _other_qualities(snapshot):
        scores, others = recommended.scores(name), best.scores(name)
        if not scores.size:
            continue
        metric, spread, sign = snapshot.metrics[name], snapshot.spread(metric=name), recommended.sign(name)
        own = estimate(scores, spread=spread).signed(sign)
        text = f"{labels[found.recommended]} has {name} {own.value:.3g} (95 % interval {own.low:.3g} to {own.high:.3g})"
        if found.recommended != found.best and others.size:
            against = difference_text(paired_difference(scores, others, spread=spread), metric)
            text += f"; minus that of the best, {labels[found.best]}: {against}"
        sentences.append(f"{text}.")
    return sentences


def _other_qualities(snapshot: Snapshot) -> list[str]:
    return [o.name for o in snapshot.objectives if o.is_quality and o.name != snapshot.quality]


class _Comparison:
    """The recommended member of a front and the tuned baselines beside it."""

    def __init__(self, snapshot: Snapshot, front: Front, recommended: int) -> None:
        self.snapshot = snapshot
        self.metric = snapshot.metrics[snapshot.quality]
        self.rows = {row.trial: row for row in front.rows}
        tuned = {entry.trial.number: entry for entry in snapshot.tuned()}
        self.recommended = tuned[recommended]
        self.baselines = {e.trial.role.name: e for e in tuned.values() if e.trial.role.kind == "baseline"}
        self.spread: SeedSpread | None = snapshot.spread()

    def gains(self) -> Iterator[Gain]:
        named = dict.fromkeys(t.role.name for t in self.snapshot.trials if t.role.kind == "baseline")
        present = [name for name in named if name in RULES]
        compared = {name for name in present if self._scored(name)}
        sweeps = [name for name in present if RULES[name].kind == "sweep" and name in compared]
        best = max(sweeps, key=lambda name: self._mean(self.baselines[name]), default=None)
        for name in present:
            if name not in compared:
                yield Gain(baseline=name, kind=RULES[name].kind, sentence=self._missing(name))
            elif RULES[name].kind != "sweep" or name == best:
                yield self._gain(name, of_sweeps=len(sweeps))

    def _scored(self, name: str) -> bool:
        entry = self.baselines.get(name)
        return entry is not None and bool(entry.repeats) and isfinite(self._mean(entry))

    def _mean(self, entry: Entry) -> float:
        scores = entry.scores(self.snapshot.quality)
        return float(np.mean(scores)) if scores.size else np.nan

    def _minus(self, a: Entry, b: Entry) -> Estimate:
        quality = self.snapshot.quality
        return paired_difference(a.scores(quality), b.scores(quality), spread=self.spread)

    def _missing(self, name: str) -> str:
        runs = [t for t in self.snapshot.trials if t.role.kind == "baseline" and t.role.name == name]
        why = next((f" ({trial.error.splitlines()[0]})" for trial in runs if trial.error), "")
        return f"No comparison with {name}: it has no complete runs with fresh seeds and finite scores{why}."

    def _gain(self, name: str, of_sweeps: int) -> Gain:
        baseline, kind = self.baselines[name], RULES[name].kind
        what = self._described(name, of_sweeps)
        if baseline is self.recommended:
            text = f"{what} is recommended itself: no candidate of the search takes its place."
            return Gain(baseline=name, kind=kind, sentence=text, trial=baseline.trial.number)
        found, ratios = self._minus(self.recommended, baseline), self._cost_ratios(baseline)
        label = self.rows[self.recommended.trial.number].label
        verdict = "is not distinguished from"
        if found.low > 0 or found.high < 0:
            verdict = "is better than" if found.low > 0 else "is worse than"
        text = f"{label} {verdict} {what}: {difference_text(found, self.metric)}"
        if self.spread is None:
            text += " from single runs, so without the spread between seeds"
        if ratios:
            text += ", at " + ", ".join(f"{ratio:.2g} times its {cost}" for cost, ratio in ratios.items())
        others = dict(self._others(baseline))
        if others:
            metrics = self.snapshot.metrics
            differences = (difference_text(other, metrics[name], named=True) for name, other in others.items())
            text += f", with {', '.join(differences)}"
        tuned, rate, structure, more = None, None, None, ""
        if is_untuned(name):
            tuned, rate, structure, more = self._parts(name, found)
        sign = 1.0 if self.metric.maximise else -1.0
        return Gain(
            baseline=name,
            kind=kind,
            sentence=f"{text}.{more}",
            trial=baseline.trial.number,
            difference=found.signed(sign),
            cost_ratios=ratios,
            others={name: other.signed(self.recommended.sign(name)) for name, other in others.items()},
            tuned=tuned,
            learning_rate=rate and rate.signed(sign),
            structure=structure and structure.signed(sign),
        )

    def _described(self, name: str, of_sweeps: int) -> str:
        entry = self.baselines[name]
        tried = {trial.candidate.key for trial in self.snapshot.trials if trial.role == entry.trial.role}
        rates = f"the best of {len(tried)} learning rates" if len(tried) > 1 else "the only learning rate tried"
        about = [f"{_rate(entry)}, {'not tuned' if is_untuned(name) else rates}"]
        if RULES[name].kind == "sweep" and of_sweeps > 1:
            about.append(f"the best of {of_sweeps} sweeps")
        if remark := RULES[name].remark(self.snapshot.backbone):
            about.append(remark)
        if entry.trial.violation > 0:
            about.append("it exceeds the constraints of the study")
        return f"{name} ({'; '.join(about)})"

    def _cost_ratios(self, baseline: Entry) -> dict[str, float]:
        """Return the ratios of the costs that are positive for both, number of parameters first."""
        names = ["num_params", *(o.name for o in self.snapshot.objectives if o.is_cost)]
        own, other = (self.rows[entry.trial.number].values for entry in (self.recommended, baseline))
        shared = [name for name in dict.fromkeys(names) if min(own.get(name, 0.0), other.get(name, 0.0)) > 0]
        return {name: own[name] / other[name] for name in shared}

    def _others(self, baseline: Entry) -> Iterator[tuple[str, Estimate]]:
        """Yield the differences in further qualities, larger is better."""
        for name in _other_qualities(self.snapshot):
            own, other = self.recommended.scores(name), baseline.scores(name)
            if own.size and other.size:
                yield name, paired_difference(own, other, spread=self.snapshot.spread(metric=name))

    def _parts(self, name: str, found: Estimate) -> tuple[str | None, Estimate | None, Estimate | None, str]:
        """Return what has the structure of an untuned rule at a tuned rate, the two parts of the gain, and a sentence.

        The gain is (tuned - rule) + (recommended - tuned): the means are additive, the intervals are not.
        """
        rule, metric = self.baselines[name], self.metric
        if _is_same_but_rate(self.recommended.trial, rule.trial.candidate):
            label = self.rows[self.recommended.trial.number].label
            text = f" The structure is the same, so all of this is the learning rate's ({_rate(self.recommended)})."
            return label, found, None, text
        for other, entry in self.baselines.items():
            tells = not is_untuned(other) and entry.repeats and isfinite(self._mean(entry))
            if tells and _is_same_but_rate(entry.trial, rule.trial.candidate):
                rate, structure = self._minus(entry, rule), self._minus(self.recommended, entry)
                text = (
                    f" Of this, {difference_text(rate, metric)} is the learning rate's ({other}, {_rate(entry)}, minus"
                    f" {name}), and {difference_text(structure, metric)} the structure's."
                )
                return other, rate, structure, text
        backbone, structure_of = self.snapshot.backbone, rule.trial.candidate.architecture
        able = [n for n, make in ALL_BASELINES.items() if not is_untuned(n) and make(backbone) == structure_of]
        needed = "".join(f": the baseline {n} would tell" for n in able[:1])
        return None, None, None, f" What of this is the learning rate's is not known{needed}."


def _is_same_but_rate(trial: Trial, other: Candidate) -> bool:
    """Return whether two candidates differ in the learning rate at most."""
    ours, theirs = ({k: v for k, v in one.training.items() if k != RATE} for one in (trial.candidate, other))
    return trial.candidate.architecture == other.architecture and ours == theirs


def _rate(entry: Entry) -> str:
    rate = entry.trial.candidate.training.get(RATE)
    return "default lr" if rate is None else f"lr {rate:.2g}"
