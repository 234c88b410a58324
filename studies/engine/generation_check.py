"""The check of metrics of generated texts on the encoded rows of a study, before any training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from autopeft.evaluators.data.splits import Splits
from autopeft.evaluators.errors import DataError, MissingPackageError
from autopeft.evaluators.texts import check_packages, longest_text, prompts_of
from autopeft.search_space.metrics import QUALITIES, MetricError, OfTexts, RegexMatch, UserDefined, quality
from autopeft.studies.config.source import Keys
from autopeft.studies.config.study_file import StudyFile


def lacking_package(settings: StudyFile) -> str | None:
    """Return the problem of the first objective whose package is not installed, or None."""
    for i, objective in enumerate(settings.objectives):
        try:
            check_packages([QUALITIES[objective.name]] if objective.name in QUALITIES else [])
        except MissingPackageError as error:
            return settings.render(("objectives", i), str(error))
    return None


def texts_problems(settings: StudyFile, splits: Splits, own: Mapping[str, UserDefined], model: Any) -> Iterator[str]:
    """Yield the problems of metrics of texts, which are tried on the references of the neighbouring rows.

    `splits`: with their encoded rows. `own`: the user's metrics with their code. Metrics whose package is missing are
    not tried.
    """
    named = [(("objectives", i), o.name) for i, o in enumerate(settings.objectives) if o.name in QUALITIES]
    metrics: list[tuple[Keys, Any]] = [(place, quality(name, settings.greedy.pattern)) for place, name in named]
    metrics += [(("metrics", name), metric) for name, metric in own.items()]
    of_texts = [(place, metric) for place, metric in metrics if isinstance(metric, OfTexts)]
    if not of_texts or splits.encoded is None:
        return
    task = splits.encoded.task
    try:
        rows = prompts_of(task, splits, splits.encoded.examples)
    except DataError as error:
        for problem in error.problems:
            yield settings.render(of_texts[0][0], problem)
        return
    try:
        longest_text(rows, settings.greedy.for_evaluators(), task.limit(model))
    except DataError as error:
        yield from (settings.render(("generation",), problem) for problem in error.problems)
    for split, found in rows.items():
        prompts, references = (
            [task.processor.decode(getattr(row, name), skip_special_tokens=True) for row in found]
            for name in ("prompt", "reference")
        )
        for place, metric in of_texts:
            # Of the metrics of the registry, the pattern alone depends on what the rows say.
            if isinstance(metric, RegexMatch) or (metric.name in own and split == "validation"):
                try:
                    metric.of(prompts, [*references[1:], *references[:1]], references)
                except MetricError as error:
                    yield settings.render(place, f"{error} ({split} rows)")
