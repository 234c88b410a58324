"""From a trial of a finished study to its recipe with its promises."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from statistics import fmean
from typing import Any, Literal

from autopeft.search_space.architecture import Candidate
from autopeft.search_space.backbones.backbone import Backbone, Site
from autopeft.studies.analysis.front import interval
from autopeft.studies.analysis.snapshot import Entry, Snapshot
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.recipes.parts import (
    Averaged,
    Comparison,
    Contents,
    Difference,
    Measured,
    OwnMetric,
    OwnTask,
    Provenance,
    RecipeData,
    RecipeGeneration,
)
from autopeft.studies.recipes.recipe import Recipe
from autopeft.studies.storage.ledger import Ledger
from autopeft.studies.versions import version_of, versions_of

PACKAGES = ("torch", "transformers", "peft", "optuna", "mlflow", "numpy")
#: The version of a package that is not installed.
UNKNOWN = "unknown"


def recipe_of(settings: StudyFile, ledger: Ledger, snapshot: Snapshot, number: int) -> Recipe:
    """Return the recipe of a complete trial, with promises if it was trained with several seeds."""
    entry = snapshot.entry(number)
    backbone, labels = snapshot.backbone, ledger.labels
    # The recorded ones: the model may have changed or be gone.
    recorded = ledger.head_sites
    sites = recipe_head_sites(settings, labels, backbone) if recorded is None else recorded
    return bare_recipe(
        settings,
        labels,
        backbone,
        entry.trial.candidate,
        sites,
        trial=number,
        seed=entry.runs[0].seed,
        domains=ledger.domains,
        metrics={
            name: _own(settings, name, "maximise" if own.maximise else "minimise")
            for name, own in settings.own_metrics().items()
        },
        generation=RecipeGeneration(**settings.greedy.deciding) if settings.greedy.deciding else None,
        measured=_measured(snapshot, entry),
        averaged=_averaged(entry, snapshot.quality),
        compared=_compared(snapshot, number),
        contents=_contents(ledger.contents),
    )


def recipe_head_sites(settings: StudyFile, labels: Sequence[str] | None, backbone: Backbone) -> tuple[Site, ...]:
    """Return the linears of the task head, from the model's configuration."""
    from autopeft.evaluators.attachment.heads import head_sites
    from autopeft.evaluators.backbones import skeleton

    model = settings.model
    return head_sites(skeleton(settings.model_id, model.revision, settings.task, labels, model.quantization), backbone)


def bare_recipe(
    settings: StudyFile,
    labels: Sequence[str] | None,
    backbone: Backbone,
    candidate: Candidate,
    head_sites: Sequence[Site],
    *,
    trial: int = -1,
    **fields: Any,
) -> Recipe:
    """Return the recipe of any candidate of the study, trained or not."""
    if os.path.exists(settings.model_id):  # it may have moved with its study
        backbone = replace(backbone, id=settings.model_id)
    return Recipe.of(
        backbone=backbone,
        candidate=candidate,
        head_sites=head_sites,
        dtype=settings.model.dtype,
        task=settings.task,
        labels=labels,
        data=RecipeData(**settings.data.model_dump(exclude_none=True), folder=str(settings.folder)),
        forgetting=settings.forgetting,
        provenance=Provenance(
            study=settings.study,
            trial=trial,
            autopeft=version_of("autopeft") or UNKNOWN,
            packages={name: version or UNKNOWN for name, version in versions_of(PACKAGES).items()},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        ),
        **fields,
    )


def _own(settings: StudyFile, name: str, direction: Literal["maximise", "minimise"]) -> OwnMetric | OwnTask:
    given = (settings.metrics or {})[name]
    if isinstance(given, str):
        return OwnMetric(function=given, direction=direction)
    return OwnTask(**given.model_dump(), direction=direction)


def _contents(recorded: Mapping[str, Any]) -> Contents | None:
    """Return what `train` and `verify` compare of a study's contents; None for a ledger without them."""
    return Contents(rows=recorded["rows"], weights=recorded["weights"]) if recorded else None


def _measured(snapshot: Snapshot, entry: Entry) -> dict[str, Measured]:
    """Return measured costs and qualities; the main quality on the test split with its promise, if it has one."""
    assert entry.trial.measurement is not None
    values, std_err = snapshot.values_of(entry, snapshot.spread())
    seeds = tuple(run.seed for run in entry.runs)
    found = {}
    for name, value in values.items():
        # Only the main quality has a promise: among many intervals, some would fail by chance.
        promise = snapshot.promise(entry, snapshot.spread("test")) if name == snapshot.quality else None
        if promise is not None:
            found[name] = Measured(
                value=promise.value,
                std_err=promise.std_err,
                low=promise.low,
                high=promise.high,
                split="test",
                seeds=seeds,
            )
        else:
            found[name] = Measured(value=value, std_err=std_err.get(name), split="validation", seeds=seeds)
    return found


def _compared(snapshot: Snapshot, number: int) -> Comparison | None:
    """Return the place of a trial on the front, or None if it is not on it."""
    quality = snapshot.quality
    row = next((row for row in snapshot.front().members if row.trial == number), None)
    if row is None or row.standing is None:
        return None
    return Comparison(
        metric=quality,
        value=row.values[quality],
        std_err=row.std_err[quality],
        standing=row.standing,
        recommended=row.recommended,
        difference=None if row.difference is None else Difference(**interval(row.difference)),
    )


def _averaged(entry: Entry, quality: str) -> dict[str, Averaged]:
    runs = entry.averaged
    if not runs:
        return {}
    value, routed = fmean(run.averaged[quality] for run in runs), fmean(run.values[quality] for run in runs)
    return {quality: Averaged(value=value, routed=routed, seeds=tuple(run.seed for run in runs))}
