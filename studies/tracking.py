"""The MLflow report of a study: one experiment, a parent run per study, a child run per ended evaluation.

MLflow is the report, never the study's memory. Every `sync` compares what a snapshot says with the runs that MLflow
holds and writes the difference, so what could not be written is written later, by whichever process syncs next. One
process at a time may sync a study.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from autopeft.search_space.architecture import digest
from autopeft.search_space.genes import TRAINING
from autopeft.search_space.problem import METRICS, Measurement, Trial
from autopeft.studies.report import front_data, write_report
from autopeft.studies.snapshot import Snapshot, state_counts, summary

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

LOGGER = logging.getLogger(__name__)

# What MLflow accepts.
MAX_PARAM, MAX_TAG, MAX_NAME = 6000, 8000, 250
PARAMS_PER_BATCH, METRICS_PER_BATCH = 100, 900

FIRST_PAUSE_S, LONGEST_PAUSE_S = 10.0, 300.0
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
STATUS = {"complete": "FINISHED", "infeasible": "FINISHED", "failed": "FAILED"}
STUDY = "study"
FRONT_FILTER = "tags.`autopeft.pareto` = 'true'"


def absolute_uri(uri: str) -> str:
    """`uri`, with the path of an SQLite file made absolute: a relative one means another file in another folder."""
    scheme, _, path = uri.partition(":///")
    return f"{scheme}:///{Path(path).absolute()}" if scheme == "sqlite" and path else uri


def ui_command(uri: str) -> str:
    """The command line that opens the report."""
    if uri.startswith("http"):
        return f"python -m webbrowser {shlex.quote(uri)}"
    return f"mlflow ui --backend-store-uri {shlex.quote(absolute_uri(uri))} --port 5000"


class Tracker:
    """Keeps the MLflow experiment `experiment` at `uri` in step with a study.

    `folder`: where artifacts go when no server keeps them, in `mlartifacts`.
    """

    def __init__(self, uri: str, experiment: str, folder: Path) -> None:
        self.uri = absolute_uri(uri)
        self.experiment = experiment
        self.folder = Path(folder).absolute()
        self._runs: _Runs | None = None
        self._failures = 0
        self._retry_at = 0.0

    def sync(self, snapshot: Snapshot, *, final: bool = False) -> bool:
        """Write what MLflow lacks of `snapshot`; whether that worked. Failures are logged, never raised.

        After a failure, nothing is tried before a pause has passed, except by a `final` sync. That one also ends
        the parent run and looks everything up afresh.
        """
        if not final and time.monotonic() < self._retry_at:
            return False
        try:
            with _mlflow_settings():
                self._sync(snapshot, final)
        except Exception as error:
            # What was written of it is looked up by the next one.
            self._runs = None
            self._failures += 1
            self._retry_at = time.monotonic() + min(FIRST_PAUSE_S * 2 ** (self._failures - 1), LONGEST_PAUSE_S)
            LOGGER.log(
                logging.WARNING if final or self._failures == 1 else logging.INFO,
                "MLflow is out of reach (%s): the study goes on; what was missed is written later",
                _reason(error),
            )
            LOGGER.debug("while writing to %s", self.uri, exc_info=True)
            return False
        if self._failures:
            LOGGER.info("MLflow is back; what was missed is written")
        self._failures, self._retry_at = 0, 0.0
        return True

    def _sync(self, snapshot: Snapshot, final: bool) -> None:
        # Whether anybody answers shows soon; after that, there is time for long requests.
        with _http(timeout_s=2, retries=0):
            client, experiment_id = self._connect()
        with _http(timeout_s=20, retries=1):
            if self._runs is None or final:
                self._runs = _Runs.find(client, experiment_id, snapshot.study_id)
            self._runs.write(snapshot, final)

    def _connect(self) -> tuple[MlflowClient, str]:
        from mlflow import MlflowClient

        if self.uri.startswith(DATABASES):
            _check_database(self.uri)
        client = MlflowClient(tracking_uri=self.uri)
        found = client.get_experiment_by_name(self.experiment)
        if found is not None:
            return client, found.experiment_id
        # Without a server, MLflow would put artifacts into ./mlruns, a folder that breaks its own defaults.
        location = None if self.uri.startswith("http") else (self.folder / "mlartifacts").as_uri()
        # The UI opens an experiment of this kind on its table of runs.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        return client, client.create_experiment(self.experiment, artifact_location=location, tags=tags)


@dataclass(slots=True)
class _Run:
    """What MLflow holds of one run."""

    id: str
    start_ms: int
    running: bool
    tags: dict[str, str]
    #: The latest values.
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Any) -> _Run:
        running = run.info.status == "RUNNING"
        return cls(run.info.run_id, run.info.start_time, running, dict(run.data.tags), dict(run.data.metrics))


class _Runs:
    """The runs of one study in one experiment."""

    def __init__(self, client: MlflowClient, experiment_id: str, found: list[_Run]) -> None:
        self.client = client
        self.experiment_id = experiment_id
        self.parent = next((run for run in found if run.tags.get("autopeft.role") == STUDY), None)
        self.children = {
            int(run.tags["autopeft.trial"]): run for run in reversed(found) if "autopeft.trial" in run.tags
        }

    @classmethod
    def find(cls, client: MlflowClient, experiment_id: str, study_id: str) -> _Runs:
        found: list[_Run] = []
        token = None
        while token is not None or not found:
            page = client.search_runs(
                [experiment_id],
                filter_string=f"tags.`autopeft.study_id` = '{study_id}'",
                max_results=1000,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            found += map(_Run.of, page)
            token = page.token
            if not page:
                break
        return cls(client, experiment_id, found)

    def write(self, snapshot: Snapshot, final: bool) -> None:
        """Children first: the parent speaks of them. A run whose status is RUNNING is not complete yet."""
        rows = {row.trial: row for row in snapshot.rows()}
        parent = self.parent or self._create(STUDY, snapshot.study, _common_tags(snapshot, STUDY), _longest_s(snapshot))
        self.parent = parent
        for trial in snapshot.ended:
            row = rows.get(trial.number)
            tags = {
                **_common_tags(snapshot, trial.role),
                **trial_tags(trial),
                "autopeft.pareto": _text(row is not None and row.on_front),
                "autopeft.recommended": _text(row is not None and row.recommended),
                "mlflow.parentRunId": parent.id,
            }
            self._write_child(snapshot, trial, tags)
        self._write_parent(snapshot, parent, final)

    def _write_child(self, snapshot: Snapshot, trial: Trial, tags: Mapping[str, str]) -> None:
        wall_s = trial.measurement.wall_s if trial.measurement else 0.0
        run = self.children.get(trial.number)
        if run is None:
            run = self._create(trial.number, run_name(trial, snapshot), tags, wall_s)
            self.children[trial.number] = run
        if run.running:
            # A second writing after an interruption changes nothing: times count from the start that MLflow holds.
            self._log(run.id, trial_params(trial, snapshot), trial_metrics(trial, snapshot, run.start_ms))
            self.client.log_dict(run.id, trial.candidate.to_dict(), "architecture.json")
            self.client.set_terminated(run.id, STATUS[trial.state], run.start_ms + round(1000 * wall_s))
            run.running = False
        self._tag(run, tags)

    def _write_parent(self, snapshot: Snapshot, run: _Run, final: bool) -> None:
        self._log(run.id, {}, [*self._counts(snapshot, run), *self._hypervolume(snapshot, run, final)])
        front = digest(front_data(snapshot))
        if final or run.tags.get("autopeft.front") != front:
            self._write_artifacts(snapshot, run)
        picked = [row for row in snapshot.rows() if row.recommended]
        self._tag(run, {
            "autopeft.state": "complete" if final else "running",
            "autopeft.front": front,
            **({"autopeft.recommended": str(picked[0].trial)} if picked else {}),
            "mlflow.note.content": note(snapshot),
        })  # fmt: skip
        if final:
            self.client.set_terminated(run.id)
        elif not run.running:
            self.client.update_run(run.id, status="RUNNING")
        run.running = not final

    def _counts(self, snapshot: Snapshot, run: _Run) -> list[Metric]:
        """Those that have changed; step: the number of ended evaluations."""
        searched = [trial for trial in snapshot.search_trials if trial.state != "running"]
        feasible = [trial for trial in searched if trial.state == "complete" and trial.violation <= 0]
        values = {f"trials/{state}": float(count) for state, count in state_counts(snapshot.ended).items()}
        values["front_size"] = float(sum(row.on_front for row in snapshot.rows()))
        if searched:
            values["feasible_share"] = len(feasible) / len(searched)
        changed = {name: value for name, value in values.items() if run.metrics.get(name) != value}
        run.metrics.update(changed)
        return [_metric(name, value, _now_ms(), len(snapshot.ended)) for name, value in changed.items()]

    def _hypervolume(self, snapshot: Snapshot, run: _Run, final: bool) -> list[Metric]:
        """Its points that MLflow lacks; step: the number of the trial.

        As long as the corner moves with the trials, points of different syncs cannot be compared, and MLflow never
        forgets a point. So they go under a name of their own, and the curve up to one corner is written at the end.
        """
        fixed = final or all(objective.reference is not None for objective in snapshot.objectives)
        name = "hypervolume" if fixed else "hypervolume_so_far"
        ended = list(takewhile(lambda trial: trial.state != "running", snapshot.search_trials))
        known = {point.step for point in self.client.get_metric_history(run.id, name)}
        points = zip(ended, snapshot.hypervolume(), strict=False)
        return [_metric(name, value, _now_ms(), t.number) for t, value in points if t.number not in known]

    def _write_artifacts(self, snapshot: Snapshot, run: _Run) -> None:
        with TemporaryDirectory() as folder:
            for file in write_report(snapshot, Path(folder)):
                self.client.log_artifact(run.id, str(file), "pareto" if file.stem == "front" else None)
        self.client.log_text(run.id, snapshot.settings, "study.yaml")
        self.client.log_dict(run.id, environment(), "environment.json")

    def _create(self, what: int | str, name: str, tags: Mapping[str, str], wall_s: float) -> _Run:
        start_ms = _now_ms() - round(1000 * wall_s)
        return _Run.of(self.client.create_run(self.experiment_id, start_ms, dict(tags), name[:MAX_NAME]))

    def _log(self, run_id: str, params: Mapping[str, str], metrics: list[Metric]) -> None:
        from mlflow.entities import Param

        rows = [Param(name, value) for name, value in params.items()]
        while rows or metrics:
            self.client.log_batch(run_id, metrics[:METRICS_PER_BATCH], rows[:PARAMS_PER_BATCH])
            rows, metrics = rows[PARAMS_PER_BATCH:], metrics[METRICS_PER_BATCH:]

    def _tag(self, run: _Run, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        changed = {name: value for name, value in tags.items() if run.tags.get(name) != value}
        if changed:
            self.client.log_batch(run.id, tags=[RunTag(name, value) for name, value in changed.items()])
            run.tags.update(changed)
