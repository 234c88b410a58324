"""The ledger: every evaluation of a study, in an Optuna storage. It is the study's only memory.

One evaluation is one Optuna trial. It is added with its candidate, in state RUNNING, before it starts, so that a study
that is killed at any moment continues with the same trial.
"""

from __future__ import annotations

import io
import json
import re
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from ruamel.yaml import YAML

from autopeft.search_space.architecture import Candidate
from autopeft.search_space.backbones.backbone import Backbone, Site
from autopeft.search_space.problem import Objective, Problem, Role, Trial
from autopeft.searchers.optuna_samplers import distribution, to_optuna
from autopeft.studies.analysis.comparable import incomparable
from autopeft.studies.config.fingerprint import changes, differences
from autopeft.studies.errors import ConfigurationError, UnusableEnvironmentError
from autopeft.studies.storage import records
from autopeft.studies.storage.database import connect, names_in, one_by_one, readable_errors
from autopeft.studies.urls import without_password
from autopeft.studies.versions import newer

# All data of an evaluation is in one attribute, so that a single write stores it.
TRIAL, RESULT = "autopeft.trial", "autopeft.result"
FINGERPRINT, IDENTITY, SETTINGS = "autopeft.fingerprint", "autopeft.id", "autopeft.settings"
BACKBONE, LABELS, DOMAINS = "autopeft.backbone", "autopeft.labels", "autopeft.domains"
PRIOR_TRIALS, CONSTANT, OUTLOOK = "autopeft.earlier", "autopeft.constant", "autopeft.outlook"
PLANNED, USED = "autopeft.planned", "autopeft.used_s"
#: Results of a batch on their way to its trials, by the trials' numbers, packed.
BATCH = "autopeft.batch"
CONTENTS, VERSION, HEAD = "autopeft.contents", "autopeft.version", "autopeft.head"
#: The version of the form of ledgers that this code writes. Ledgers without one are of version 0.
LEDGER_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRecord:
    """The data of a study that its ledger stores beside the trials.

    `settings`: the study file at the first run. `prior_trials`: copies of the trials of the study `search.prior`, with
    the fields that a searcher reads. They are copied because the prior study may continue, move or be deleted, and the
    proposals after an interruption must not depend on that. `constant`: scores of the best constant prediction, see
    `constant_scores`. `contents`: what the study reads, see `changes`. `head_sites`: the linears of the task head.
    """

    objectives: Sequence[Objective]
    backbone: Backbone
    labels: tuple[str, ...] | None
    settings: str
    fingerprint: Mapping[str, Any]
    domains: tuple[str, ...] | None = None
    prior_trials: Sequence[Trial] = ()
    constant: Mapping[str, float] = field(default_factory=dict)
    contents: Mapping[str, Any] = field(default_factory=dict)
    head_sites: Sequence[Site] = ()


class Ledger:
    """The trials of one study. Use `create` or `open`."""

    def __init__(self, study: optuna.Study, url: str) -> None:
        self._study = study
        #: For messages.
        self._shown = without_password(url)

    @classmethod
    def create(cls, url: str, name: str, record: StudyRecord) -> Ledger:
        """Create a study.

        Raises ConfigurationError if there is a study of that name, UnusableEnvironmentError for an unusable storage.
        """
        storage = connect(url)
        if name in names_in(storage, url):
            study = optuna.load_study(study_name=name, storage=storage)
            if FINGERPRINT in study.user_attrs:
                raise ConfigurationError(
                    f"{without_password(url)} already holds the study {name!r}: `autopeft resume` continues it"
                )
            if study.get_trials(deepcopy=False):
                raise ConfigurationError(
                    f"{without_password(url)} holds a study {name!r} that another program made: choose another name"
                )
            with readable_errors(url, "written"):
                optuna.delete_study(study_name=name, storage=storage)  # killed during its creation: it has no trials
        directions = [StudyDirection.MAXIMIZE if o.maximise else StudyDirection.MINIMIZE for o in record.objectives]
        with readable_errors(url, "written"), warnings.catch_warnings():
            study = optuna.create_study(storage=storage, study_name=name, directions=directions)
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([o.name for o in record.objectives])
            study.set_user_attr(IDENTITY, uuid.uuid4().hex)
            study.set_user_attr(SETTINGS, record.settings)
            study.set_user_attr(BACKBONE, record.backbone.to_dict())
            study.set_user_attr(LABELS, record.labels and list(record.labels))
            if record.domains is not None:
                study.set_user_attr(DOMAINS, list(record.domains))
            study.set_user_attr(PRIOR_TRIALS, records.pack(list(map(records.declared_prior, record.prior_trials))))
            study.set_user_attr(CONSTANT, dict(record.constant))
            study.set_user_attr(CONTENTS, dict(record.contents))
            study.set_user_attr(HEAD, [asdict(site) for site in record.head_sites])
            study.set_user_attr(VERSION, LEDGER_VERSION)
            study.set_user_attr(FINGERPRINT, dict(record.fingerprint))  # last: a study that has it is complete
        return cls(study, url)

    @classmethod
    def open(cls, url: str, name: str, fingerprint: Mapping[str, Any] | None = None) -> Ledger:
        """Open a study. Given a `fingerprint`, raises ConfigurationError that names every setting that changed.

        Raises it for a ledger of a newer version, too.
        """
        storage = connect(url)
        names = names_in(storage, url)
        if name not in names:
            others = f" (it holds {', '.join(map(repr, sorted(names)))})" if names else ""
            raise ConfigurationError(f"{without_password(url)} holds no study {name!r}{others}")
        study = optuna.load_study(study_name=name, storage=storage)
        recorded = study.user_attrs.get(FINGERPRINT)
        if recorded is None:
            raise ConfigurationError(
                f"the study {name!r} in {without_password(url)} was not made by autopeft, or never started"
            )
        version = study.user_attrs.get(VERSION, 0)
        if version > LEDGER_VERSION:
            raise ConfigurationError(
                newer(f"the ledger of {name!r} has version {version}, this autopeft reads up to {LEDGER_VERSION}")
            )
        changed = differences(recorded, _plain(fingerprint)) if fingerprint is not None else []
        if changed:
            raise ConfigurationError(
                "the study was started with other settings, so its trials are not comparable with new ones:\n  "
                + "\n  ".join(changed)
            )
        return cls(study, url)

    def check_contents(self, found: Mapping[str, Any]) -> None:
        """Raise ConfigurationError that names what has changed of the contents since the study was started."""
        changed = changes(self.contents, _plain(found))
        if changed:
            raise ConfigurationError(
                "what the study reads has changed since it was started, so its trials are not comparable with new"
                " ones:\n  " + "\n  ".join(changed) + "\nrestore it, or start another study with another output"
            )

    def keep_contents(self, found: Mapping[str, Any]) -> None:
        """Check the contents, and record them in the ledger of an earlier version, which has none."""
        self.check_contents(found)
        if not self.contents:
            self._set(CONTENTS, dict(found))
            self._set(VERSION, LEDGER_VERSION)

    @staticmethod
    def names(url: str) -> list[str]:
        """Return the names of the studies in a storage, except those that were killed during their creation."""
        storage = connect(url)
        with readable_errors(url, "read"):
            studies = storage.get_all_studies()  # Optuna's summaries of studies read all trials
        return [study.study_name for study in studies if FINGERPRINT in study.user_attrs]

    @property
    def study_id(self) -> str:
        """The identity of this study, which its name alone is not."""
        return str(self._study.user_attrs[IDENTITY])

    @property
    def settings(self) -> str:
        """The study file at the first run, without URIs, which may hold passwords; earlier versions recorded them."""
        text = str(self._study.user_attrs[SETTINGS])
        if not re.search(r"^(storage|  uri):", text, re.MULTILINE):
            return text
        settings = YAML().load(text)
        settings.pop("storage", None)
        settings.get("tracking", {}).pop("uri", None)
        YAML().dump(settings, shown := io.StringIO())
        return shown.getvalue()

    @property
    def backbone(self) -> Backbone:
        """The description of the frozen model."""
        with _reading("the model's description in the ledger"):
            return Backbone.from_dict(self._study.user_attrs[BACKBONE])

    @property
    def head_sites(self) -> tuple[Site, ...] | None:
        """The linears of the task head; None in ledgers of versions that did not store them."""
        found = self._study.user_attrs.get(HEAD)
        with _reading("the task head in the ledger"):
            return None if found is None else tuple(Site(**site) for site in found)

    @property
    def contents(self) -> Mapping[str, Any]:
        """What the study read when it was started; empty in ledgers of versions that did not store it."""
        return dict(self._study.user_attrs.get(CONTENTS, {}))

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The class labels; None for a task without classes."""
        labels = self._study.user_attrs[LABELS]
        return None if labels is None else tuple(labels)

    @property
    def domains(self) -> tuple[str, ...] | None:
        """The domains of the rows; None without domains, and in ledgers of versions that did not store them."""
        domains = self._study.user_attrs.get(DOMAINS)
        return None if domains is None else tuple(domains)

    @property
    def prior_trials(self) -> tuple[Trial, ...]:
        """The trials of the prior study at the start of this one; see `StudyRecord`."""
        packed = self._study.user_attrs.get(PRIOR_TRIALS)
        with _reading("a trial of the prior study in the ledger"):
            return tuple(records.read_prior(data) for data in records.unpack(packed)) if packed else ()

    @property
    def constant(self) -> Mapping[str, float]:
        """The scores of the best constant prediction; empty for some tasks and in ledgers of earlier versions."""
        return dict(self._study.user_attrs.get(CONSTANT, {}))

    @property
    def outlook(self) -> Mapping[str, Any] | None:
        """What `Outlook.read` reads, of the last run that came to its end; None before."""
        found: Mapping[str, Any] | None = self._study.user_attrs.get(OUTLOOK)
        return found

    @outlook.setter
    def outlook(self, found: Mapping[str, Any] | None) -> None:
        self._set(OUTLOOK, None if found is None else dict(found))

    @property
    def planned(self) -> int:
        """The number of trials that the last run was to make; 0 before, and in ledgers of earlier versions."""
        return int(self._study.user_attrs.get(PLANNED, 0))

    @planned.setter
    def planned(self, trials: int) -> None:
        self._set(PLANNED, trials)

    @property
    def used_s(self) -> Mapping[str, float]:
        """The seconds that the parts of the study have used, over all runs; see `TimeUsed`."""
        return dict(self._study.user_attrs.get(USED, {}))

    @used_s.setter
    def used_s(self, used_s: Mapping[str, float]) -> None:
        self._set(USED, dict(used_s))

    def _set(self, name: str, value: Any) -> None:
        with readable_errors(self._shown, "written"):
            self._study.set_user_attr(name, value)

    def trials(self) -> list[Trial]:
        """Return every evaluation, ended or not, in order, without those that are left out; see `readable`."""
        return self.readable()[0]

    def readable(self) -> tuple[list[Trial], dict[int, str]]:
        """Return `trials`, and by their numbers those left out: damaged or not to be compared with them, and why."""
        packed = self._study.user_attrs.get(BATCH)
        kept: Mapping[str, Any] = records.unpack(packed) if packed else {}
        found, damaged = [], {}
        for number, frozen in enumerate(self._frozen()):
            if frozen is not None and TRIAL not in frozen.user_attrs:
                continue
            try:
                found.append(_read(number, frozen, kept.get(str(number))))
            except records.DamagedError as error:
                damaged[number] = str(error)
        left_out = damaged | incomparable(found, self._study.metric_names or (), self.backbone, damaged)
        return [trial for trial in found if trial.number not in left_out], dict(sorted(left_out.items()))

    def _frozen(self) -> list[FrozenTrial | None]:
        """Return all trials of the storage by their numbers; None for those that Optuna cannot read."""
        with readable_errors(self._shown, "read"):
            try:
                return list(self._study.get_trials(deepcopy=False))
            except ValueError:  # one record that is not JSON keeps Optuna from reading any
                return list(one_by_one(self._study._storage, self._study._study_id))

    def begin(self, problem: Problem, role: Role, candidate: Candidate, **fields: Any) -> Trial:
        """Add a running trial; `fields` are further fields of `Trial`."""
        trial = Trial(number=len(self._frozen()), role=role, candidate=candidate, **fields)
        domains = {gene.name: gene.domain for gene in problem.space.genes}
        frozen = create_trial(
            state=TrialState.RUNNING,
            params={name: to_optuna(domains[name], value) for name, value in trial.genes.items()},
            distributions={name: distribution(domains[name]) for name in trial.genes},
            user_attrs={TRIAL: records.declared(trial)},
        )
        with readable_errors(self._shown, "written"):
            self._study.add_trial(frozen)
        return trial

    def finish(self, trials: Sequence[Trial], objectives: Sequence[Objective]) -> None:
        """Record how trials ended, all of them or none. A repeated call changes nothing.

        The storage writes one trial at a time. So the results of several are first kept with the study, in one write,
        and are read from there until all came to their trials.
        """
        if len(trials) > 1:
            self._set(BATCH, records.pack({str(trial.number): records.result_of(trial) for trial in trials}))
        for trial in trials:
            self._finish(trial, objectives)
        if len(trials) > 1:
            self._set(BATCH, "")

    def _finish(self, trial: Trial, objectives: Sequence[Objective]) -> None:
        frozen = self._frozen()[trial.number]
        if frozen is None or frozen.state.is_finished():
            return
        with readable_errors(self._shown, "written"):
            handle = optuna.trial.Trial(self._study, frozen._trial_id)
            handle.set_user_attr(RESULT, records.result_of(trial))
            if trial.state == "complete":
                assert trial.measurement is not None
                if "limits" not in frozen.constraints:
                    handle.set_constraint("limits", trial.violation)
                self._study.tell(trial.number, [trial.measurement.values[o.name] for o in objectives])
            else:
                state = TrialState.PRUNED if trial.state == "pruned" else TrialState.FAIL
                self._study.tell(trial.number, state=state)

    def unfinished(self, objectives: Sequence[Objective]) -> list[Trial]:
        """Return the trials that were running when the study stopped; close those that have a result already."""
        running, all_frozen = [], self._frozen()
        for trial in self.trials():
            frozen = all_frozen[trial.number]
            if trial.state != "running" and frozen is not None and not frozen.state.is_finished():
                self._finish(trial, objectives)
            elif trial.state == "running":
                running.append(trial)
        return running


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Raise UnusableEnvironmentError for a record without which nothing can be read."""
    try:
        with records.reading(what):
            yield
    except records.DamagedError as error:
        raise UnusableEnvironmentError(f"{error}: restore a copy of the ledger, or start another study") from error


def _read(number: int, frozen: FrozenTrial | None, kept: Mapping[str, Any] | None) -> Trial:
    """Read a trial. `kept`: its result where the study has it, see `Ledger.finish`. Raises DamagedError."""
    if frozen is None:
        raise records.DamagedError("its record is not JSON")
    result = frozen.user_attrs.get(RESULT) or kept or {}
    if frozen.state.is_finished() and not result:
        raise records.DamagedError("its result is missing")
    return records.read(number, frozen.user_attrs[TRIAL], result)


def _plain(data: Any) -> Any:
    """Return data as JSON has it, as in the ledger: tuples become lists."""
    return json.loads(json.dumps(data))
