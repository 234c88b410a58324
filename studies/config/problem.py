"""From the settings of a study to the problem that a searcher works on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.declaration import SpaceError
from autopeft.search_space.limits import Limits
from autopeft.search_space.problem import Problem
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.studies.config.declaration import declare
from autopeft.studies.config.source import StudyFileError
from autopeft.studies.config.starting import start_points
from autopeft.studies.config.study_file import StudyFile


def space_for(study: StudyFile, backbone: Backbone) -> SearchSpace:
    """Build the study's space over `backbone`. Raises StudyFileError."""
    with _rendered(study):
        return declare(study, backbone).space(backbone)


def problem_for(study: StudyFile, backbone: Backbone) -> Problem:
    """Build the problem for a searcher, without the trials of a prior study. Raises StudyFileError."""
    space = space_for(study, backbone)
    limits = Limits.of(study.constraints.model_dump(exclude_none=True), backbone)
    with _rendered(study):
        start = start_points(study, space, limits)
    return Problem(
        space=space,
        objectives=study.objectives_list(),
        goal=study.goal,
        within=study.recommend.within,
        reported=study.reported_list(),
        num_trials=study.search.trials,
        limits=limits,
        initial=study.search.initial,
        surrogate=study.search.surrogate,
        start=start,
    )


@contextmanager
def _rendered(study: StudyFile) -> Iterator[None]:
    """Turn a SpaceError into a StudyFileError with the problems in the order of the file."""
    try:
        yield
    except SpaceError as error:
        problems = sorted(error.problems, key=lambda problem: study.line(problem[0]))
        raise StudyFileError(study.render(path, what) for path, what in problems) from None
