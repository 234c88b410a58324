"""The check of a study before any training: its data, metrics, model and space."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from random import Random
from typing import TYPE_CHECKING, Any

from autopeft.evaluators.backbones import has_outputs, load_processor, skeleton
from autopeft.evaluators.data.encoding import encode_splits
from autopeft.evaluators.data.retained import with_retained
from autopeft.evaluators.data.splits import Splits, load_splits
from autopeft.evaluators.errors import DataError, MissingPackageError, ModelError
from autopeft.evaluators.forgetting import NEW_HEAD
from autopeft.evaluators.harness.documents import with_documents
from autopeft.evaluators.harness.requests import requests_of
from autopeft.evaluators.quantization import check_package
from autopeft.evaluators.texts import SCORED, check_packages, longest_text, programs_of, prompts_of, tests_problems
from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.backbones.introspection import UnknownBackboneError, describe
from autopeft.search_space.declaration import domain_problems
from autopeft.search_space.limits import Limits
from autopeft.search_space.metrics import ByDomain, LmEval, MetricError, OfTexts, Own, Quality, RegexMatch, UserDefined
from autopeft.search_space.metrics.base import DOMAIN, PREDICTION, PREDICTIONS, TARGET, TARGETS
from autopeft.search_space.problem import Problem, declared_costs
from autopeft.search_space.spaces.rules import ALL_BASELINES, RULES
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.searchers import SEARCHERS
from autopeft.searchers.bo.encoding import smallest
from autopeft.studies.config.earlier import with_turns_of
from autopeft.studies.config.problem import problem_for
from autopeft.studies.config.source import Keys, StudyFileError
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.session import open_ledger, prior_trials, recorded_settings, was_started
from autopeft.studies.errors import NoFeasibleCandidateError, UnusableEnvironmentError

if TYPE_CHECKING:
    from torch import nn

#: The baseline without an adapter.
HEAD = "head"
#: The baseline, and the objective, that a quantised backbone cannot have.
FULL, MERGED = "full", "merged_latency_s"
#: Random candidates that are compared with the limits before a study starts.
PROBES = 500


def check(
    settings: StudyFile, progress: Callable[[int, int], None] | None = None
) -> tuple[Splits, Backbone, SearchSpace]:
    """Read and encode the data, test the study's own metrics on it, describe the model, and build the space.

    The splits have their encoded rows, and warnings about what is lost of them. `progress`: as of `encode_splits`.
    Raises StudyFileError with every problem, NoFeasibleCandidateError, and UnusableEnvironmentError if a package is
    missing and all else is right.
    """
    settings = reading_as_started(settings)
    problems: list[str] = []
    splits = model = backbone = space = lacking = None
    try:
        splits = load_splits(settings.data_settings(), settings.task)
    except DataError as error:
        problems += [settings.render(("data",), problem) for problem in error.problems]
    if splits is not None and settings.forgetting is not None:
        try:
            retained = settings.forgetting.for_loading()
            splits = with_retained(splits, retained, settings.data_settings(), settings.task)
        except DataError as error:
            problems += [settings.render(("forgetting",), problem) for problem in error.problems]
    own = {}
    for name, metric in settings.own_metrics().items():
        try:
            own[name] = metric.loaded(settings.folder)
            _try(own[name], settings, splits)
            if splits is not None and isinstance(metric, LmEval):
                splits = with_documents(splits, [metric], settings.folder)
        except MissingPackageError as error:
            lacking = settings.render(("metrics", name), str(error))
        except MetricError as error:
            problems.append(settings.render(("metrics", name), str(error)))
        except DataError as error:
            problems += [settings.render(("metrics", name), problem) for problem in error.problems]
    problems += _by_domain_problems(settings, splits, own)
    try:
        labels = splits.labels if splits else None
        named = settings.model
        model = skeleton(settings.model_id, named.revision, settings.task, labels, named.quantization)
        backbone = describe(model, id=settings.model_id, revision=named.revision, modules=named.modules)
        settings.task_class.check_model(model, backbone)
        compares = settings.forgetting is not None and splits is not None and backbone.head_modules
        if compares and not has_outputs(settings.model_id, named.revision, settings.task, labels):
            problems.append(settings.render(("forgetting",), NEW_HEAD))
    except MissingPackageError as error:
        lacking = settings.render(("model", "id"), str(error))
    except ModelError as error:
        problems.append(settings.render(("model", "id"), str(error)))
    except UnknownBackboneError as error:
        problems.append(settings.render(("model", "modules"), str(error)))
    if splits is not None and model is not None:
        try:
            splits = _encoded(settings, splits, model, progress)
            problems += _texts_problems(settings, splits, own, model)
            found, warnings = _request_problems(settings, splits, own, model)
            problems += found
            splits = replace(splits, warnings=(*splits.warnings, *warnings))
        except DataError as error:
            problems += [settings.render(("data",), problem) for problem in error.problems]
        except ModelError as error:
            problems.append(settings.render(("model", "id"), str(error)))
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
    quantization = None if backbone is None else backbone.quantization
    if quantization is not None:
        found, warnings = _of_quantized(settings, quantization)
        problems += found
        splits = splits and replace(splits, warnings=(*splits.warnings, *warnings))
    if backbone is not None and splits is not None:
        splits = replace(splits, warnings=(*splits.warnings, *baseline_warnings(settings, backbone)))
    try:
        check_package(quantization)
    except MissingPackageError as error:
        lacking = settings.render(("model", "quantization"), str(error))
    lacking = lacking or _lacking_package(settings)
    if lacking and not problems:
        raise UnusableEnvironmentError(lacking)
    if lacking:
        problems.append(lacking)
    if problems:
        raise StudyFileError(problems)
    assert splits is not None
    assert backbone is not None
    assert space is not None
    _check_feasible(settings, problem)
    return splits, backbone, space


def reading_as_started(settings: StudyFile) -> StudyFile:
    """Return settings that read rows as the study did when it was started, where the file does not say how."""
    if not settings.task_class.has_turns or not was_started(settings):
        return settings
    return with_turns_of(recorded_settings(settings, open_ledger(settings)), settings)


def _of_quantized(settings: StudyFile, quantization: str) -> tuple[list[str], list[str]]:
    """Return the problems and the warnings of settings that need the backbone's weights in full."""
    problems, warnings = [], []
    names = settings.baselines.names
    if FULL in names:
        rest = ", ".join(name for name in names if name != FULL)
        what = f"{FULL} trains all weights of the model, which are frozen in {quantization}"
        if "names" in settings.baselines.model_fields_set:
            problems.append(settings.render(("baselines", "names", names.index(FULL)), f"{what}: set [{rest}]"))
        else:
            warnings.append(settings.render(("baselines", "names"), f"{what}, so it is left out; set [{rest}]"))
    for place, metric in settings.named_metrics:
        if metric.name == MERGED:
            what = f"adapters cannot be merged into weights in {quantization}: take latency_s"
            problems.append(settings.render(place, what))
    return problems, warnings


def baseline_warnings(settings: StudyFile, backbone: Backbone) -> Iterator[str]:
    """Yield warnings on baselines that the model lacks the sites of, and on rules that were not made for it."""
    for i, name in enumerate(settings.baselines.names):
        remark = RULES[name].remark(backbone) if name in RULES else ""
        if name not in (HEAD, FULL) and not ALL_BASELINES[name](backbone):
            remark = "this model lacks the sites of this baseline, so it is left out"
        if remark:
            yield settings.render(("baselines", "names", i), f"{name}: {remark}")


def _check_feasible(settings: StudyFile, problem: Problem) -> None:
    """Raise NoFeasibleCandidateError if no candidate's declared costs meet the limits and the bounds of metrics."""
    bounds = {o.name: o.bound for o in problem.measures if o.is_cost and o.bound is not None}
    if not (bounds or problem.limits.maxima):
        return
    maxima = {**bounds, **problem.limits.maxima}
    limits = Limits({name: min(most, bounds.get(name, most)) for name, most in maxima.items()})
    space, rng = problem.space, Random(settings.seed)
    probes = (space.decode(space.sample(rng)) for _ in range(PROBES))
    rejections = []
    # If the smallest ones are too large, no number of draws would help.
    for candidate in chain(smallest(space), probes):
        if candidate.architecture:
            rejection = limits.rejection(declared_costs(candidate.architecture, space.backbone))
            if rejection is None:
                return
            rejections.append(rejection)
    _, reason = min(rejections, default=(1.0, "none has an adapter"))
    what = f"no candidate meets the constraints; the closest of {PROBES} random candidates: {reason}"
    place = next(section for (section, *_), named in settings.named_metrics if named.name in bounds) if bounds else ""
    raise NoFeasibleCandidateError(settings.render(("constraints" if problem.limits.maxima else place,), what))


def _encoded(
    settings: StudyFile, splits: Splits, model: nn.Module, progress: Callable[[int, int], None] | None
) -> Splits:
    """Return the splits with their encoded rows. Raises DataError, and ModelError for a model without a tokenizer."""
    processor = load_processor(settings.model_id, settings.task, settings.model.revision)
    task = settings.task_class(processor, settings.data.max_length, splits.labels, splits.domains)
    encoded = encode_splits(task, splits, model, progress)
    return replace(splits, encoded=encoded, warnings=(*splits.warnings, *encoded.warnings()))


def _try(metric: Quality, settings: StudyFile, splits: Splits | None) -> None:
    """Compute a user's metric, or a part of it, on partly correct predictions. Raises MetricError."""
    import numpy as np

    if splits is None or not isinstance(metric.whole, Own):
        return  # it reads texts, which encoded rows have
    targets = settings.task_class.truth(splits.validation, splits.labels or ())
    if targets is None:
        return
    names = (TARGET, PREDICTION) if targets.ndim == 1 else (TARGETS, PREDICTIONS)
    columns: dict[str, Any] = {names[0]: targets, names[1]: np.roll(targets, 1, axis=0)}
    if splits.domains is not None:
        columns[DOMAIN] = [row[DOMAIN] for row in splits.validation]
    metric.value(columns)


def _by_domain_problems(settings: StudyFile, splits: Splits | None, own: Mapping[str, UserDefined]) -> Iterator[str]:
    """Yield the problems of metrics over the rows of a domain."""
    if splits is None or splits.domains is None:
        return
    counts = {split: Counter(row[DOMAIN] for row in getattr(splits, split)) for split in SCORED}
    for place, metric in _qualities(settings, own):
        if isinstance(metric, ByDomain):
            found = list(metric.problems(splits.domains, counts))
            try:
                if not found:
                    _try(metric, settings, splits)
            except MetricError as error:
                found.append(f"{metric.name}: {error}")
            yield from (settings.render(place, what) for what in found)


def _qualities(settings: StudyFile, own: Mapping[str, UserDefined]) -> list[tuple[Keys, Quality]]:
    """Return the qualities that the file names, with their places. `own`: the user's metrics with their code."""
    known = settings.metrics_by_name(own)
    return [(place, found) for place, named in settings.named_metrics for found in known.qualities([named.name])]


def _lacking_package(settings: StudyFile) -> str | None:
    """Return the problem of the first metric whose package is not installed, or None."""
    for place, metric in _qualities(settings, {}):
        try:
            check_packages([metric])
        except MissingPackageError as error:
            return settings.render(place, str(error))
    return None


def _request_problems(
    settings: StudyFile, splits: Splits, own: Mapping[str, UserDefined], model: Any
) -> tuple[list[str], list[str]]:
    """Return the problems and the warnings of the requests of lm-eval's tasks. `splits`: with their encoded rows."""
    problems, warnings = [], []
    assert splits.encoded is not None
    for name in splits.documents:
        try:
            (requests,) = requests_of(splits, [own[name]], splits.encoded.task, model)
            warnings += [settings.render(("metrics", name), what) for what in requests.warnings()]
        except DataError as error:
            problems += [settings.render(("metrics", name), problem) for problem in error.problems]
    return problems, warnings


def _texts_problems(settings: StudyFile, splits: Splits, own: Mapping[str, UserDefined], model: Any) -> Iterator[str]:
    """Yield the problems of metrics of texts, which are tried on the references of the neighbouring rows.

    `splits`: with their encoded rows. `own`: the user's metrics with their code. Metrics whose package is missing are
    not tried.
    """
    named = ((place, metric.whole) for place, metric in _qualities(settings, {}))
    metrics: list[tuple[Keys, Quality]] = [*named, *((("metrics", name), metric) for name, metric in own.items())]
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
    running = next((place for place, metric in of_texts if metric.runs_code), None)
    if running is not None and settings.greedy.run_code:
        try:
            yield from (settings.render(running, problem) for problem in tests_problems(splits, programs_of(splits)))
        except DataError as error:
            yield from (settings.render(("data", "tests"), problem) for problem in error.problems)
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
