"""Checks of the metrics that a study file names: objectives, what is only reported, and the user's own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from autopeft.search_space.metrics import (
    FORGETTING,
    QUALITIES,
    SEPARATOR,
    WORST,
    ByDomain,
    LmEval,
    Metric,
    MetricError,
    MetricsByName,
    OfTexts,
    OnOwnRows,
    PassAt1,
    Quality,
    RegexMatch,
    UserDefined,
)
from autopeft.search_space.problem import COSTS, METRICS
from autopeft.search_space.spelling import did_you_mean
from autopeft.studies.config.sections.search import MetricSettings, ObjectiveSettings
from autopeft.studies.config.source import Keys, PlacedProblem
from autopeft.studies.config.study_file import StudyFile

if TYPE_CHECKING:
    from autopeft.evaluators.tasks import Task


def metric_problems(study: StudyFile) -> Iterator[PlacedProblem]:
    """Yield the problems of metrics that can be found without the data."""
    own: dict[str, UserDefined] = {}
    yield from _own_problems(study, own)
    known = study.metrics_by_name(own)
    yield from _named_problems(study, known)
    yield from _direction_problems(study, own)
    yield from _objective_problems(study, known)
    yield from _generation_problems(study, known)


def _own_problems(study: StudyFile, declared: dict[str, UserDefined]) -> Iterator[PlacedProblem]:
    """Yield the problems of the user's metrics, and add those without any to `declared`."""
    task = study.task_class
    for name in study.metrics or ():
        if name in METRICS:
            yield ("metrics", name), f"{name!r} is already a metric: choose another name"
            continue
        try:
            metric = study.own_metric(name)
        except MetricError as error:
            yield ("metrics", name), str(error)
            continue
        declared[name] = metric
        if isinstance(metric, LmEval):
            if not task.generates:
                yield ("metrics", name), "a task of lm-eval needs a language model: set task: causal-lm"
            elif study.data_settings().domain_field is not None:
                yield ("metrics", name), "the documents of a task of lm-eval have no domains: leave out data.domain"
        elif not metric.computable(task.readable()):
            what = f"your own metrics need targets and predictions, which only {' or '.join(_able(metric))} has"
            yield ("metrics", name), what


def _named_problems(study: StudyFile, known: MetricsByName) -> Iterator[PlacedProblem]:
    objectives = {objective.name for objective in study.objectives}
    seen: set[str] = set()
    for place, named in study.named_metrics:
        name = named.name
        if place[0] == "report" and name in objectives:
            yield place, f"{name!r} is already an objective, which all tables have: remove it here"
        elif name in seen:
            yield place, f"{name!r} occurs twice"
        elif name in known:
            yield from _one_problems(place, named, known[name], study)
        else:
            yield from _unknown(place, name, known, study)
        seen.add(name)


def _one_problems(place: Keys, named: MetricSettings, metric: Metric, study: StudyFile) -> Iterator[PlacedProblem]:
    """Yield the problems of a metric with this name."""
    task = study.task_class
    if isinstance(metric, Quality) and not isinstance(metric.whole, UserDefined):
        if not isinstance(metric, OnOwnRows) and not metric.whole.computable(task.readable()):
            yield place, f"{metric.name} {_needs(metric.whole, task)}"
        if (named.direction or _direction(metric)) != _direction(metric):
            what = f"a better {metric.name} is {'larger' if metric.maximise else 'smaller'}: leave the direction out"
            yield (*place, "direction"), what
    if isinstance(metric, ByDomain) and study.data_settings().domain_field is None:
        yield place, f"{metric.name} needs data.domain, the field of the rows with their domains"
    yield from _beyond(place, named, metric)


def _unknown(place: Keys, name: str, known: MetricsByName, study: StudyFile) -> Iterator[PlacedProblem]:
    """Yield why no metric has this name; nothing for one of the user's, which has its own message."""
    whole, separator, domain = name.partition(SEPARATOR)
    if separator and not domain:
        yield place, f"{name!r} ends without a domain: write the name of one, or {SEPARATOR}{WORST} for the worst one"
    elif separator and whole in COSTS:
        yield place, f"{name!r}: {whole} is a cost, which is the same for all domains"
    elif separator and isinstance(known.get(whole), OnOwnRows):
        what = "retained rows" if whole == FORGETTING.name else "documents of its task"
        yield place, f"{name!r}: {whole} is over all {what}"
    elif whole not in known and whole not in (study.metrics or {}):
        names = [*known, *(study.metrics or {})]
        yield place, f"unknown metric {name!r}{did_you_mean(whole if separator else name, names)}"


def _direction_problems(study: StudyFile, own: Mapping[str, UserDefined]) -> Iterator[PlacedProblem]:
    """Yield the parts of the user's metrics that have the other direction than the rest."""
    for name in own:
        found = [
            (place, named)
            for place, named in study.named_metrics
            if named.name.partition(SEPARATOR)[0] == name and named.direction is not None
        ]
        for place, named in found[1:]:
            if named.direction != found[0][1].direction:
                what = f"{found[0][1].name} has the direction {found[0][1].direction}: give all parts of {name} one"
                yield (*place, "direction"), what


def _objective_problems(study: StudyFile, known: MetricsByName) -> Iterator[PlacedProblem]:
    """Yield the problems of the objectives as a whole."""
    names, task = [objective.name for objective in study.objectives], study.task_class
    first = next(iter(known.qualities(names)), None)
    within = study.recommend.within
    if within and first and first.bound is not None and first.worst is not None:
        low, high = sorted((first.bound, first.worst))
        if within >= high - low:
            what = f"counts every loss of {first.name} as none, from {low:g} to {high:g}: give a smaller margin"
            yield ("recommend", "within"), what
    if all(name in COSTS for name in names):
        quality = " or ".join(_computable(task))
        yield ("objectives",), f"must contain {quality}: if all objectives are costs, the best candidate has no adapter"


def _generation_problems(study: StudyFile, known: MetricsByName) -> Iterator[PlacedProblem]:
    """Yield the problems of `generation`: settings without a metric that reads them, and a wrong pattern."""
    settings = study.generation
    places = [(place, known.qualities([named.name])) for place, named in study.named_metrics]
    of_texts = [(place, m.whole) for place, found in places for m in found if isinstance(m.whole, OfTexts)]
    read = {metric.name for _, metric in of_texts if not isinstance(metric, UserDefined)}
    yield from _program_problems(study, next((metric.name for _, metric in of_texts if metric.runs_code), None))
    matching = RegexMatch().name
    own = any(isinstance(known.get(name), OfTexts) for name in study.metrics or ())
    if settings is not None and not read and not own:
        names = ", ".join(name for name, metric in QUALITIES.items() if isinstance(metric, OfTexts))
        what = f"has no effect without a metric of texts among the objectives or in report: {names}, or your own"
        yield ("generation",), what
    if settings is None or settings.pattern is None:
        place = next((place for place, metric in of_texts if metric.name == matching), None)
        if place is not None:
            yield place, f"{matching} needs generation.pattern, a regular expression"
        return
    if matching not in read and read:
        yield ("generation", "pattern"), f"has no effect without {matching}, which reads it"
    try:
        re.compile(settings.pattern)
    except re.error as error:
        yield ("generation", "pattern"), f"is no regular expression: {error}"


def _program_problems(study: StudyFile, running: str | None) -> Iterator[PlacedProblem]:
    """Yield the problems of programs with tests, which the metric `running` runs."""
    from autopeft.evaluators.texts import CONSENT

    has_no_effect = f"has no effect without {PassAt1().name} among the objectives or in report"
    if running and not study.greedy.run_code:
        yield ("generation",), f"{running} runs generated programs on this machine: {CONSENT}"
    if running and study.data.tests is None:
        yield ("data", "tests"), f"{running} needs the column of the Python code that tests a program"
    if not running and study.data.tests is not None:
        yield ("data", "tests"), has_no_effect
    if not running and study.greedy.run_code:
        yield ("generation", "run_code"), has_no_effect


def _direction(metric: Metric) -> str:
    return "maximise" if metric.maximise else "minimise"


def _beyond(place: Keys, named: MetricSettings, metric: Metric) -> Iterator[PlacedProblem]:
    """Yield values of an objective that are better than the best possible value of its metric."""
    best, sign = metric.bound, 1 if metric.maximise else -1
    if best is None or (named.direction or _direction(metric)) != _direction(metric):
        return
    reference = named.reference if isinstance(named, ObjectiveSettings) else None
    if named.bound is not None and sign * (named.bound - best) > 0:
        what = f"no candidate can reach {named.bound:g}: the best possible {metric.name} is {best:g}"
        yield (*place, "bound"), what
    if reference is not None and sign * (reference - best) >= 0:
        what = f"no candidate can be better than {reference:g}: the best possible {metric.name} is {best:g}"
        yield (*place, "reference"), what


def _able(metric: Quality) -> list[str]:
    """Return the tasks for which a metric can be computed."""
    from autopeft.evaluators.tasks import TASKS

    return [name for name, task in TASKS.items() if metric.computable(task.readable())]


def _computable(task: type[Task]) -> list[str]:
    """Return the quality metrics that can be computed for a task."""
    return [name for name, metric in QUALITIES.items() if metric.computable(task.readable())]


def _needs(metric: Quality, task: type[Task]) -> str:
    """Return why a metric cannot be computed for a task or a variant of it."""
    able = _able(metric)
    if not able:
        return "cannot be computed: no task has the columns that it needs"
    if task.name not in able:
        return f"needs the task {' or '.join(able)}"
    return f"cannot be computed for {task.problem_type}: choose among {', '.join(_computable(task))}"
