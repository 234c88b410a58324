"""Checks of the section `forgetting`, and of the metric of this name."""

from __future__ import annotations

from collections.abc import Iterator

from autopeft.evaluators.rows import EMBEDDED_PROSE as PROSE
from autopeft.search_space.metrics import FORGETTING
from autopeft.search_space.problem import COSTS
from autopeft.studies.config.source import PlacedProblem
from autopeft.studies.config.study_file import StudyFile

SECTION = "forgetting"


def forgetting_problems(study: StudyFile) -> Iterator[PlacedProblem]:
    """Yield the problems of the section without the metric, of the metric without the section, and of the rows."""
    section, data = study.forgetting, study.data_settings()
    if data.source == PROSE:
        yield ("data", "source"), f"{PROSE} has rows to retain and none to learn from: set it in {SECTION}.source"
    place = next((place for place, named in study.named_metrics if named.name == FORGETTING.name), None)
    if place is not None and section is None:
        what = f"needs the section {SECTION}, which says what is to be retained, such as {{source: {PROSE}}}"
        yield place, f"{FORGETTING.name} {what}"
    qualities = [(i, o.name) for i, o in enumerate(study.objectives) if o.name not in COSTS]
    if qualities and qualities[0][1] == FORGETTING.name:
        what = "cannot be the first quality: the model that learns least forgets least; name what it is to learn before"
        yield ("objectives", qualities[0][0]), f"{FORGETTING.name} {what}"
    if section is None:
        return
    if place is None:
        yield (SECTION,), f"has no effect without {FORGETTING.name} among the objectives or in report"
    if section.source == PROSE:
        if section.file is not None:
            yield (SECTION, "file"), f"cannot be set with {PROSE}; to use your file, set {SECTION}.source to files"
        if study.task != "causal-lm":
            what = f"is text without labels, for causal-lm: set files, and {SECTION}.file to rows of {study.task}"
            yield (SECTION, "source"), f"{PROSE} {what}"
        elif data.domain_field is not None:
            what = (
                f"has no column {data.domain_field!r}, which data.domain names: set files, with rows of these domains"
            )
            yield (SECTION, "source"), f"{PROSE} {what}"
    elif section.file is None:
        yield (SECTION, "file"), "is missing: set it to a file (.jsonl, .json, .csv or .parquet)"
