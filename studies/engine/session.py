"""Sessions: from a study file to folder, lock, model, ledger and tracking."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from autopeft.search_space.spaces.location import locate
from autopeft.studies.analysis.outlook import Outlook
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.config.earlier import with_first_meanings, with_turns_of
from autopeft.studies.config.fingerprint import fingerprint
from autopeft.studies.config.loading import load_study, study_from_mapping
from autopeft.studies.config.problem import problem_for
from autopeft.studies.config.source import StudyFileError
from autopeft.studies.config.study_file import LEDGER, StudyFile
from autopeft.studies.engine.plan import plan_of
from autopeft.studies.errors import ConfigurationError, UnusableEnvironmentError, file_errors
from autopeft.studies.storage.database import GO_ON
from autopeft.studies.storage.ledger import Ledger, StudyRecord
from autopeft.studies.storage.locks import check_owner, claim, is_held, lock_paths, locked
from autopeft.studies.versions import newer

if TYPE_CHECKING:
    from autopeft.evaluators.data.splits import Splits
    from autopeft.evaluators.training.base import TrainingEvaluator
    from autopeft.evaluators.training.packed import PackedEvaluator
    from autopeft.search_space.backbones.backbone import Backbone
    from autopeft.search_space.problem import Problem, Trial
    from autopeft.searchers import Searcher
    from autopeft.studies.engine.study_loop import ScoreFunction, StudyLoop

LEAST_FREE_BYTES = 50_000_000
PRIOR = ("search", "prior")


def torch_device(requested: str) -> str:
    """Return "cpu" or "cuda". Raises UnusableEnvironmentError if a GPU is requested and there is none."""
    import torch

    if requested not in ("auto", "cpu", "cuda"):
        raise ConfigurationError(f"device {requested!r}: use auto, cpu or cuda")
    if requested == "cuda" and not torch.cuda.is_available():
        raise UnusableEnvironmentError("device: cuda was requested, but torch finds no GPU on this machine")
    return "cuda" if requested != "cpu" and torch.cuda.is_available() else "cpu"


@contextmanager
def inputs_checked() -> Iterator[None]:
    """Turn errors of models, data and metrics into a ConfigurationError, or UnusableEnvironmentError for a package."""
    from autopeft.evaluators.errors import DataError, MissingPackageError, ModelError
    from autopeft.search_space.backbones.introspection import UnknownBackboneError
    from autopeft.search_space.metrics import MetricError

    try:
        yield
    except MissingPackageError as error:
        raise UnusableEnvironmentError(str(error)) from error
    except (ModelError, DataError, UnknownBackboneError, MetricError) as error:
        raise ConfigurationError(str(error)) from error


def evaluator_for(settings: StudyFile, splits: Splits, backbone: Backbone | None = None) -> TrainingEvaluator:
    """Build the study's evaluator over its model and data, on its device. Raises ConfigurationError.

    `backbone`: the description in the study's ledger, which decides what its trials train.
    """
    from autopeft.evaluators.backbones import load_backbone
    from autopeft.evaluators.training.base import EvaluatorOptions
    from autopeft.evaluators.training.registry import EVALUATORS

    wanted = settings.evaluation
    options = EvaluatorOptions(
        pack=wanted.pack,
        cache_bytes=wanted.cache_bytes,
        cache_folder=None if wanted.cache_folder is None else settings.folder / wanted.cache_folder,
        cache_folder_bytes=wanted.cache_folder_bytes,
        micro_batch=wanted.micro_batch,
        checkpointing=wanted.checkpointing,
        generation=settings.greedy.for_evaluators(),
    )
    with inputs_checked():
        metrics = settings.qualities()
        loaded = load_backbone(
            settings.model_id,
            task=settings.task,
            labels=splits.labels,
            revision=settings.model.revision,
            dtype=settings.model.dtype,
            modules=settings.model.modules,
            backbone=backbone,
            device=torch_device(settings.device),
            quantization=settings.model.quantization,
        )
        return EVALUATORS[wanted.evaluator].of(
            loaded, settings.task, splits, settings.data.max_length, metrics, options
        )


def packed_evaluator_for(settings: StudyFile, splits: Splits) -> PackedEvaluator:
    """Like `evaluator_for`, but requires the packed evaluator. Raises ConfigurationError."""
    from autopeft.evaluators.training.packed import PackedEvaluator

    evaluator = evaluator_for(settings, splits)
    if not isinstance(evaluator, PackedEvaluator):
        raise ConfigurationError(
            f"evaluation.evaluator: must be packed for this command, got {settings.evaluation.evaluator}"
        )
    return evaluator


def searcher_for(settings: StudyFile, evaluator: TrainingEvaluator) -> tuple[type[Searcher], ScoreFunction | None]:
    """Return the study's searcher, and the function that scores candidates if the searcher needs scores."""
    from autopeft.searchers import SEARCHERS, FromScores

    searcher = SEARCHERS[settings.search.searcher]
    if not issubclass(searcher, FromScores):
        return searcher, None
    from autopeft.evaluators.training.packed import PackedEvaluator
    from autopeft.studies.engine.proxy_scores import score_candidates

    assert isinstance(evaluator, PackedEvaluator)  # `checks.py` ensures it
    places = problem_for(settings, evaluator.backbone).space.placements
    apart = dict.fromkeys(place.site.role for place in places if place.site.name in evaluator.unpackable)
    if apart:
        raise ConfigurationError(
            f"search.searcher: {settings.search.searcher} trains candidates side by side, which this model does not"
            f" permit with adapters at {', '.join(apart)}: leave these roles out of `at`, or take another"
            " searcher, such as bo"
        )
    return searcher, lambda problem, stage: score_candidates(settings, problem, evaluator, stage)


@contextmanager
def open_study(settings: StudyFile, splits: Splits, *, resume: bool) -> Iterator[StudyLoop]:
    """Open a study and lock it against a second process.

    Raises ConfigurationError if it exists (or does not, with `resume`), has changed, is running or can never be
    tracked, and UnusableEnvironmentError if the folder cannot be written or the ledger cannot be read.
    """
    from autopeft.studies.engine.study_loop import StudyLoop
    from autopeft.studies.engine.time_budget import pace_of, within_minutes

    _check_folder(settings, resume)
    with locked(settings.output_folder, settings.storage_url, settings.study):
        if resume:
            settings = as_started(settings)
        ledger = Ledger.open(settings.storage_url, settings.study, fingerprint(settings)) if resume else None
        if ledger is None:
            _check_new(settings)
        check_owner(settings.output_folder, None if ledger is None else ledger.study_id)
        contents = _contents(settings, splits)
        if ledger is not None:
            ledger.check_contents(contents)  # before the model is loaded, which may not fit the ledger's description
        tracker = None
        if settings.tracking.enabled:
            from autopeft.studies.tracking.mlflow_sync import Tracker

            experiment = settings.tracking.experiment or settings.study
            tracker = Tracker(settings.tracking_uri, experiment, settings.output_folder)
            tracker.begin()
        evaluator = evaluator_for(settings, splits, None if ledger is None else ledger.backbone)
        contents |= evaluator.contents()
        if ledger is not None:
            ledger.check_contents(contents)  # before anything is trained
        pace = pace_of(settings, evaluator, ledger)
        if ledger is None:
            settings = within_minutes(settings, evaluator, pace)
        problem = problem_for(settings, evaluator.backbone)
        contents |= _given(problem)
        if ledger is None:
            ledger = _new_ledger(settings, problem, splits, evaluator, contents)
        else:
            ledger.keep_contents(contents)
        with file_errors(GO_ON):
            claim(settings.output_folder, ledger.study_id)
        problem = replace(problem, prior=ledger.prior_trials)  # a resumed study has the same prior
        searcher, scores = searcher_for(settings, evaluator)
        yield StudyLoop(problem, evaluator, searcher, ledger, tracker, plan_of(settings), scores, pace)


def _check_new(settings: StudyFile) -> None:
    """Raise ConfigurationError if the output folder has a study; this check comes before slow imports."""
    others = Ledger.names(settings.storage_url)
    if settings.study in others:
        raise ConfigurationError(
            f"{settings.output_folder} already holds the study {settings.study!r}: `autopeft resume` continues it"
        )
    if others and settings.storage is None:
        raise ConfigurationError(
            f"{settings.output_folder} holds another study, {others[0]!r}: set output to another folder"
        )


def _contents(settings: StudyFile, splits: Splits) -> dict[str, Any]:
    """Return what is known of the study's contents before its model is loaded; see `changes`."""
    from autopeft.evaluators import contents
    from autopeft.evaluators.backbones import raw_config

    with inputs_checked():
        config = raw_config(settings.model_id, settings.model.revision)
    return {
        "rows": contents.of_rows(splits),
        "labels": splits.labels and list(splits.labels),
        "domains": splits.domains and list(splits.domains),
        "device": torch_device(settings.device),
        "config": config,
    }


def _given(problem: Problem) -> dict[str, Any]:
    from autopeft.evaluators import contents
    from autopeft.search_space.adapters.given import CONFIG, WEIGHTS

    folders = [folder for choice in problem.space.adapters.values() for folder in choice.given]
    return {"given": contents.of_folders(folders, (CONFIG, WEIGHTS))} if folders else {}


def _new_ledger(
    settings: StudyFile, problem: Problem, splits: Splits, evaluator: TrainingEvaluator, contents: Mapping[str, Any]
) -> Ledger:
    from autopeft.evaluators.attachment.heads import head_sites
    from autopeft.evaluators.tasks.constant import constant_scores

    text = io.StringIO()
    # Without the URIs: they are places, which may change, and may hold passwords, which reports would publish.
    dump = settings.model_dump(mode="json", exclude_none=True, exclude={"storage": True, "tracking": {"uri": True}})
    YAML().dump(dump, text)
    record = StudyRecord(
        objectives=problem.objectives,
        backbone=problem.space.backbone,
        labels=splits.labels,
        domains=splits.domains,
        settings=text.getvalue(),
        fingerprint=fingerprint(settings),
        prior_trials=prior_trials(settings, problem),
        constant=constant_scores(
            settings.task_class, splits.train, splits.validation, splits.labels or (), evaluator.metrics
        ),
        contents=contents,
        head_sites=head_sites(evaluator.model, evaluator.backbone),
    )
    return Ledger.create(settings.storage_url, settings.study, record)


def _check_folder(settings: StudyFile, resume: bool) -> None:
    folder = settings.output_folder
    if resume and not was_started(settings):
        raise ConfigurationError(f"{folder}: has no study {settings.study!r} to resume{_others(settings)}")
    check_disk(folder)


def check_disk(folder: Path) -> None:
    """Make the folder. Raises UnusableEnvironmentError if it cannot be written or its disk is almost full."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            probe.write(b"x" * 4096)
            probe.flush()
        status = os.statvfs(folder)
    except OSError as error:
        raise UnusableEnvironmentError(f"{folder}: cannot be written: {error.strerror}") from error
    free = status.f_bavail * status.f_frsize
    if free < LEAST_FREE_BYTES:
        raise UnusableEnvironmentError(
            f"{folder}: only {free / 1e6:.0f} MB are free on this disk; it takes {LEAST_FREE_BYTES / 1e6:.0f} MB"
        )


def _has_storage(settings: StudyFile) -> bool:
    """Return whether there may be a ledger: to ask a database file that is not there would make it."""
    return settings.storage is not None or (settings.output_folder / LEDGER).is_file()


def _others(settings: StudyFile) -> str:
    names = Ledger.names(settings.storage_url) if _has_storage(settings) else []
    return f" (it holds {', '.join(map(repr, names))})" if names else "; `autopeft run` starts one"


def was_started(settings: StudyFile) -> bool:
    """Return whether this study has a ledger. Raises UnusableEnvironmentError if it cannot be read."""
    return _has_storage(settings) and settings.study in Ledger.names(settings.storage_url)


def is_running(settings: StudyFile) -> bool:
    """Return whether a process holds a lock of the study; True where the file system cannot tell. Writes nothing."""
    return any(map(is_held, lock_paths(settings.output_folder, settings.storage_url, settings.study)))


def open_ledger(settings: StudyFile) -> Ledger:
    """Open the ledger for reading, also while the study runs. Raises ConfigurationError if it was never started."""
    if not _has_storage(settings):
        raise ConfigurationError(f"{settings.output_folder}: this study was never started; `autopeft run` starts it")
    return Ledger.open(settings.storage_url, settings.study)


def recorded_settings(settings: StudyFile, ledger: Ledger) -> StudyFile:
    """Return the settings with which the study was started; the file may have changed since.

    Where results are, and the section `recommend`, are those of the file: no trial depends on them.
    """
    recorded = YAML(typ="safe").load(ledger.settings)
    present = settings.model_dump(mode="json", include={"output", "storage", "tracking", "recommend"})
    try:
        return study_from_mapping({**with_first_meanings(recorded), **present}, settings.folder)
    except StudyFileError as error:
        if "unknown key" not in str(error):
            raise
        raise ConfigurationError(newer(f"the settings in the ledger: {error}")) from error


def as_started(settings: StudyFile) -> StudyFile:
    """Return settings with what `minutes` decided when the study was started, where the file does not set it.

    A larger number of trials than then is asked for without a limit. Raises ConfigurationError for other minutes.
    """
    from autopeft.studies.engine.time_budget import DECIDED, unset

    recorded = recorded_settings(settings, open_ledger(settings))
    more = settings.decides_trials and settings.search.trials > recorded.search.trials
    if settings.minutes != recorded.minutes:
        was, now = (f"{m:g}" if m is not None else "not set" for m in (recorded.minutes, settings.minutes))
        raise ConfigurationError(
            f"minutes: was {was} when the study was started, is {now}; to go on longer, leave it and set search.trials"
        )
    settings = with_turns_of(recorded, settings)
    if settings.minutes is None:
        return settings
    decided = {
        section: unset(
            getattr(settings, section), **{name: getattr(getattr(recorded, section), name) for name in names}
        )
        for section, names in DECIDED.items()
    }
    return settings.model_copy(update={**decided, "minutes": None if more else settings.minutes})


def read_snapshot(settings: StudyFile, ledger: Ledger) -> Snapshot:
    """Return the state of the study in its ledger; neither data nor weights are loaded."""
    trials, left_out = ledger.readable()
    return Snapshot(
        study=settings.study,
        study_id=ledger.study_id,
        settings=ledger.settings,
        objectives=settings.objectives_list(),
        reported=settings.reported_list(),
        backbone=ledger.backbone,
        trials=tuple(trials),
        within=settings.recommend.within,
        constant=ledger.constant,
        outlook=Outlook.read(ledger.outlook),
        left_out=left_out,
    )


def prior_trials(settings: StudyFile, problem: Problem) -> tuple[Trial, ...]:
    """Return the complete trials of `search.prior`, from its search and its baselines, that lie in this space.

    They have genes of this space and declared costs on this backbone. After this study was started, they come from the
    copy in its ledger. Raises StudyFileError if there is no such trial.
    """
    from autopeft.search_space.problem import COPY, declared_costs

    if settings.search.prior is None:
        return ()
    if was_started(settings):
        return open_ledger(settings).prior_trials
    path = settings.folder / Path(settings.search.prior).expanduser()
    try:
        other = load_study(path, environment={})  # environment variables belong to this study
        trials = [
            trial
            for trial in open_ledger(other).trials()
            if trial.state == "complete" and trial.measurement is not None and trial.role != COPY and trial.of is None
        ]
    except ConfigurationError as error:
        raise StudyFileError([settings.render(PRIOR, str(error))]) from error
    wanted = {objective.name for objective in problem.objectives}
    found = []
    for trial in trials:
        genes = locate(problem.space, trial.candidate)
        if genes is None or trial.measurement is None:
            continue
        candidate = problem.space.decode(genes)
        costs = declared_costs(candidate.architecture, problem.space.backbone)
        measurement = replace(trial.measurement, values={**trial.values, **costs})
        if wanted <= measurement.values.keys():
            found.append(replace(trial, candidate=candidate, genes=genes, measurement=measurement))
    if not found:
        what = f"{path}: none of its {len(trials)} complete trials is in this space with a value for every objective"
        raise StudyFileError([settings.render(PRIOR, what)])
    return tuple(found)
