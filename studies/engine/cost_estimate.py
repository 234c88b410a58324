"""An estimate of the costs and exports of a study, from its declaration and a few measured steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from autopeft.search_space.architecture import Candidate
from autopeft.search_space.spaces.rules import left_out
from autopeft.searchers.bo.encoding import smallest
from autopeft.studies.config.problem import problem_for
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.plan import plan_of
from autopeft.studies.engine.session import evaluator_for
from autopeft.studies.engine.time_budget import Pace, fitted, pace_of, samples
from autopeft.studies.errors import cause
from autopeft.studies.exporters import EXPORTERS
from autopeft.studies.recipes.build import bare_recipe, recipe_head_sites

if TYPE_CHECKING:
    from autopeft.evaluators.data.splits import Splits
    from autopeft.search_space.backbones.backbone import Backbone


@dataclass(frozen=True, slots=True, kw_only=True)
class CostEstimate:
    """Size, costs and exports of a study.

    `evaluations`: at most; `seeds`: of each finalist, on average. `time_s`: estimated time of the whole study on this
    machine, `texts_s`: of the texts of one training, None without a metric of texts. A measured value is None if it
    cannot be measured; `notes` then has the cause. `exportable`: share of sampled candidates that each export target
    supports. `reasons`: one example per target of what it does not support. `left_out`: see there. `notes`: also those
    of `Evaluator`.
    """

    study: str
    cardinality: int | None
    num_genes: int
    smallest_params: int
    largest_params: int
    backbone_params: int
    evaluations: int
    baselines: int
    trials: int
    batch: int
    seeds: int
    step_s: float | None
    time_s: float | None
    texts_s: float | None
    peak_memory_bytes: float | None
    exportable: dict[str, float]
    reasons: dict[str, str]
    left_out: dict[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the estimate as text, line by line."""
        size = "continuous" if self.cardinality is None else f"{self.cardinality:,} architectures"
        share = self.largest_params / self.backbone_params
        finals = self.evaluations - self.baselines - self.trials
        lines = [
            f"{self.study}",
            f"  space        {size}, {self.num_genes} genes (including training settings)",
            f"  parameters   {self.smallest_params:,} to {self.largest_params:,}"
            f" (the largest: {share:.2%} of the backbone)",
            f"  evaluations  at most {self.evaluations}: {self.baselines} of baselines, {self.trials} trials in batches"
            f" of {self.batch}, {finals} of finalists with {self.seeds} seeds",
        ]
        if self.time_s is not None:
            measured = f"{self.step_s:.3f} s per step, measured on this machine"
            lines.append(f"  time         about {_duration(self.time_s)}: {measured}")
        if self.texts_s is not None:
            lines.append(f"  texts        at most {_duration(self.texts_s)} of each training to generate them")
        if self.peak_memory_bytes is not None:
            size = f"{self.peak_memory_bytes / 1e9:.2f} GB"
            lines.append(f"  memory       about {size} in a training step of the largest candidate")
        lines.append("  exportable   share of the space that a format supports")
        for name, held in self.exportable.items():
            why = f"   e.g. {self.reasons[name]}" if name in self.reasons else ""
            lines.append(f"    {name:<12} {held:4.0%}{why}")
        for rule, roles in self.left_out.items():
            lines.append(f"  left out     {rule}, which many run by hand: no LoRA of its rank at {', '.join(roles)}")
        return lines


def estimate_study(settings: StudyFile, splits: Splits) -> CostEstimate:
    """Load the model, and measure a candidate of median size and the largest one. Writes no files."""
    from autopeft.studies.engine.scheduled_trials import baselines, num_evaluations, num_finals, runs_per_finalist

    evaluator = evaluator_for(settings, splits)
    backbone, space = evaluator.backbone, problem_for(settings, evaluator.backbone).space
    largest, drawn = space.decode(space.largest()), samples(space, settings.seed)
    num_baselines, notes = len(list(baselines(plan_of(settings), space))), list(evaluator.notes_on(largest))
    pace = memory = None
    if settings.minutes is not None:
        pace = pace_of(settings, evaluator, None)
        assert pace is not None
        settings = fitted(settings, pace, num_baselines, runs_per_finalist(plan_of(settings), space))
    else:
        try:
            pace = Pace.typical(settings, evaluator)
        except Exception as error:
            notes.append(f"the time of a training of median size cannot be measured: {cause(error)}")
    notes += [] if pace is None else pace.notes()
    problem, plan = problem_for(settings, backbone), plan_of(settings)
    try:
        memory = evaluator.costs(largest, frozenset({"peak_memory_bytes"})).values["peak_memory_bytes"]
    except Exception as error:
        notes.append(f"the memory of the largest candidate cannot be measured: {cause(error)}")
    time_s = None
    if pace is not None:
        searched_s = problem.num_trials * pace.trial_s(plan)
        time_s = num_baselines * pace.run_s() + searched_s + num_finals(plan, space) * pace.final_s
    exportable, reasons = _exportable(settings, splits, drawn, backbone)
    return CostEstimate(
        study=settings.study,
        cardinality=space.cardinality,
        num_genes=len(space.genes),
        smallest_params=min(c.architecture.num_params(backbone) for c in (*drawn, *smallest(space))),
        largest_params=largest.architecture.num_params(backbone),
        backbone_params=backbone.num_params,
        evaluations=num_evaluations(plan, problem),
        baselines=num_baselines,
        trials=problem.num_trials,
        batch=plan.batch,
        seeds=plan.finalist_seeds,
        step_s=None if pace is None else pace.step_s,
        time_s=time_s,
        texts_s=None if pace is None or evaluator.texts is None else pace.texts_s,
        peak_memory_bytes=memory,
        exportable=exportable,
        reasons=reasons,
        left_out=left_out(space),
        notes=tuple(notes),
    )


def _exportable(
    settings: StudyFile, splits: Splits, samples: list[Candidate], backbone: Backbone
) -> tuple[dict[str, float], dict[str, str]]:
    """Return for each format the share of samples that it supports, at least approximately, and one obstacle."""
    held = dict.fromkeys(EXPORTERS, 0)
    reasons: dict[str, str] = {}
    sites = recipe_head_sites(settings, splits.labels, backbone)
    for candidate in samples:
        recipe = bare_recipe(settings, splits.labels, backbone, candidate, sites)
        for name, exporter in EXPORTERS.items():
            fit = exporter.assess(recipe)
            held[name] += fit.level != "unsupported"
            if fit.lost:
                reasons.setdefault(name, fit.lost[0])
    return {name: count / len(samples) for name, count in held.items()}, reasons


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
