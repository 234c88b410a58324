"""Checks of the settings of generated texts, and of the metrics that read these texts."""

from __future__ import annotations

import re
from collections.abc import Iterator

from autopeft.search_space.metrics import QUALITIES, OfTexts, RegexMatch
from autopeft.studies.config.source import PlacedProblem
from autopeft.studies.config.study_file import StudyFile


def generation_problems(study: StudyFile) -> Iterator[PlacedProblem]:
    """Yield the problems of `generation`: settings without a metric that reads them, and a wrong pattern."""
    settings = study.generation
    named = [QUALITIES[o.name] for o in study.objectives if o.name in QUALITIES]
    of_texts = [metric.name for metric in named if isinstance(metric, OfTexts)]
    matching = RegexMatch().name
    if settings is not None and not of_texts and not (study.metrics and study.task_class.generates):
        known = ", ".join(name for name, metric in QUALITIES.items() if isinstance(metric, OfTexts))
        yield ("generation",), f"has no effect without a metric of texts among the objectives: {known}, or your own"
    if settings is None or settings.pattern is None:
        if matching in of_texts:
            i = next(i for i, objective in enumerate(study.objectives) if objective.name == matching)
            yield ("objectives", i), f"{matching} needs generation.pattern, a regular expression"
        return
    if matching not in of_texts and of_texts:
        yield ("generation", "pattern"), f"has no effect: the objective {matching} reads it"
    try:
        re.compile(settings.pattern)
    except re.error as error:
        yield ("generation", "pattern"), f"is no regular expression: {error}"
