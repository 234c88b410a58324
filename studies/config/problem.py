"""From the settings of a study to the problem that a searcher works on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random

from autopeft.search_space.architecture import Candidate
from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.declaration import SpaceError
from autopeft.search_space.limits import Limits
from autopeft.search_space.problem import Problem
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.searchers.bo.encoding import smallest
from autopeft.studies.config.declaration import declare
from autopeft.studies.config.source import StudyFileError
from autopeft.studies.config.starting import start_points
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.errors import NoFeasibleCandidateError


def space_for(study: StudyFile, backbone: Backbone) -> SearchSpace:
    """Build the study's space over `backbone`. Raises StudyFileError."""
    with _rendered(study):
        return declare(study, backbone).space(backbone)


#: Random candidates that are compared with the limits before a study starts.
PROBES = 500


def check_feasible(problem: Problem, rejection: Callable[[Candidate], tuple[float, str] | None], seed: int) -> None:
    """Raise NoFeasibleCandidateError before the first training if no candidate can meet the limits.

    `rejection`: returns by how much a candidate's declared costs exceed a limit and the reason, or None.
    """
    if not problem.limits.maxima:
        return
    space, rng = problem.space, Random(seed)
    probes = [space.decode(space.sample(rng)) for _ in range(PROBES)]
    # If the smallest ones are too large, no number of draws would help.
    probes += smallest(space)
    rejections = [(candidate, rejection(candidate)) for candidate in probes]
    if any(found is None for _, found in rejections):
        return
    _, reason = min((o for c, o in rejections if o and c.architecture), default=(1.0, "none has an adapter"))
    raise NoFeasibleCandidateError(
        f"no candidate meets the constraints; the closest of {PROBES} random candidates: {reason}"
    )


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
