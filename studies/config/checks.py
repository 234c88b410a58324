"""What is wrong with a study file whatever its model: unknown names, settings that do not fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from autopeft.search_space.backbones.backbone import ROLES, Backbone, Site
from autopeft.search_space.declaration import SpaceError
from autopeft.search_space.metrics import QUALITIES, MetricError, Own, Quality
from autopeft.search_space.problem import METRICS
from autopeft.search_space.spelling import did_you_mean
from autopeft.studies.config.declaration import ANY_MODEL, declare
from autopeft.studies.config.settings import PACKED
from autopeft.studies.config.source import Keys
from autopeft.studies.config.study_file import StudyFile

if TYPE_CHECKING:
    from autopeft.evaluators.tasks import Task

Finding = tuple[Keys, str]
#: Genes of these names mean something else: "layers.3.on", "training.learning_rate".
_RESERVED = ("layers", "training")
_OUTSIDE_LAYERS = ("embed", "backbone", "head")
_SPLITS = ("train", "validation", "test")
_EMBEDDED = ("embedded", "embedded-domains")


def problems_of(study: StudyFile) -> Iterator[Finding]:
    """Every problem that can be seen without the model and the data."""
    yield from _evaluator_problems(study)
    yield from _search_problems(study)
    yield from _objective_problems(study)
    yield from _data_problems(study)
    yield from _name_problems(study)
    yield from _space_problems(study)


def unknown_key(name: str, known: Iterable[str]) -> str:
    """Return the text for a key that a section does not have."""
    return f"unknown key{did_you_mean(name, known)}"


def _evaluator_problems(study: StudyFile) -> Iterator[Finding]:
    name = study.evaluation.evaluator
    if name == PACKED:
        return  # torch, which the registry imports, is needed for the others alone
    from autopeft.evaluators.training.registry import EVALUATORS

    if name not in EVALUATORS:
        yield ("evaluation", "evaluator"), f"unknown evaluator {name!r}{did_you_mean(name, EVALUATORS)}"


def _packs(study: StudyFile) -> bool:
    """Whether the evaluator trains candidates side by side; True for an unknown one, which has its own message."""
    name = study.evaluation.evaluator
    if name == PACKED:
        return True
    from autopeft.evaluators.training.packed import PackedEvaluator
    from autopeft.evaluators.training.registry import EVALUATORS

    return name not in EVALUATORS or issubclass(EVALUATORS[name], PackedEvaluator)


def _search_problems(study: StudyFile) -> Iterator[Finding]:
    # Imported here, like everything that is slow to import: `autopeft --help` must not wait for it.
    from autopeft.search_space.spaces.presets import BASELINES
    from autopeft.searchers import SEARCHERS

    searcher, rungs = study.search.searcher, list(study.search.rungs)
    if searcher not in SEARCHERS:
        yield ("search", "searcher"), f"unknown searcher {searcher!r}{did_you_mean(searcher, SEARCHERS)}"
    if rungs != sorted(set(rungs)):
        yield ("search", "rungs"), "must ascend"
    elif study.search.keep < 1.0 and not _packs(study):
        yield ("search", "keep"), "needs the evaluator packed: the others do not train candidates side by side"
    elif study.search.keep < 1.0 and not rungs:
        yield ("search", "keep"), "needs search.rungs: the shares of the steps at which candidates are compared"
    elif rungs and rungs[-1] >= study.search.share:
        yield ("search", "rungs"), f"must lie below search.share, which is {study.search.share}"
    if study.search.initial is not None and study.search.initial > study.search.trials:
        yield ("search", "initial"), f"must not be above search.trials, which is {study.search.trials}"
    if len(study.search.start) > study.search.trials:
        yield ("search", "start"), f"has more entries than search.trials, which is {study.search.trials}"
    for i, entry in enumerate(study.search.start):
        if isinstance(entry, str) and entry not in BASELINES:
            yield ("search", "start", i), f"unknown baseline {entry!r}{did_you_mean(entry, BASELINES)}"
    yield from _proxy_problems(study)
    for i, name in enumerate(study.baselines.names):
        if name not in BASELINES:
            yield ("baselines", "names", i), f"unknown baseline {name!r}{did_you_mean(name, BASELINES)}"


def _proxy_problems(study: StudyFile) -> Iterator[Finding]:
    from autopeft.searchers import SEARCHERS, FromScores
    from autopeft.searchers.scored.policies import POLICIES
    from autopeft.searchers.scored.proxied import Proxied

    wish, searcher = study.proxy, study.search.searcher
    known = [name for name, kind in SEARCHERS.items() if not issubclass(kind, FromScores)]
    if wish.search not in known:
        yield ("proxy", "search"), f"unknown searcher {wish.search!r}{did_you_mean(wish.search, known)}"
    if wish.policy not in POLICIES:
        yield ("proxy", "policy"), f"unknown policy {wish.policy!r}{did_you_mean(wish.policy, POLICIES)}"
    elif wish.distil and not POLICIES[wish.policy].has_teacher:
        able = " or ".join(name for name, policy in POLICIES.items() if policy.has_teacher)
        yield ("proxy", "distil"), f"needs the largest subnet at every step: set proxy.policy to {able}"
    elif wish.filter is not None and not POLICIES[wish.policy].draws:
        yield ("proxy", "filter"), f"the policy {wish.policy} draws nothing that could be filtered"
    if wish.distil and not study.task_class.distils:
        yield ("proxy", "distil"), "works for classification alone, with one label per row"
    if searcher in SEARCHERS and searcher not in known and not _packs(study):
        yield ("search", "searcher"), f"{searcher} needs the evaluator packed: it runs candidates side by side"
    if searcher == Proxied.name:
        from autopeft.evaluators.proxies import PROXIES, TRAINED

        if wish.score not in (known := [*TRAINED, *PROXIES]):
            yield ("proxy", "score"), f"unknown score {wish.score!r}{did_you_mean(wish.score, known)}"
        if wish.filter is not None and wish.filter not in PROXIES:
            yield ("proxy", "filter"), f"unknown proxy {wish.filter!r}{did_you_mean(wish.filter, PROXIES)}"


def _objective_problems(study: StudyFile) -> Iterator[Finding]:
    own, task = study.metrics or {}, study.task_class
    names = [objective.name for objective in study.objectives]
    for i, objective in enumerate(study.objectives):
        name = objective.name
        if name not in METRICS and name not in own:
            yield ("objectives", i), f"unknown metric {name!r}{did_you_mean(name, (*METRICS, *own))}"
        elif name in names[:i]:
            yield ("objectives", i), f"{name!r} stands twice"
        elif name in QUALITIES:
            metric = QUALITIES[name]
            if not metric.computable(task.columns):
                yield ("objectives", i), f"{name} {_needs(metric, task)}"
            wish, best = objective.bound, metric.bound
            if wish is not None and best is not None and (wish > best if metric.maximise else wish < best):
                yield ("objectives", i, "bound"), f"no candidate can meet it: the best {name} is {best:g}"
    if all(name in METRICS and name not in QUALITIES for name in names):
        quality = " or ".join(_computable(task))
        yield ("objectives",), f"one must be {quality}: by cost alone, no adapter at all is the best"
    for name, place in own.items():
        if name in METRICS:
            yield ("metrics", name), f"{name!r} is a metric already: take another name"
        try:
            metric = Own.declared(name, place)
        except MetricError as error:
            yield ("metrics", name), str(error)
            continue
        if not metric.computable(task.columns):
            what = f"metrics of your own are for {' or '.join(_able(metric))}: they are of targets and predictions"
            yield ("metrics", name), what


def _able(metric: Quality) -> list[str]:
    """The tasks for which a metric can be computed."""
    from autopeft.evaluators.tasks import TASKS

    return [name for name, task in TASKS.items() if metric.computable(task.columns)]


def _computable(task: type[Task]) -> list[str]:
    """The metrics of quality that can be computed for a task."""
    return [name for name, metric in QUALITIES.items() if metric.computable(task.columns)]


def _needs(metric: Quality, task: type[Task]) -> str:
    """Why a metric cannot be computed for a task, or for a variant of it."""
    able = _able(metric)
    if not able:
        return "cannot be computed: no task has the columns that it needs"
    if task.name not in able:
        return f"needs the task {' or '.join(able)}"
    return f"cannot be computed of these data ({task.problem_type}): there are {', '.join(_computable(task))}"


def _data_problems(study: StudyFile) -> Iterator[Finding]:
    for split in _SPLITS:
        name = getattr(study.data, split)
        if study.data.source == "files" and name is None:
            yield ("data", split), "is missing: name a file"
        if study.data.source in _EMBEDDED and name is not None:
            yield ("data", split), "the embedded data has its own; for yours, set data.source to files"
    yield from study.task_class.problems(study.data_settings(), study.model.id)


def _name_problems(study: StudyFile) -> Iterator[Finding]:
    """Names become the beginnings of genes, so they must not meet."""
    space = study.space
    for section in ("adapters", "one_of"):
        for name in getattr(space, section):
            if name in _RESERVED:
                yield ("space", section, name), f"{name!r} has a meaning of its own here: take another name"
    for name in space.one_of.keys() & space.adapters.keys():
        yield ("space", "one_of", name), "an adapter has this name too"
    group_of: dict[str, str] = {}
    for name, group in space.one_of.items():
        for i, member in enumerate(group.members):
            if member in group_of:
                what = f"{member!r} is a member of {group_of[member]!r} already"
                yield ("space", "one_of", name, "members", i), what
            group_of[member] = name


def _space_problems(study: StudyFile) -> Iterator[Finding]:
    """The space, tried on a model that has every site."""
    model = _model_with_everything(max(12, study.space.stages or 0))
    declared = declare(study, model)
    # Which layers there are is for the real model to say.
    adapters = declared.arguments["adapters"]
    declared.arguments["adapters"] = {name: replace(choice, layers=None) for name, choice in adapters.items()}
    try:
        space = declared.space(model)
    except SpaceError as error:
        yield from error.problems
        return
    if not space.genes:
        yield ("space",), "nothing to search: every field has one value"


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
