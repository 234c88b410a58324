"""The check of a study before any training: its data, metrics, model and space."""

from __future__ import annotations

from autopeft.evaluators.backbones import describe_backbone
from autopeft.evaluators.data.splits import Splits, load_splits
from autopeft.evaluators.errors import DataError, ModelError
from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.backbones.introspection import UnknownBackboneError
from autopeft.search_space.declaration import domain_problems
from autopeft.search_space.metrics import MetricError, Own
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.searchers import SEARCHERS
from autopeft.studies.config.problem import problem_for
from autopeft.studies.config.source import StudyFileError
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.session import prior_trials


def check(settings: StudyFile) -> tuple[Splits, Backbone, SearchSpace]:
    """Read the data, test the study's own metrics on it, describe the model, and build the space.

    Raises StudyFileError with every problem.
    """
    problems: list[str] = []
    splits = backbone = space = None
    try:
        splits = load_splits(settings.data_settings(), settings.task)
    except DataError as error:
        problems += [settings.render(("data",), problem) for problem in error.problems]
    for name, metric in settings.own_metrics().items():
        try:
            _try(metric.loaded(settings.folder), settings, splits)
        except MetricError as error:
            problems.append(settings.render(("metrics", name), str(error)))
    try:
        labels = splits.labels if splits else None
        backbone = describe_backbone(
            settings.model_id, settings.model.revision, settings.task, labels, settings.model.modules
        )
    except ModelError as error:
        problems.append(settings.render(("model", "id"), str(error)))
    except UnknownBackboneError as error:
        problems.append(settings.render(("model", "modules"), str(error)))
    if backbone is not None:
        try:
            problem = problem_for(settings, backbone)
            space = problem.space
            if splits is not None:
                problems += [
                    settings.render(path, what) for path, what in domain_problems(space.adapters, splits.domains)
                ]
            SEARCHERS[settings.search.searcher](problem, settings.seed)
            prior_trials(settings, problem)
        except StudyFileError as error:
            problems += error.problems
        except ValueError as error:
            problems.append(settings.render(("search", "searcher"), str(error)))
    if problems:
        raise StudyFileError(problems)
    assert splits is not None
    assert backbone is not None
    assert space is not None
    return splits, backbone, space


def _try(metric: Own, settings: StudyFile, splits: Splits | None) -> None:
    """Compute a metric on partly correct predictions. Raises MetricError."""
    import numpy as np

    targets = None if splits is None else settings.task_class.truth(splits.validation, splits.labels or ())
    if targets is not None:
        metric.of(targets, np.roll(targets, 1, axis=0))
