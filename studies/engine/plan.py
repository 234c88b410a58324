"""The plan of a study's evaluations, apart from its space and its searcher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from autopeft.search_space.problem import Goal
    from autopeft.studies.config.study_file import StudyFile


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyPlan:
    """Evaluations besides the trials of the problem, the length of each training, and the output folder.

    `share`: share of the training steps that a candidate of the search gets. `rungs`: ascending shares of the steps;
    after each, the share `keep` of a batch continues, or those that `racing` selects ("auto"). `controls`: whether
    finalists with mixtures are compared with matched baselines. Seeds: the search trains with `seed`, finalists with
    the next seeds, on average `finalist_seeds` of them. `timeout_s` is that of the search, `minutes` that of the study.
    `goal`: see `Problem`. `within`: see `Snapshot`.
    """

    study: str
    output_folder: Path
    seed: int = 0
    batch: int = 1
    share: float = 1.0
    rungs: tuple[float, ...] = ()
    keep: float | Literal["auto"] = 1.0
    timeout_s: float | None = None
    minutes: float | None = None
    baselines: tuple[str, ...] = ()
    learning_rates: tuple[float, ...] = ()
    full_learning_rates: tuple[float, ...] = ()
    most_finalists: int = 1
    finalist_seeds: int = 1
    controls: bool = False
    goal: Goal = "front"
    within: float | None = None


def plan_of(settings: StudyFile) -> StudyPlan:
    """Return the plan that a study file declares."""
    search, baselines, finalists = settings.search, settings.baselines, settings.finalists
    return StudyPlan(
        study=settings.study,
        output_folder=settings.output_folder,
        seed=settings.seed,
        batch=search.batch,
        share=search.share,
        rungs=search.rungs,
        keep=search.keep,
        timeout_s=search.timeout_s,
        minutes=settings.minutes,
        baselines=baselines.names,
        learning_rates=baselines.learning_rates,
        full_learning_rates=baselines.full_learning_rates,
        most_finalists=finalists.most,
        finalist_seeds=finalists.seeds,
        controls=finalists.controls,
        goal=settings.goal,
        within=settings.recommend.within,
    )


def weights_path(output_folder: Path, number: int) -> Path:
    """Return the file of the trained weights of a finalist."""
    return output_folder / "weights" / f"trial-{number}.safetensors"
