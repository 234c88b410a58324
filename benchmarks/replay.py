"""Replays of a recorded search under perturbed losses: how far last digits change its trials (command `perturb`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import optuna
from typing_extensions import override

from autopeft.benchmarks.contest import SilentWatcher
from autopeft.evaluators.base import Costs, Evaluator, Outcome, Request
from autopeft.search_space.architecture import Candidate
from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.problem import COPY, COSTS, SEARCH, Problem, Trial, declared_costs
from autopeft.searchers import SEARCHERS, FromScores, Searcher, Suggestion
from autopeft.studies.config.fingerprint import fingerprint
from autopeft.studies.config.problem import problem_for
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.plan import StudyPlan, plan_of
from autopeft.studies.engine.session import as_started, was_started
from autopeft.studies.engine.study_loop import StudyLoop
from autopeft.studies.engine.watcher import Watcher
from autopeft.studies.errors import ConfigurationError, NoFeasibleCandidateError
from autopeft.studies.reports.markdown import table
from autopeft.studies.storage.ledger import BACKBONE, Ledger


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """The search of a study as its ledger has it: `trials` of the search in order, and of the baselines before it."""

    study: str
    problem: Problem
    plan: StudyPlan
    searcher: type[Searcher]
    baselines: tuple[Trial, ...]
    trials: tuple[Trial, ...]

    @classmethod
    def of(cls, settings: StudyFile) -> Recording:
        """Read the ledger of a study; model and data are not loaded.

        Raises ConfigurationError if the study never started, has changed or is not finished, or if its searcher starts
        from scores, which only the model gives.
        """
        searcher = SEARCHERS[settings.search.searcher]
        if issubclass(searcher, FromScores):
            raise ConfigurationError(
                f"search.searcher: {searcher.name} starts from scores that a model gives, so it cannot be replayed from"
                " a ledger: use a study of another searcher, such as bo"
            )
        if not was_started(settings):
            raise ConfigurationError(f"{settings.output_folder}: has no study to replay; `autopeft run` makes one")
        settings = as_started(settings)
        ledger = Ledger.open(settings.storage_url, settings.study, fingerprint(settings))
        trials = ledger.trials()
        searched = [trial for trial in trials if trial.role in (SEARCH, COPY)]
        if not searched or any(trial.state == "running" for trial in searched):
            raise ConfigurationError(f"{settings.output_folder}: its search has not ended: `autopeft resume` ends it")
        return cls(
            study=settings.study,
            problem=replace(problem_for(settings, ledger.backbone), prior=ledger.prior_trials),
            plan=replace(plan_of(settings), timeout_s=None),
            searcher=searcher,
            baselines=tuple(trial for trial in trials if trial.role.kind == "baseline"),
            trials=tuple(searched),
        )

    def perturbed(self, by: float, seed: int) -> Recording:
        """Return the recording with each measured quality, final or at a rung, and its standard error multiplied.

        The factors are drawn uniformly between 1 - `by` and 1 + `by`. Costs stay as they are.
        """
        rng = Random(seed)

        def changed(values: Mapping[str, float]) -> dict[str, float]:
            return {name: v if name in COSTS else v * (1 + rng.uniform(-by, by)) for name, v in values.items()}

        def perturb(trial: Trial) -> Trial:
            if trial.measurement is None:
                return trial
            found = trial.measurement
            values = changed(found.values)
            measurement = replace(
                found,
                values=values,
                std_err=changed(found.std_err),
                rungs=tuple((share, changed(at_rung)) for share, at_rung in found.rungs),
            )
            complete = trial.state == "complete"
            violation = self.problem.violation(values) if complete else trial.violation
            return replace(trial, measurement=measurement, violation=violation)

        return replace(
            self,
            baselines=tuple(map(perturb, self.baselines)),
            trials=tuple(map(perturb, self.trials)),
        )

    def kept(self) -> int:
        """Search again over these outcomes; return how many trials it proposes as recorded before another one."""
        # Like the study's own, but in memory.
        study = optuna.create_study(directions=["minimize"] * len(self.problem.objectives))
        study.set_user_attr(BACKBONE, self.problem.space.backbone.to_dict())
        ledger = Ledger(study, "in memory")
        for trial in self.baselines:
            begun = ledger.begin(self.problem, trial.role, trial.candidate, seed=trial.seed)
            ledger.finish([replace(trial, number=begun.number)], self.problem.objectives)
        return _Replay(self, ledger).kept()


class _Replay(StudyLoop):
    """The loop of a study over recorded outcomes, up to the first suggestion that was not recorded."""

    def __init__(self, recording: Recording, ledger: Ledger) -> None:
        evaluator = _Untrained(recording.problem.space.backbone)
        super().__init__(recording.problem, evaluator, recording.searcher, ledger, None, recording.plan)
        self.recorded = recording.trials
        self.first = len(recording.baselines)

    def kept(self) -> int:
        # The recorded study may have found nothing feasible either.
        with suppress(_DepartureError, NoFeasibleCandidateError):
            self._search((), SilentWatcher())
        return len(self.trials) - self.first

    @override
    def _suggestion(self, searcher: Searcher, batch: Sequence[Trial]) -> Suggestion | None:
        place = len(self.trials) - self.first
        if place == len(self.recorded):
            return None
        suggestion = super()._suggestion(searcher, batch)
        if suggestion is None or dict(suggestion.genes) != dict(self.recorded[place].genes):
            raise _DepartureError
        return suggestion

    @override
    def _evaluate_batch(self, trials: Sequence[Trial], watcher: Watcher, halving: bool = False) -> None:
        for trial in trials:
            found = self.recorded[trial.number - self.first]
            self._finish(
                replace(
                    trial,
                    state=found.state,
                    measurement=found.measurement,
                    violation=found.violation,
                    error=found.error,
                )
            )


class _DepartureError(Exception):
    """The searcher suggests another candidate than the recorded one."""


class _Untrained(Evaluator):
    """An evaluator that knows what needs no model: declared costs. A replay has its outcomes from the ledger."""

    name = "recorded"

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    @override
    def costs(self, candidate: Candidate, measured: frozenset[str] = frozenset()) -> Costs:
        return Costs(values=declared_costs(candidate.architecture, self.backbone))

    @override
    def num_steps(self, request: Request) -> int:
        raise AssertionError("a replay trains nothing: `_Replay` takes recorded outcomes")

    @override
    def evaluate(self, *requests: Any, **options: Any) -> list[Outcome]:
        raise AssertionError("a replay trains nothing: `_Replay` takes recorded outcomes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stability:
    """Trials of a study's search that replays propose as recorded, before the first other one.

    `trials`: numbers of the recorded trials. `unperturbed`, `perturbed`: how many of them are kept, without a
    perturbation and in each repeat with one.
    """

    study: str
    trials: tuple[int, ...]
    unperturbed: int
    perturbed: tuple[int, ...]

    def first_other(self, kept: int) -> int | None:
        """Return the number of the first trial that is another one; None if all are kept."""
        return None if kept == len(self.trials) else self.trials[kept]


def stability(recording: Recording, by: float, repeats: int, advance: Callable[[], None] = lambda: None) -> Stability:
    """Replay a search once unperturbed and `repeats` times with perturbed losses, each with a seed of its own."""
    unperturbed = recording.kept()
    advance()
    kept = []
    for seed in range(repeats):
        kept.append(recording.perturbed(by, seed).kept())
        advance()
    return Stability(
        study=recording.study,
        trials=tuple(trial.number for trial in recording.trials),
        unperturbed=unperturbed,
        perturbed=tuple(kept),
    )


def to_dict(found: Sequence[Stability], by: float) -> dict[str, object]:
    """Return the results as JSON-able data."""
    return {
        "by": by,
        "studies": [
            {
                "study": each.study,
                "trials": len(each.trials),
                "unperturbed": {"kept": each.unperturbed, "first_other": each.first_other(each.unperturbed)},
                "perturbed": [{"kept": kept, "first_other": each.first_other(kept)} for kept in each.perturbed],
            }
            for each in found
        ],
    }


def to_markdown(found: Sequence[Stability], by: float) -> str:
    """Return the results as a table: "all", or the number of the first trial that is another one."""
    repeats = range(1, max(len(each.perturbed) for each in found) + 1)
    rows = [["study", "trials", "unperturbed", *(f"repeat {k}" for k in repeats)]]
    for each in found:
        others = [each.first_other(kept) for kept in (each.unperturbed, *each.perturbed)]
        cells = ["all" if other is None else f"to {other}" for other in others]
        rows.append([each.study, f"{len(each.trials)}", *cells])
    lines = [
        table(rows, right=range(1, len(rows[0]))),
        "",
        f"Losses and their standard errors differ by up to {by:g} of their size. `all`: the replay proposes every trial"
        " as recorded; `to 12`: trial 12 is the first one that it does not.",
    ]
    changed = [each.study for each in found if each.unperturbed < len(each.trials)]
    if changed:
        lines.append(
            f"Without a perturbation, {', '.join(changed)} came out otherwise too: another version or machine made the"
            " ledger, or search.trials has changed since. Perturbed replays then say nothing."
        )
    return "\n".join(lines) + "\n"
