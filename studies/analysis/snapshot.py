"""A study at one moment: its trials, front and hypervolume. Reports are made from this alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.dominance import non_dominated
from autopeft.search_space.metrics import Metric
from autopeft.search_space.problem import (
    COPY,
    FINALIST,
    METRICS,
    SEARCH,
    Measurement,
    Objective,
    Trial,
)
from autopeft.studies.analysis import pareto, recommendation, statistics
from autopeft.studies.analysis.front import Front, FrontRow
from autopeft.studies.analysis.outlook import Outlook
from autopeft.studies.analysis.pareto import Floats
from autopeft.studies.analysis.recommendation import Contender, Recommendation
from autopeft.studies.analysis.statistics import Estimate, SeedSpread
from autopeft.studies.analysis.summary import summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One candidate with all its evaluations: the first one, `trial`, and its `repeats` with other seeds."""

    trial: Trial
    repeats: tuple[Trial, ...] = ()
    #: The metrics of its scores by name; a metric that is not among them counts as maximised.
    metrics: Mapping[str, Metric] = field(default_factory=lambda: METRICS)

    @property
    def scored(self) -> tuple[str, ...]:
        """The names of the metrics that have scores per example."""
        measured = (run.measurement for run in self.runs)
        return tuple(dict.fromkeys(name for found in measured if found is not None for name in found.per_example))

    @property
    def runs(self) -> tuple[Trial, ...]:
        """The full evaluations that estimate its quality: the repeats where there are any.

        The candidate was selected by its first evaluation, which is therefore biased upwards; repeats are not.
        """
        return self.repeats or (self.trial,)

    @property
    def averaged(self) -> tuple[Measurement, ...]:
        """Measurements of the runs that were also scored with all experts of the mixtures weighted equally."""
        measured = (run.measurement for run in self.runs)
        return tuple(measurement for measurement in measured if measurement is not None and measurement.averaged)

    def scores(self, metric: str, split: str = "validation") -> Floats:
        """Return scores [seeds, examples], larger is better; empty if the split was not scored."""
        columns = []
        for run in self.runs:
            assert run.measurement is not None
            per_example = run.measurement.per_example if split == "validation" else run.measurement.test_per_example
            if metric in per_example:
                columns.append(per_example[metric])
        return self.sign(metric) * np.asarray(columns, dtype=float)

    def sign(self, metric: str) -> float:
        """Return 1.0 for a metric to maximise, -1.0 for one to minimise."""
        return 1.0 if metric not in self.metrics or self.metrics[metric].maximise else -1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A study at one moment.

    `trials`: every evaluation, in the order of the ledger. Values are in the metrics' own direction and unit. `within`:
    the loss of quality that counts as none, in the unit of the metric; None: `Metric.default_margin`.
    """

    study: str
    study_id: str
    #: The study file as it was run.
    settings: str
    objectives: tuple[Objective, ...]
    backbone: Backbone
    trials: tuple[Trial, ...]
    within: float | None = None
    #: Scores of the best constant prediction on the validation rows, by metric; empty where they are not known.
    constant: Mapping[str, float] = field(default_factory=dict)
    outlook: Outlook | None = None
    #: Metrics that are no objectives, of which all tables have a column.
    reported: tuple[Objective, ...] = ()
    #: Trials that are damaged or cannot be compared with the others, by number, and why; they are not in `trials`.
    left_out: Mapping[int, str] = field(default_factory=dict)

    @property
    def nothing_learnt(self) -> str | None:
        """A sentence for reports if no candidate is shown to have learnt anything from the inputs, else None.

        That is: the 95 % interval of no candidate's quality lies above the score of the best constant prediction. Once
        candidates have been trained with fresh seeds, they alone count: the best of many single runs may be above it
        by chance.
        """
        metric, entries, spread = self.quality, self.entries(), self.spread()
        counted = [entry for entry in entries if entry.repeats] or entries
        scored = [(entry.sign(metric), scores) for entry in counted if (scores := entry.scores(metric)).size]
        if metric not in self.constant or not scored:
            return None
        constant = self.constant[metric]
        if any(statistics.estimate(scores, spread=spread).low > sign * constant for sign, scores in scored):
            return None
        return f"no candidate is shown to be better than the same prediction for every input ({metric} {constant:.4g})"

    def entries(self) -> list[Entry]:
        """Return the complete candidates (of the search and of the baselines) in the order of their trials."""
        repeats: dict[int, list[Trial]] = {}
        for trial in self.trials:
            if trial.role == FINALIST and trial.of is not None and trial.state == "complete":
                repeats.setdefault(trial.of, []).append(trial)
        metrics = self.metrics
        return [
            Entry(trial=trial, repeats=tuple(repeats.get(trial.number, ())), metrics=metrics)
            for trial in self.trials
            if trial.of is None and trial.state == "complete"
        ]

    def matched_baselines(self) -> dict[int, dict[str, Entry]]:
        """Return the matched baselines of mixtures, by the number of the mixture's trial and the baseline's name."""
        runs: dict[tuple[int, str], list[Trial]] = {}
        for trial in self.trials:
            if trial.role.kind == "control" and trial.of is not None and trial.state == "complete":
                runs.setdefault((trial.of, trial.role.name), []).append(trial)
        found: dict[int, dict[str, Entry]] = {}
        for (number, name), own in runs.items():
            found.setdefault(number, {})[name] = Entry(trial=own[0], repeats=tuple(own), metrics=self.metrics)
        return found

    def tuned(self) -> list[Entry]:
        """Return the candidates of the search, and each baseline with its best learning rate.

        Rates beyond a bound, such as that of what is forgotten, come after all others.
        """
        sign = 1.0 if self.metrics[self.quality].maximise else -1.0

        def merit(entry: Entry) -> tuple[bool, float]:
            return entry.trial.violation <= 0, sign * entry.trial.values[self.quality]

        best: dict[str, Entry] = {}
        for entry in self.entries():
            key = f"trial {entry.trial.number}" if entry.trial.role == SEARCH else str(entry.trial.role)
            if key not in best or merit(entry) > merit(best[key]):
                best[key] = entry
        return list(best.values())

    @property
    def objectives_by_name(self) -> dict[str, Objective]:
        """The objectives by name."""
        return {objective.name: objective for objective in self.objectives}

    @property
    def measures(self) -> tuple[Objective, ...]:
        """The objectives, and what is only reported."""
        return (*self.objectives, *self.reported)

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The built-in metrics and those that the study defines for its objectives and reports, by name."""
        return METRICS.with_own({o.name: o.own for o in self.measures if o.own is not None})

    @property
    def ended(self) -> tuple[Trial, ...]:
        """Trials that have ended in any state, except copies of other trials."""
        return tuple(trial for trial in self.trials if trial.state != "running" and trial.role != COPY)

    @property
    def evaluated(self) -> tuple[Trial, ...]:
        """The evaluations that have ended; a rejected candidate is never evaluated."""
        return tuple(trial for trial in self.ended if trial.state != "infeasible")

    @property
    def unfinished(self) -> tuple[Trial, ...]:
        """The evaluations that have begun and not ended."""
        return tuple(trial for trial in self.trials if trial.state == "running" and trial.role != COPY)

    @property
    def preliminary(self) -> bool:
        """Whether runs with fresh seeds are missing, so that single runs decide on the front or a part of it.

        The best of many single runs looks better than it is; see `Entry.runs`.
        """
        repeated = any(trial.role == FINALIST and trial.state == "complete" for trial in self.trials)
        return not repeated or bool(self.unfinished)

    @property
    def search_trials(self) -> tuple[Trial, ...]:
        """The trials that the searcher proposed."""
        return tuple(trial for trial in self.trials if trial.role == SEARCH)

    @property
    def quality(self) -> str:
        """The name of the first quality metric among the objectives, which comparisons use."""
        names = [o.name for o in self.objectives if o.is_quality]
        return names[0] if names else "accuracy"

    def spread(self, split: str = "validation", metric: str | None = None) -> SeedSpread | None:
        """Return the spread of a metric (None: the quality) between seeds, of all with several seeds; None without."""
        matched = [entry for by_name in self.matched_baselines().values() for entry in by_name.values()]
        repeated = [entry for entry in [*self.entries(), *matched] if len(entry.repeats) > 1]
        scores = [entry.scores(metric or self.quality, split) for entry in repeated]
        return SeedSpread.of([runs for runs in scores if runs.size])

    def front(self) -> Front:
        """Return every complete candidate as the reports show it, with the front and the recommendation marked.

        A tuned baseline is a candidate like any other: where plain LoRA is not beaten, it is on the front. Once
        candidates have been trained with fresh seeds, the front is drawn among those alone.
        """
        entries = self.tuned()
        spread = self.spread()
        values = [self.values_of(entry, spread) for entry in entries]
        repeated = [bool(entry.repeats) for entry in entries]
        eligible = repeated if any(repeated) else [True] * len(entries)
        points = np.full((len(entries), len(self.objectives)), np.nan)
        for i, (entry, (value, _)) in enumerate(zip(entries, values, strict=True)):
            if eligible[i] and entry.trial.violation <= 0:
                points[i] = [o.loss(value[o.name]) for o in self.objectives]
        on_front = non_dominated(points).tolist()
        found = self.recommendation([e for e, member in zip(entries, on_front, strict=True) if member], spread)
        test_spread = self.spread("test")
        sign = 1.0 if self.metrics[self.quality].maximise else -1.0
        rows = []
        for entry, (value, std_err), member in zip(entries, values, on_front, strict=True):
            number = entry.trial.number
            difference = found.differences.get(number) if found else None
            rows.append(
                FrontRow(
                    trial=number,
                    label=_label(entry.trial),
                    values=value,
                    std_err=std_err,
                    on_front=member,
                    recommended=found is not None and number == found.recommended,
                    role=entry.trial.role,
                    summary=summary(entry.trial, self.backbone),
                    seeds=tuple(run.seed for run in entry.runs),
                    standing=found.standings.get(number) if found else None,
                    difference=difference and difference.signed(sign),
                    test=self.promise(entry, test_spread),
                )
            )
        if found is None:
            return Front(rows=tuple(rows))
        labels = {row.trial: row.label for row in rows}
        return Front(
            rows=tuple(rows),
            recommendation=found,
            reason=found.reason(labels.__getitem__, self.metrics[self.quality]),
            left_out=() if self.preliminary else self._left_out(),
        )

    def rows(self) -> list[FrontRow]:
        """Return the rows of the front: every complete candidate, and each baseline with its best learning rate."""
        return list(self.front().rows)

    def best_first(self, rows: Iterable[FrontRow]) -> list[FrontRow]:
        """Return the rows in the order of their quality."""
        quality = self.objectives_by_name.get(self.quality)
        return sorted(rows, key=lambda row: quality.loss(row.values[quality.name])) if quality else list(rows)

    def values_of(self, entry: Entry, spread: SeedSpread | None) -> tuple[dict[str, float], dict[str, float]]:
        """Return values and standard errors by metric name, over all runs of `entry`; see `spread`."""
        assert entry.trial.measurement is not None
        values, std_err = dict(entry.trial.measurement.values), dict(entry.trial.measurement.std_err)
        for metric in entry.scored:
            scores = entry.scores(metric)
            if scores.size:
                found = statistics.estimate(scores, spread=spread if metric == self.quality else None)
                values[metric] = entry.sign(metric) * found.value
                std_err[metric] = found.std_err
        return values, std_err

    def recommendation(self, members: Sequence[Entry], spread: SeedSpread | None) -> Recommendation | None:
        """Return the recommendation among these members of the front; None if none of them has finite scores."""
        contenders = [
            Contender(
                trial=entry.trial.number,
                scores=entry.scores(self.quality),
                costs=recommendation.costs(entry.trial.values, self.objectives),
            )
            for entry in members
            if entry.scores(self.quality).size
        ]
        means = [float(statistics.as_runs(contender.scores).mean()) for contender in contenders]
        finite = [mean for mean in means if np.isfinite(mean)]
        if not finite:
            return None
        return recommendation.recommend(contenders, margin=self.margin(max(finite)), spread=spread)

    def search_front(self) -> list[Trial]:
        """Return the trials of the search that no other one dominates, each by its single run; best quality first."""
        return self.front_of([trial for trial in self.search_trials if trial.state == "complete"])

    def front_of(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return the complete ones of `trials` that no other one dominates, by single runs; best quality first."""
        members = non_dominated(pareto.losses(trials, self.objectives))
        return self.best_trials_first([trial for trial, member in zip(trials, members, strict=True) if member])

    def best_trials_first(self, trials: Iterable[Trial]) -> list[Trial]:
        """Return complete trials in the order of their quality, by single runs."""
        sign = -1 if self.metrics[self.quality].maximise else 1
        return sorted(trials, key=lambda trial: sign * trial.values[self.quality])

    def within_reach(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return the trials whose quality may be within the margin of the best of them, each by its single run.

        That is: the 95 % interval of the difference over the examples ends above the negative margin. The spread
        between seeds comes on top; those who are tied only because of it are not among these.
        """
        scored = [Entry(trial=trial, metrics=self.metrics) for trial in self.best_trials_first(trials)]
        if not scored or not scored[0].scores(self.quality).size:
            return list(trials)
        best = scored[0].scores(self.quality)
        margin = self.margin(scored[0].trial.values[self.quality])
        return [
            entry.trial
            for entry in scored
            if statistics.paired_difference(entry.scores(self.quality), best).high >= -margin
        ]

    def margin(self, best: float) -> float:
        """Return the loss of quality that counts as none where the best value is `best`."""
        return self.metrics[self.quality].default_margin(best) if self.within is None else self.within

    def _left_out(self) -> tuple[int, ...]:
        repeated = {trial.of for trial in self.trials if trial.role == FINALIST}
        return tuple(trial.number for trial in self.search_front() if trial.number not in repeated)

    def entry(self, number: int) -> Entry:
        """Return the candidate of trial `number`. Raises KeyError if it is not a complete candidate."""
        for entry in self.entries():
            if entry.trial.number == number:
                return entry
        raise KeyError(number)

    def promise(self, entry: Entry, spread: SeedSpread | None) -> Estimate | None:
        """Return the quality of `entry` on the test split, with the interval for one more run with another seed.

        `spread`: that of the test split. None if nothing was trained more than once, or this one was not scored there.
        """
        scores = entry.scores(self.quality, "test") if spread is not None else np.empty(0)
        if not scores.size or spread is None:
            return None
        low, high = statistics.predictive_interval(scores, spread)
        return replace(statistics.estimate(scores, spread=spread), low=low, high=high).signed(entry.sign(self.quality))

    def reference(self) -> Floats | None:
        """Return the hypervolume's reference point [objectives], in coordinates; None without a feasible trial."""
        try:
            return pareto.reference_point(self.search_trials, self.objectives)
        except ValueError:
            return None

    def hypervolume(self) -> list[float]:
        """Return the dominated hypervolume after each trial of the search."""
        corner = self.reference()
        if corner is None:
            return [0.0] * len(self.search_trials)
        return [float(v) for v in pareto.hypervolume_by_trial(self.search_trials, self.objectives, corner)]


def _label(trial: Trial) -> str:
    return f"trial {trial.number}" if trial.role == SEARCH else trial.role.label


def state_counts(trials: Sequence[Trial]) -> Mapping[str, int]:
    """Return the number of trials in each state."""
    counts: dict[str, int] = {}
    for trial in trials:
        counts[trial.state] = counts.get(trial.state, 0) + 1
    return counts
