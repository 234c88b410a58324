"""Unknown names, and settings that do not go together, except for those of metrics."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import urlparse

from autopeft.search_space.backbones.backbone import MOST_LAYERS, ROLES, Backbone, Site
from autopeft.search_space.declaration import SpaceError
from autopeft.search_space.spelling import did_you_mean
from autopeft.studies.config.checks.forgetting import forgetting_problems
from autopeft.studies.config.checks.metrics import metric_problems
from autopeft.studies.config.declaration import ANY_MODEL, declare
from autopeft.studies.config.sections.training import PACKED
from autopeft.studies.config.source import PlacedProblem
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.urls import keeps_nothing, located

#: Genes with these first words have another meaning: "layers.3.on", "training.learning_rate".
_RESERVED = ("layers", "training")
_OUTSIDE_LAYERS = ("embed", "backbone", "head")
_SPLITS = ("train", "validation", "test")
_EMBEDDED = ("embedded", "embedded-domains", "embedded-functions")


def problems_of(study: StudyFile) -> Iterator[PlacedProblem]:
    """Yield every problem that can be found without the model and the data."""
    yield from _evaluator_problems(study)
    yield from _search_problems(study)
    yield from metric_problems(study)
    yield from forgetting_problems(study)
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
    # Only the real model has the number of layers; this one has all that are named, as far as models go.
    named = {layer for choice in study.space.adapters.values() for layer in choice.layers or ()}
    model = _model_with_everything(min(max(12, study.space.stages or 0, *(n + 1 for n in named)), MOST_LAYERS))
    declared = declare(study, model)
    last, adapters = model.num_layers - 1, declared.arguments["adapters"]
    declared.arguments["adapters"] = {
        name: replace(choice, layers=choice.layers and tuple({min(layer, last) for layer in choice.layers}))
        for name, choice in adapters.items()
    }
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
