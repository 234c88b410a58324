"""The MLflow report of a study: one experiment, a parent run per study, a child run per ended evaluation.

MLflow is a report; the study itself never reads it. Every `sync` compares a snapshot with the runs in MLflow and writes
the difference, so a later sync, in any process, writes whatever an earlier one could not. Only one process may sync a
study at a time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from autopeft.evaluators.atomic import disk_error
from autopeft.search_space.architecture import digest
from autopeft.search_space.problem import Trial
from autopeft.studies.analysis.diagnostics import Diagnostics, diagnostics
from autopeft.studies.analysis.front import Front
from autopeft.studies.analysis.snapshot import Snapshot, state_counts
from autopeft.studies.errors import ConfigurationError
from autopeft.studies.reports.report import front_data, write_report
from autopeft.studies.tracking import mlflow_payload
from autopeft.studies.tracking.store import connect, environment, keep_artifacts, lasting, mlflow_settings, reason
from autopeft.studies.tracking.uri import absolute_uri
from autopeft.studies.tracking.worker import Worker
from autopeft.studies.urls import without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

LOGGER = logging.getLogger(__name__)

#: The table of scored candidates, in a study's folder.
SUBNETS = "subnets.csv"
SAMPLES = "report/samples.*"
#: The folder of artifacts, in a study's folder.
ARTIFACTS = "mlartifacts"

# MLflow accepts 1000 of both together in a request.
PARAMS_PER_BATCH, METRICS_PER_BATCH = 100, 900
#: Largest share of a study's time for writing its pictures and tables while it runs.
REPORT_SHARE = 0.1
FIRST_PAUSE_S, LONGEST_PAUSE_S = 10.0, 300.0
STATUS = {"complete": "FINISHED", "pruned": "FINISHED", "infeasible": "FINISHED", "failed": "FAILED"}


class Tracker:
    """Copies a study to the MLflow experiment `experiment` at `uri`.

    `folder`: artifacts go to its subfolder `mlartifacts`, unless a server stores them.
    """

    def __init__(self, uri: str, experiment: str, folder: Path) -> None:
        self.uri = absolute_uri(uri)
        self.experiment = experiment
        self.folder = Path(folder).absolute()
        self._worker = Worker()
        self._runs: _Runs | None = None
        #: Above 0 while MLflow cannot be reached.
        self._pause_s = 0.0
        self._retry_at = 0.0

    def begin(self) -> None:
        """Connect for the first time. Raises ConfigurationError for what can never work; logs other failures."""
        try:
            self._do(self._connect)
        except Exception as error:
            why = lasting(error)
            if why is not None:
                where = "" if why.startswith("tracking.") else f"tracking.uri {without_password(self.uri)!r}: "
                raise ConfigurationError(
                    f"{where}{why}; with `--set tracking.enabled=false` the study goes on without MLflow"
                ) from error
            self._failed(error, final=False)

    def sync(self, snapshot: Snapshot, *, final: bool = False) -> bool:
        """Write the parts of `snapshot` that MLflow lacks; return whether it worked. Failures are logged, never raised.

        After a failure, the next attempt follows after a pause, unless the sync is `final`. A final sync looks up all
        runs again and ends the parent run; a later sync that is not final reopens it. The time that it waits for a
        server is limited.
        """
        if not final and time.monotonic() < self._retry_at:
            return False
        try:
            self._do(lambda: self._sync(snapshot, final), last=final)
        except Exception as error:
            self._failed(error, final)
            return False
        if self._pause_s:
            LOGGER.info("MLflow can be reached again; the missing data has been written")
        self._pause_s, self._retry_at = 0.0, 0.0
        return True

    def _do(self, work: Callable[[], object], last: bool = False) -> None:
        def settled() -> None:
            with mlflow_settings():
                work()

        if self.uri.startswith(("sqlite", "file:", "/")):
            settled()
            return
        with mlflow_settings():  # it imports MLflow, which takes seconds and is no fault of a server
            pass
        self._worker.do(settled, last=last)

    def _failed(self, error: Exception, final: bool) -> None:
        """Log a failure, and plan the next attempt."""
        level = logging.WARNING if final or not self._pause_s else logging.INFO
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S) if self._pause_s else FIRST_PAUSE_S
        self._retry_at = time.monotonic() + self._pause_s
        why = lasting(error)
        later = "`autopeft resume` writes the missing data"
        if why is not None:
            LOGGER.log(level, "MLflow refuses the study's data (%s): once this is mended, %s", why, later)
        else:
            what = later if final else "the study continues, and the missing data will be written later"
            done = "reached" if disk_error(error) is None else "written"
            LOGGER.log(level, "MLflow cannot be %s (%s): %s", done, reason(error, self.uri), what)
        LOGGER.debug("while writing to %s", without_password(self.uri), exc_info=error)

    def _connect(self) -> tuple[MlflowClient, str]:
        # A short timeout to find out whether the server answers.
        with environment(MLFLOW_HTTP_REQUEST_TIMEOUT="3", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0"):
            client, experiment_id = connect(self.uri, self.experiment, self.folder / ARTIFACTS)
        return self._worker.watched(client), experiment_id

    def _sync(self, snapshot: Snapshot, final: bool) -> None:
        client, experiment_id = self._connect()
        # A long timeout for large requests.
        with environment(MLFLOW_HTTP_REQUEST_TIMEOUT="20", MLFLOW_HTTP_REQUEST_MAX_RETRIES="1"):
            runs, self._runs = self._runs, None
            if runs is None or final:
                keep = partial(keep_artifacts, self.uri, self.folder / ARTIFACTS)
                runs = _Runs.find(client, experiment_id, snapshot, keep)
                self._write_files(runs)
            runs.write(snapshot, final)
        # Assigned last: after a sync that failed midway, the next one looks up what MLflow has.
        self._runs = runs

    def _write_files(self, runs: _Runs) -> None:
        """Write the table of proxy scores and the samples of generated text, if the study has them.

        Scored candidates are too many for a run each. The final sync writes the complete table.
        """
        for pattern, place in ((SUBNETS, "proxy"), (SAMPLES, "samples")):
            for file in sorted(self.folder.glob(pattern)):
                runs.client.log_artifact(runs.parent.id, str(file), place)


@dataclass(slots=True)
class _TrackedRun:
    """The state of one run in MLflow."""

    id: str
    start_ms: int
    running: bool
    tags: dict[str, str]
    #: The latest value of each metric.
    metrics: dict[str, float]

    @classmethod
    def of(cls, run: Run) -> _TrackedRun:
        return cls(
            id=run.info.run_id,
            start_ms=run.info.start_time,
            running=run.info.status == "RUNNING",
            tags=dict(run.data.tags),
            metrics=dict(run.data.metrics),
        )


class _Runs:
    """The runs of one study. A child whose status is RUNNING has not been written completely."""

    def __init__(
        self,
        client: MlflowClient,
        experiment_id: str,
        parent: _TrackedRun,
        children: dict[int, _TrackedRun],
        keep: Callable[[Iterable[Run]], None],
    ) -> None:
        self.client = client
        self.experiment_id = experiment_id
        self.keep = keep
        self.parent = parent
        self.children = children
        self._report_due = 0.0

    @classmethod
    def find(
        cls,
        client: MlflowClient,
        experiment_id: str,
        snapshot: Snapshot,
        keep: Callable[[Iterable[Run]], None],
    ) -> _Runs:
        """Look the runs up by their tags; create the parent if there is none. `keep`: see `keep_artifacts`."""
        found: list[_TrackedRun] = []
        token: str | None = ""
        while token is not None:
            page = client.search_runs(
                [experiment_id],
                filter_string=f"tags.`autopeft.study_id` = '{snapshot.study_id}'",
                max_results=1000,
                page_token=token or None,
            )
            keep(page)
            found += map(_TrackedRun.of, page)
            token = page.token or None
        children = {int(run.tags["autopeft.trial"]): run for run in found if "autopeft.trial" in run.tags}
        parent = next((run for run in found if run.tags.get("autopeft.role") == mlflow_payload.STUDY_ROLE), None)
        if parent is None:
            key, view = mlflow_payload.front_view(snapshot)
            client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{key}", view)
            # Children that are written later started before this moment.
            before_s = max((t.measurement.wall_s for t in snapshot.ended if t.measurement), default=0.0)
            start_ms = mlflow_payload.now_ms() - round(1000 * before_s)
            tags = {**mlflow_payload.study_tags(snapshot), "autopeft.role": mlflow_payload.STUDY_ROLE}
            made = client.create_run(experiment_id, start_ms, tags, snapshot.study)
            keep([made])
            parent = _TrackedRun.of(made)
        return cls(client, experiment_id, parent, children, keep)

    def write(self, snapshot: Snapshot, final: bool) -> None:
        """Write the difference between `snapshot` and these runs."""
        front = snapshot.front()
        by_trial = {row.trial: row for row in front.rows}
        for trial in snapshot.ended:
            tags = mlflow_payload.trial_tags(trial, snapshot, by_trial.get(trial.number))
            self._write_child(snapshot, trial, {**tags, "mlflow.parentRunId": self.parent.id})
        for number, run in self.children.items():
            values = mlflow_payload.front_metrics(by_trial.get(number), snapshot, run.metrics)
            self._log(run, {}, self._changed(run, values, len(snapshot.ended)))
        self._write_parent(snapshot, front, final)

    def _write_child(self, snapshot: Snapshot, trial: Trial, tags: Mapping[str, str]) -> None:
        wall_ms = round(1000 * trial.measurement.wall_s) if trial.measurement else 0
        run = self.children.get(trial.number)
        if run is None:
            start_ms, name = mlflow_payload.now_ms() - wall_ms, mlflow_payload.run_name(trial, snapshot)
            made = self.client.create_run(self.experiment_id, start_ms, dict(tags), name)
            self.keep([made])
            run = _TrackedRun.of(made)
            self.children[trial.number] = run
        if run.running:
            # Times count from the start in MLflow, so writing everything a second time changes nothing.
            metrics = mlflow_payload.trial_metrics(trial, snapshot, run.start_ms)
            self._log(run, mlflow_payload.trial_params(trial, snapshot), metrics)
            self.client.log_dict(run.id, trial.candidate.to_dict(), "architecture.json")
            if trial.measurement and trial.measurement.routes:
                self.client.log_dict(run.id, dict(trial.measurement.routes), "routing.json")
            self.client.set_terminated(run.id, STATUS[trial.state], run.start_ms + wall_ms)
            run.running = False
        self._tag(run, tags)

    def _write_parent(self, snapshot: Snapshot, found: Front, final: bool) -> None:
        run = self.parent
        points = [*self._counts(snapshot, found), *self._hypervolume(snapshot, final), *self._surrogate(snapshot)]
        points += self._audit(snapshot)
        self._log(run, {}, points)
        # The digest includes the values: they change when members of the front are trained again.
        front = digest(front_data(snapshot, found))
        changed = run.tags.get("autopeft.front") != front
        if final or (changed and time.monotonic() >= self._report_due):
            begun = time.monotonic()
            self._write_artifacts(snapshot)
            self._tag(run, {"autopeft.front": front})
            self._report_due = time.monotonic() + (time.monotonic() - begun) / REPORT_SHARE
        recommended = [str(row.trial) for row in found.members if row.recommended]
        self._tag(
            run,
            {
                "autopeft.state": "complete" if final else "running",
                "autopeft.recommended": recommended[0] if recommended else "none",
                "mlflow.note.content": mlflow_payload.note(snapshot, found, self.experiment_id),
            },
        )
        if final:
            self.client.set_terminated(run.id)
        elif not run.running:
            self.client.update_run(run.id, status="RUNNING")
        run.running = not final

    def _counts(self, snapshot: Snapshot, front: Front) -> list[Metric]:
        """Return the counts that have changed; step: the number of ended evaluations."""
        values = {f"trials/{state}": float(count) for state, count in state_counts(snapshot.ended).items()}
        values["front_size"] = float(len(front.members))
        searched = [trial for trial in snapshot.search_trials if trial.state != "running"]
        if searched:
            feasible = [trial for trial in searched if trial.state == "complete" and trial.violation <= 0]
            values["feasible_share"] = len(feasible) / len(searched)
        return self._changed(self.parent, values, len(snapshot.ended))

    @staticmethod
    def _changed(run: _TrackedRun, values: Mapping[str, float], step: int) -> list[Metric]:
        """Return the metrics whose latest value in MLflow is another one, as points at `step`."""
        # As text, NaN equals itself.
        changed = {name: value for name, value in values.items() if str(run.metrics.get(name)) != str(value)}
        run.metrics |= changed
        at_ms = mlflow_payload.now_ms()
        return [mlflow_payload.metric(name, value, at_ms, step) for name, value in changed.items()]

    def _hypervolume(self, snapshot: Snapshot, final: bool) -> list[Metric]:
        """Return the points that MLflow lacks; step: the number of the trial.

        MLflow never deletes a point, and points of different syncs are not comparable while the reference point moves
        with the trials. They get a name of their own; the final sync writes the curve for one reference point.
        """
        fixed = final or all(objective.reference is not None for objective in snapshot.objectives)
        name = "hypervolume" if fixed else "hypervolume_so_far"
        ended = takewhile(lambda trial: trial.state != "running", snapshot.search_trials)
        written = self._written(name)
        points = zip(ended, snapshot.hypervolume(), strict=False)
        at_ms = mlflow_payload.now_ms()
        return [
            mlflow_payload.metric(name, value, at_ms, trial.number)
            for trial, value in points
            if trial.number not in written
        ]

    def _surrogate(self, snapshot: Snapshot) -> list[Metric]:
        """Return the surrogate's rank correlations that MLflow lacks; step: the number of the trial."""
        reported = [found for found in diagnostics(snapshot.trials) if found.rank_correlation]
        points, at_ms = [], mlflow_payload.now_ms()
        for metric in dict.fromkeys(metric for found in reported for metric in found.rank_correlation):
            name = mlflow_payload.accepted_name(f"surrogate/rank_correlation/{metric}")
            written = self._written(name)
            points += [
                mlflow_payload.metric(name, found.rank_correlation[metric], at_ms, found.trial)
                for found in reported
                if metric in found.rank_correlation and found.trial not in written
            ]
        return points

    def _audit(self, snapshot: Snapshot) -> list[Metric]:
        """Return the audits of a proxy that MLflow lacks, one for each number of trainings that an audit has used.

        Step: the number of the first trial that reports the audit.
        """
        audits: dict[int, Diagnostics] = {}
        for found in diagnostics(snapshot.trials):
            if found.audit:
                audits.setdefault(found.audit["num"], found)
        written = self._written("audit/tau") if audits else set()
        at_ms = mlflow_payload.now_ms()
        points = []
        for found in audits.values():
            if found.trial not in written:
                values = {"tau": found.audit["tau"], "top_tau": found.audit["top_tau"]}
                values |= {f"regret_at_{k}": value for k, value in found.audit["regret"].items()}
                points += [mlflow_payload.metric(f"audit/{name}", v, at_ms, found.trial) for name, v in values.items()]
        return points

    def _written(self, name: str) -> set[int]:
        """Return the steps of a metric of the parent run that MLflow has."""
        return {point.step for point in self.client.get_metric_history(self.parent.id, name)}

    def _write_artifacts(self, snapshot: Snapshot) -> None:
        with TemporaryDirectory() as folder:
            report = write_report(snapshot, Path(folder))
            if report.failed:
                names, whys = ", ".join(path.name for path in report.failed), list(report.failed.values())
                LOGGER.warning("MLflow gets no %s, which cannot be made (%s)", names, whys[0])
            for file in report.files:
                self.client.log_artifact(self.parent.id, str(file), "pareto" if file.stem == "front" else None)
        for last in diagnostics(snapshot.trials)[-1:]:
            self.client.log_dict(self.parent.id, last.to_dict(), "surrogate.json")
        self.client.log_text(self.parent.id, snapshot.settings, "study.yaml")
        self.client.log_dict(self.parent.id, mlflow_payload.environment(), "environment.json")

    def _log(self, run: _TrackedRun, params: Mapping[str, str], metrics: Sequence[Metric]) -> None:
        from mlflow.entities import Param

        rows = [Param(name, value) for name, value in params.items()]
        while rows or metrics:
            self.client.log_batch(run.id, metrics[:METRICS_PER_BATCH], rows[:PARAMS_PER_BATCH])
            rows, metrics = rows[PARAMS_PER_BATCH:], metrics[METRICS_PER_BATCH:]

    def _tag(self, run: _TrackedRun, tags: Mapping[str, str]) -> None:
        """Write the tags that have changed."""
        from mlflow.entities import RunTag

        changed = {name: value for name, value in tags.items() if run.tags.get(name) != value}
        if changed:
            self.client.log_batch(run.id, tags=[RunTag(name, value) for name, value in changed.items()])
            run.tags |= changed
