"""Checks of a study file that need no model: unknown names and settings that do not go together."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from autopeft.search_space.backbones.backbone import ROLES, Backbone, Site
from autopeft.search_space.declaration import SpaceError
from autopeft.search_space.metrics import QUALITIES, Metric, MetricError, OfTexts, Quality, RegexMatch, user_defined
from autopeft.search_space.metrics.programs import PassAt1
from autopeft.search_space.problem import METRICS
from autopeft.search_space.spelling import did_you_mean
from autopeft.studies.config.declaration import ANY_MODEL, declare
from autopeft.studies.config.sections.search import ObjectiveSettings
from autopeft.studies.config.sections.training import PACKED
from autopeft.studies.config.source import PlacedProblem
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.urls import keeps_nothing, located

if TYPE_CHECKING:
    from autopeft.evaluators.tasks import Task

#: Genes with these first words have another meaning: "layers.3.on", "training.learning_rate".
_RESERVED = ("layers", "training")
_OUTSIDE_LAYERS = ("embed", "backbone", "head")
_SPLITS = ("train", "validation", "test")
_EMBEDDED = ("embedded", "embedded-domains", "embedded-functions")


def problems_of(study: StudyFile) -> Iterator[PlacedProblem]:
    """Yield every problem that can be found without the model and the data."""
    yield from _evaluator_problems(study)
    yield from _search_problems(study)
    yield from _objective_problems(study)
    yield from _generation_problems(study)
    yield from _data_problems(study)
    yield from _name_problems(study)
    yield from _space_problems(study)
    yield from _place_problems(study)


def unknown_key(name: str, known: Iterable[str]) -> str:
    """Return the message for a key that a section does not have."""
    return f"unknown key{did_you_mean(name, known)}"


#: Characters that URLs of databases, or the libraries that read them, take for something else than part of a path.
_NO_PART_OF_A_PATH = "?%{}"
_LONGEST_EXPERIMENT = 500
_TRACKING_SCHEMES = (
    "http", "https", "file", "sqlite", "postgresql", "mysql", "mssql", "databricks", "databricks-uc", "uc",
)  # fmt: skip


def _place_problems(study: StudyFile) -> Iterator[PlacedProblem]:
    """Yield the problems of where results are kept."""
    uri = study.tracking.uri if study.tracking.enabled else None
    for path, url, default in (
        (("storage",), study.storage, study.storage is None),
        (("tracking", "uri"), uri, study.tracking.enabled and study.tracking.uri is None),
    ):
        relative = url is not None and located(url, Path("/a")) != located(url, Path("/b"))
        folder = study.output_folder if default else study.folder if relative else Path("/")
        found = dict.fromkeys(c for c in str(folder) if c in _NO_PART_OF_A_PATH)
        if found:
            what = f"no database can be opened in {folder}, because of {' '.join(found)} in its name"
            yield (("output",), f"{what}: set another folder") if default else (path, f"{what}: give an absolute path")
        if url is not None and keeps_nothing(url):
            yield path, "a database in memory keeps nothing: name a file, such as sqlite:///results.db"
    if study.storage is not None:
        from sqlalchemy import make_url
        from sqlalchemy.exc import ArgumentError

        try:
            make_url(study.storage)
        except (ArgumentError, ValueError):
            yield ("storage",), "is not the URL of a database, such as sqlite:///ledger.db"
    if uri is not None and (said := _unknown_store(uri)):
        yield ("tracking", "uri"), said
    experiment = study.tracking.experiment or study.study
    if study.tracking.enabled and len(experiment) > _LONGEST_EXPERIMENT:
        where = ("tracking", "experiment") if study.tracking.experiment else ("study",)
        yield where, f"MLflow takes names of at most {_LONGEST_EXPERIMENT} characters, this has {len(experiment)}"


def _unknown_store(uri: str) -> str | None:
    """Return what is wrong with a URI that MLflow has no store for, not even in another package."""
    scheme = urlparse(uri).scheme.split("+")[0]
    known = {*_TRACKING_SCHEMES, *(entry.name for entry in entry_points(group="mlflow.tracking_store"))}
    if len(scheme) < 2 or scheme in known:  # a letter is a drive
        return None
    is_address = re.fullmatch(r"[^/:]+:\d+(/.*)?", uri) is not None
    hint = f"; a server is http://{uri}" if is_address else did_you_mean(scheme, known)
    return f"MLflow has no store for {scheme!r}{hint}"


def _evaluator_problems(study: StudyFile) -> Iterator[PlacedProblem]:
    name = study.evaluation.evaluator
    if name == PACKED:
        return  # the registry imports torch, so look up only other names
    from autopeft.evaluators.training.registry import EVALUATORS

    if name not in EVALUATORS:
        yield ("evaluation", "evaluator"), f"unknown evaluator {name!r}{did_you_mean(name, EVALUATORS)}"


def _packs(study: StudyFile) -> bool:
    """Return whether the evaluator trains candidates in packs; True for an unknown one, which has its own message."""
    name = study.evaluation.evaluator
    if name == PACKED:
        return True
    from autopeft.evaluators.training.packed import PackedEvaluator
    from autopeft.evaluators.training.registry import EVALUATORS

    return name not in EVALUATORS or issubclass(EVALUATORS[name], PackedEvaluator)


def _search_problems(study: StudyFile) -> Iterator[PlacedProblem]:
    # Slow imports are local, so that `autopeft --help` does not wait for them.
    from autopeft.search_space.spaces.rules import ALL_BASELINES
    from autopeft.searchers import SEARCHERS

    searcher, rungs = study.search.searcher, list(study.search.rungs)
    if searcher not in SEARCHERS:
        yield ("search", "searcher"), f"unknown searcher {searcher!r}{did_you_mean(searcher, SEARCHERS)}"
    if rungs != sorted(set(rungs)):
        yield ("search", "rungs"), "must be in ascending order, without repetitions"
    elif study.search.keep != 1.0 and not _packs(study):
        yield ("search", "keep"), "needs evaluation.evaluator: packed, which trains the candidates of a batch together"
    elif study.search.keep != 1.0 and not rungs:
        yield ("search", "keep"), "needs search.rungs, the shares of the steps at which candidates are compared"
    elif rungs and rungs[-1] >= study.search.share:
        yield ("search", "rungs"), f"must be below search.share, which is {study.search.share}"
    for setting in ("goal", "keep"):
        if getattr(study.search, setting) in ("cheapest_as_good", "auto") and not study.has_quality_and_cost:
            yield ("search", setting), "needs a quality and a cost to minimise among the objectives"
    # Without a number of its own, a study with `minutes` has as many trials as these need.
    trials = study.search.trials if study.decides_trials else math.inf
    if study.search.initial is not None and study.search.initial > trials:
        yield ("search", "initial"), f"must not be above search.trials, which is {study.search.trials}"
    if len(study.search.start) > trials:
        yield ("search", "start"), f"has more entries than search.trials, which is {study.search.trials}"
    for i, entry in enumerate(study.search.start):
        if isinstance(entry, str) and entry not in ALL_BASELINES:
            yield ("search", "start", i), f"unknown baseline {entry!r}{did_you_mean(entry, ALL_BASELINES)}"
    yield from _proxy_problems(study)
    for i, name in enumerate(study.baselines.names):
        if name not in ALL_BASELINES:
            yield ("baselines", "names", i), f"unknown baseline {name!r}{did_you_mean(name, ALL_BASELINES)}"


def _proxy_problems(study: StudyFile) -> Iterator[PlacedProblem]:
    from autopeft.searchers import SEARCHERS, FromScores
    from autopeft.searchers.scored.policies import POLICIES
    from autopeft.searchers.scored.proxied import Proxied
    from autopeft.searchers.scored.shrunk import Shrunk

    proxy, searcher = study.proxy, study.search.searcher
    plain = [name for name, kind in SEARCHERS.items() if not issubclass(kind, FromScores)]
    if proxy.search not in plain:
        yield ("proxy", "search"), f"unknown searcher {proxy.search!r}{did_you_mean(proxy.search, plain)}"
    if proxy.policy not in POLICIES:
        yield ("proxy", "policy"), f"unknown policy {proxy.policy!r}{did_you_mean(proxy.policy, POLICIES)}"
    elif proxy.distil and not POLICIES[proxy.policy].has_teacher:
        able = " or ".join(name for name, policy in POLICIES.items() if policy.has_teacher)
        yield ("proxy", "distil"), f"needs the largest subnet in every step: set proxy.policy to {able}"
    elif proxy.filter is not None and not POLICIES[proxy.policy].draws:
        yield ("proxy", "filter"), f"has no effect: proxy.policy {proxy.policy} draws no random subnets to filter"
    if proxy.distil and not study.task_class.distils:
        yield ("proxy", "distil"), "can be set only for classification with one label per row"
    if searcher in SEARCHERS and searcher not in plain and not _packs(study):
        yield ("search", "searcher"), f"{searcher} needs evaluation.evaluator: packed"
    if searcher in (Proxied.name, Shrunk.name):
        from autopeft.evaluators.proxies import PROXIES, TRAINED

        if proxy.score not in (scores := [*TRAINED, *PROXIES]):
            yield ("proxy", "score"), f"unknown score {proxy.score!r}{did_you_mean(proxy.score, scores)}"
        if proxy.filter is not None and proxy.filter not in PROXIES:
            yield ("proxy", "filter"), f"unknown proxy {proxy.filter!r}{did_you_mean(proxy.filter, PROXIES)}"


def _objective_problems(study: StudyFile) -> Iterator[PlacedProblem]:
    own, task = study.metrics or {}, study.task_class
    names = [objective.name for objective in study.objectives]
    for i, objective in enumerate(study.objectives):
        name = objective.name
        if name not in METRICS and name not in own:
            yield ("objectives", i), f"unknown metric {name!r}{did_you_mean(name, (*METRICS, *own))}"
        elif name in names[:i]:
            yield ("objectives", i), f"{name!r} occurs twice"
        elif name in QUALITIES:
            metric = QUALITIES[name]
            if not metric.computable(task.readable()):
                yield ("objectives", i), f"{name} {_needs(metric, task)}"
            if (objective.direction or _direction(metric)) != _direction(metric):
                yield (
                    ("objectives", i, "direction"),
                    f"a better {name} is {'larger' if metric.maximise else 'smaller'}: leave the direction out",
                )
        if name in METRICS:
            yield from _beyond(i, objective, METRICS[name])
    first = next((QUALITIES[name] for name in names if name in QUALITIES), None)
    within = study.recommend.within
    if within and first and first.bound is not None and first.worst is not None:
        low, high = sorted((first.bound, first.worst))
        if within >= high - low:
            what = f"counts every loss of {first.name} as none, from {low:g} to {high:g}: give a smaller margin"
            yield ("recommend", "within"), what
    if all(name in METRICS and name not in QUALITIES for name in names):
        quality = " or ".join(_computable(task))
        yield ("objectives",), f"must contain {quality}: if all objectives are costs, the best candidate has no adapter"
    for name, place in own.items():
        if name in METRICS:
            yield ("metrics", name), f"{name!r} is already a metric: choose another name"
        try:
            metric = user_defined(name, place, True, task.generates)
        except MetricError as error:
            yield ("metrics", name), str(error)
            continue
        if not metric.computable(task.readable()):
            what = f"your own metrics need targets and predictions, which only {' or '.join(_able(metric))} has"
            yield ("metrics", name), what


def _generation_problems(study: StudyFile) -> Iterator[PlacedProblem]:
    """Yield the problems of `generation`: settings without a metric that reads them, and a wrong pattern."""
    settings = study.generation
    named = [QUALITIES[o.name] for o in study.objectives if o.name in QUALITIES]
    of_texts = [metric.name for metric in named if isinstance(metric, OfTexts)]
    matching = RegexMatch().name
    if settings is not None and not of_texts and not (study.metrics and study.task_class.generates):
        known = ", ".join(name for name, metric in QUALITIES.items() if isinstance(metric, OfTexts))
        yield ("generation",), f"has no effect without a metric of texts among the objectives: {known}, or your own"
    running = next((metric.name for metric in named if isinstance(metric, OfTexts) and metric.runs_code), None)
    yield from _program_problems(study, running)
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


def _program_problems(study: StudyFile, running: str | None) -> Iterator[PlacedProblem]:
    """Yield the problems of programs with tests, which the metric `running` runs."""
    from autopeft.evaluators.texts import CONSENT

    name = PassAt1().name
    if running and not study.greedy.run_code:
        yield ("generation",), f"{running} runs generated programs on this machine: {CONSENT}"
    if running and study.data.tests is None:
        yield ("data", "tests"), f"{running} needs the column of the Python code that tests a program"
    if not running and study.data.tests is not None:
        yield ("data", "tests"), f"has no effect without the objective {name}"
    if not running and study.greedy.run_code:
        yield ("generation", "run_code"), f"has no effect without the objective {name}"


def _direction(metric: Metric) -> str:
    return "maximise" if metric.maximise else "minimise"


def _beyond(i: int, objective: ObjectiveSettings, metric: Metric) -> Iterator[PlacedProblem]:
    """Yield values of an objective that are better than the best possible value of its metric."""
    best, sign = metric.bound, 1 if metric.maximise else -1
    if best is None or (objective.direction or _direction(metric)) != _direction(metric):
        return
    bound, reference = objective.bound, objective.reference
    if bound is not None and sign * (bound - best) > 0:
        what = f"no candidate can reach {bound:g}: the best possible {metric.name} is {best:g}"
        yield ("objectives", i, "bound"), what
    if reference is not None and sign * (reference - best) >= 0:
        what = f"no candidate can be better than {reference:g}: the best possible {metric.name} is {best:g}"
        yield ("objectives", i, "reference"), what


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


def _data_problems(study: StudyFile) -> Iterator[PlacedProblem]:
    for split in _SPLITS:
        name = getattr(study.data, split)
        if study.data.source == "files" and name is None:
            yield ("data", split), "is missing: set it to a file (.jsonl, .json, .csv or .parquet)"
        if study.data.source in _EMBEDDED and name is not None:
            yield (
                ("data", split),
                "cannot be set: the embedded data has this split; to use your files, set data.source to files",
            )
    if not study.task_class.has_turns:
        for setting in ("messages", "system", "train_on_turns"):
            if setting in study.data.model_fields_set:
                yield ("data", setting), "can be set only for causal-lm, whose rows may be conversations"
    yield from study.task_class.problems(study.data_settings(), study.model.id)


def _name_problems(study: StudyFile) -> Iterator[PlacedProblem]:
    """Yield conflicts between names, which become the first words of genes."""
    space = study.space
    for section in ("adapters", "one_of"):
        for name in getattr(space, section):
            if name in _RESERVED:
                yield ("space", section, name), f"{name!r} is a reserved name: choose another name"
    for name in space.one_of.keys() & space.adapters.keys():
        yield ("space", "one_of", name), "an adapter also has this name: rename one of them"
    group_of: dict[str, str] = {}
    for name, group in space.one_of.items():
        for i, member in enumerate(group.members):
            if member in group_of:
                what = f"{member!r} is already a member of {group_of[member]!r}"
                yield ("space", "one_of", name, "members", i), what
            group_of[member] = name


def _space_problems(study: StudyFile) -> Iterator[PlacedProblem]:
    """Yield problems of the space, which is built over a model that has every kind of site."""
    model = _model_with_everything(max(12, study.space.stages or 0))
    declared = declare(study, model)
    # Only the real model has the number of layers.
    adapters = declared.arguments["adapters"]
    declared.arguments["adapters"] = {name: replace(choice, layers=None) for name, choice in adapters.items()}
    try:
        space = declared.space(model)
    except SpaceError as error:
        yield from error.problems
        return
    if not space.genes:
        yield ("space",), "nothing to search: every field has a single value; give one a list or a range"


def _model_with_everything(num_layers: int) -> Backbone:
    def site(role: str, layer: int | None) -> Site:
        name = role if layer is None else f"layers.{layer}.{role}"
        return Site(
            name=name,
            layer=layer,
            role=role,
            module=name,
            input_module=name,
            in_features=768,
            out_features=768,
            bias=True,
            attention_module=name,
            num_key_value_heads=12,
            head_dim=64,
            hidden_size=768,
        )

    inside = [role for role in ROLES if role not in _OUTSIDE_LAYERS]
    return Backbone(
        id=ANY_MODEL,
        revision=None,
        family="any",
        sites=(
            *(site(role, None) for role in _OUTSIDE_LAYERS),
            *(site(role, layer) for layer in range(num_layers) for role in inside),
        ),
        hidden_size=768,
        num_layers=num_layers,
        num_params=1,
        head_modules=(),
        num_head_params=0,
        causal=False,
    )
