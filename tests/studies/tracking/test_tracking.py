"""The MLflow report, on a real store: what it holds, and that it ends up complete whatever comes in between."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from math import inf, isnan, nan
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from autopeft.search_space.problem import COPY, FINALIST
from autopeft.studies.tracking import mlflow_sync
from autopeft.studies.tracking.mlflow_payload import accepted_name
from autopeft.studies.tracking.mlflow_sync import Tracker
from autopeft.studies.tracking.uri import absolute_uri, ui_command

from ...support.slow import slow
from ...support.tracked_study import FRONT, NUM_STEPS, OBJECTIVES, SETTINGS, TRIALS, mlflow_server, snapshot, trial

FRONT_FILTER = "tags.`autopeft.pareto` = 'true'"
NOWHERE = "http://127.0.0.1:9"


class Store:
    """A store in a folder of its own, and what the tests ask it."""

    def __init__(self, folder: Path, uri: str | None = None) -> None:
        self.folder = folder
        self.uri = uri or f"sqlite:///{folder / 'mlflow.db'}"
        self.client = MlflowClient(self.uri)

    def tracker(self) -> Tracker:
        return Tracker(self.uri, "topics-project", self.folder)

    def runs(self, filter_string: str = "") -> list[Run]:
        experiment = self.client.get_experiment_by_name("topics-project")
        assert experiment is not None
        return list(self.client.search_runs([experiment.experiment_id], filter_string))

    def parent(self) -> Run:
        (run,) = self.runs("tags.`autopeft.role` = 'study'")
        return run

    def child(self, number: int) -> Run:
        (run,) = self.runs(f"tags.`autopeft.trial` = '{number}'")
        return run

    def front(self) -> set[int]:
        return {int(run.data.tags["autopeft.trial"]) for run in self.runs(FRONT_FILTER)}

    def history(self, run: Run, name: str) -> list[tuple[int, float]]:
        points = self.client.get_metric_history(run.info.run_id, name)
        return [(point.step, point.value) for point in points]

    def artifact(self, run: Run, path: str) -> str:
        found = self.client.download_artifacts(run.info.run_id, path, str(self.folder))
        return Path(found).read_text(encoding="utf-8")

    def everything(self) -> dict[str, object]:
        """All that is stored but for artifacts and times."""
        return {
            run.info.run_id: (
                run.info.status,
                run.data.tags,
                run.data.params,
                {name: self.history(run, name) for name in run.data.metrics},
            )
            for run in self.runs()
        }


@pytest.fixture
def store(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    yield Store(tmp_path)
    assert not list(elsewhere.iterdir()), "nothing is left where the process happens to run"


# What it holds


def test_a_child_holds_its_trial(store: Store) -> None:
    assert store.tracker().sync(snapshot())
    run = store.child(4)
    assert run.info.run_name == "trial 4: prefix 4 at attn in layers 0 + lora 16 at attn.q attn.v, lr 0.002"
    assert run.info.status == "FINISHED"
    assert run.info.end_time - run.info.start_time == 6500
    assert abs(run.info.end_time / 1000 - time.time()) < 60
    assert run.data.params == {
        "architecture": "prefix 4 at attn in layers 0 + lora 16 at attn.q attn.v, lr 0.002",
        "kinds": "lora, prefix",
        "role": "search",
        "seed": "0",
        "lora.on": "true",
        "lora.rank": "16",
        "training.learning_rate": "0.002",
        "training.epochs": "2",
        "training.batch_size": "32",
    }
    tags = {name: value for name, value in run.data.tags.items() if name.startswith("autopeft.")}
    assert tags == {
        "autopeft.study": "topics",
        "autopeft.study_id": "5d2f",
        "autopeft.trial": "4",
        "autopeft.key": TRIALS[4].candidate.key,
        "autopeft.state": "complete",
        "autopeft.role": "search",
        "autopeft.pareto": "true",
        "autopeft.recommended": "true",
        "autopeft.standing": "best",
    }
    assert run.data.tags["mlflow.parentRunId"] == store.parent().info.run_id
    found = TRIALS[4].measurement
    assert found is not None
    assert run.data.metrics == {
        "obj/accuracy": 0.8,
        "obj/accuracy_std_err": 0.06,
        "obj/num_params": found.values["num_params"],
        "metric/latency_s": found.values["latency_s"],
        "metric/latency_s_iqr": 1e-4,
        "front/accuracy": 0.8,
        "front/accuracy_std_err": snapshot().rows()[4].std_err["accuracy"],
        "front/num_params": found.values["num_params"],
        "front/latency_s": found.values["latency_s"],
        "train/loss": found.losses[-1],
        "rung/accuracy": 0.4,
        "time/wall_s": 6.5,
        "time/train_s": 5.0,
    }
    assert store.history(run, "train/loss") == list(enumerate(found.losses, start=1))
    assert store.history(run, "rung/accuracy") == [(NUM_STEPS // 2, 0.4)]
    assert json.loads(store.artifact(run, "architecture.json")) == TRIALS[4].candidate.to_dict()


def test_the_parent_holds_the_study(store: Store) -> None:
    study = snapshot()
    assert store.tracker().sync(study, final=True)
    run = store.parent()
    assert (run.info.run_name, run.info.status) == ("topics", "FINISHED")
    assert "mlflow.parentRunId" not in run.data.tags
    assert run.data.tags["autopeft.state"] == "complete"
    assert run.data.tags["autopeft.recommended"] == "4"
    numbers = [t.number for t in study.search_trials]
    assert store.history(run, "hypervolume") == list(zip(numbers, study.hypervolume(), strict=True))
    del run.data.metrics["hypervolume"]
    assert run.data.metrics == {
        "front_size": 3,
        "feasible_share": 0.8,
        "trials/complete": 5,
        "trials/failed": 1,
    }
    files = store.client.list_artifacts(run.info.run_id) + store.client.list_artifacts(run.info.run_id, "pareto")
    assert {file.path for file in files if not file.is_dir} == {
        "curves.png",
        "environment.json",
        "hypervolume.png",
        "pareto/front.csv",
        "pareto/front.html",
        "pareto/front.json",
        "pareto/front.png",
        "study.yaml",
    }
    assert store.artifact(run, "study.yaml") == SETTINGS
    members = json.loads(store.artifact(run, "pareto/front.json"))
    assert {member["trial"] for member in members} == set(FRONT)
    environment = store.artifact(run, "environment.json")
    assert json.loads(environment)["packages"]["mlflow"] == mlflow.__version__
    assert socket.gethostname() not in environment
    assert str(Path.home()) not in environment
    note = run.data.tags["mlflow.note.content"]
    assert FRONT_FILTER in note
    assert "trial 4" in note
    assert "`obj/accuracy`" in note
    (view,) = re.findall(r"viewStateShareKey=(\w+)", note)
    state = json.loads(store.client.get_experiment(run.info.experiment_id).tags[f"mlflow.sharedViewState.{view}"])
    assert len(store.runs(state["searchFilter"])) == len(FRONT)


def test_what_a_searcher_tells_of_its_model(store: Store) -> None:
    def told(number: int, correlation: float) -> dict[str, Any]:
        relevance = {"accuracy": {"lora.rank": 0.7, "training.learning_rate": 0.3}}
        found = {"accuracy": correlation, "accuracy@a [b]": correlation}
        return {"diagnostics": {"phase": "model", "rank_correlation": found, "relevance": relevance}}

    trials = [TRIALS[0], TRIALS[1], replace(TRIALS[2], searcher_state={"diagnostics": {"phase": "initial"}})]
    tracker = store.tracker()
    tracker.sync(snapshot([*trials, replace(TRIALS[3], searcher_state=told(3, 0.25))]))
    trials += [replace(TRIALS[i], searcher_state=told(i, i / 10)) for i in (3, 4)]
    for _ in range(2):
        tracker.sync(snapshot(trials), final=True)
    run = store.parent()
    for name in ("accuracy", "accuracy@a [b]"):
        written = accepted_name(f"surrogate/rank_correlation/{name}")
        assert store.history(run, written) == [(3, 0.25), (4, 0.4)], "each point once"
    last = json.loads(store.artifact(run, "surrogate.json"))
    assert last["trial"] == 4
    assert last["relevance"]["accuracy"]["lora.rank"] == 0.7


def test_a_failure_is_there_with_its_reason(store: Store) -> None:
    store.tracker().sync(snapshot())
    run = store.child(5)
    assert (run.info.status, run.data.tags["autopeft.state"]) == ("FAILED", "failed")
    assert run.data.tags["autopeft.error"] == "RuntimeError: out of memory\n  in step 3"
    assert run.data.params["lora.rank"] == "32"
    assert run.data.metrics == {}
    assert store.artifact(run, "architecture.json")


def test_a_pruned_trial_shows_its_rung_and_no_objectives(store: Store) -> None:
    whole = trial(6, 0.9, 32)
    found = whole.measurement
    assert found is not None
    cut = replace(found, share=0.5, losses=found.losses[: NUM_STEPS // 2], values={**found.values, "accuracy": 0.45})
    why = "loss 1.2 after 50% of the steps"
    store.tracker().sync(snapshot([*TRIALS, replace(whole, state="pruned", measurement=cut, error=why)]))
    run = store.child(6)
    assert (run.info.status, run.data.tags["autopeft.state"]) == ("FINISHED", "pruned")
    assert run.data.metrics.keys() == {"train/loss", "rung/accuracy", "time/wall_s", "time/train_s"}
    assert store.history(run, "rung/accuracy") == [(NUM_STEPS // 2, 0.45)]
    assert store.front() == set(FRONT)


def test_only_evaluations_that_are_over_have_a_run(store: Store) -> None:
    more = [
        trial(6, 0.0, 2, state="running", measurement=None),
        trial(7, 0.5, 1, role=COPY, of=1),
        trial(8, 0.0, 0, state="infeasible", measurement=None, error="no adapter is on"),
    ]
    store.tracker().sync(snapshot([*TRIALS, *more]))
    assert {int(run.data.tags.get("autopeft.trial", -1)) for run in store.runs()} == {-1, 0, 1, 2, 3, 4, 5, 8}
    assert (store.child(8).info.status, store.child(8).data.params["kinds"]) == ("FINISHED", "none")


def test_the_filter_finds_exactly_the_front(store: Store) -> None:
    tracker = store.tracker()
    tracker.sync(snapshot())
    assert store.front() == set(FRONT)
    (recommended,) = store.runs("tags.`autopeft.recommended` = 'true'")
    assert recommended.data.tags["autopeft.trial"] == "4"

    better = trial(6, 0.9, 4)
    tracker.sync(snapshot([*TRIALS, better]))
    assert store.front() == {1, 6}

    finalists = [
        trial(7 + i, 0.9, 4, role=FINALIST, of=6, genes={}, seed=i + 1, measurement=replace(
            better.measurement, test={"accuracy": 0.85}
        ))
        for i in range(2)
    ]  # fmt: skip
    tracker.sync(snapshot([*TRIALS, better, *finalists]))
    assert store.front() == {6}, "among the candidates that were trained again"
    run = store.child(8)
    assert run.info.run_name.startswith("trial 8 (trial 6, seed 2): lora 4 at")
    assert (run.data.tags["autopeft.of"], run.data.metrics["test/accuracy"]) == ("6", 0.85)


@pytest.mark.slow
def test_numbers_of_the_front_are_those_of_this_moment(store: Store) -> None:
    """A member that leaves the front, or becomes its best one, keeps no number from before; NaN stands for none."""
    again = [replace(trial(6 + i, quality, 16), role=FINALIST, of=4, seed=i) for i, quality in ((1, 0.6), (2, 0.62))]
    other = [replace(trial(8 + i, quality, 4), role=FINALIST, of=2, seed=i) for i, quality in ((1, 0.66), (2, 0.7))]
    tracker = store.tracker()
    assert tracker.sync(snapshot())
    before = store.child(2).data.metrics
    assert before["front/accuracy_difference"] == pytest.approx(-0.1)
    for _ in range(2):  # by this process, and by another one
        assert tracker.sync(snapshot((*TRIALS, *again, *other)), final=True)
        assert store.front() == {2}
        now = store.child(2).data.metrics
        assert now["front/accuracy"] == pytest.approx(0.68)
        assert isnan(now["front/accuracy_difference"])
        assert now["obj/accuracy"] == 0.7
        gone = store.child(4).data.metrics
        assert all(isnan(value) for name, value in gone.items() if name.startswith("front/"))
        assert len(store.history(store.child(4), "front/accuracy")) == 2, "NaN is written once"
        tracker = store.tracker()


@pytest.mark.slow
def test_studies_share_an_experiment(store: Store) -> None:
    for study_id in ("one", "two"):
        store.tracker().sync(snapshot(study_id=study_id))
    assert len(store.runs()) == 2 * (1 + len(TRIALS))
    assert len(store.runs("tags.`autopeft.study_id` = 'two'")) == 1 + len(TRIALS)


def test_values_and_names_that_mlflow_refuses(store: Store) -> None:
    odd = trial(0, 0.5, 1, genes={"long": "y" * 7000, "a=b|../c//d": 0.1 + 0.2, "../up": True})
    assert odd.measurement is not None
    values = {**odd.measurement.values, "loss": nan, "step_s": inf}
    odd = replace(odd, measurement=replace(odd.measurement, values=values, losses=tuple([1.0, nan, inf] * 700)))
    genes = {f"lora.rank.layers.{i}": i for i in range(250)}
    assert store.tracker().sync(snapshot([odd, trial(1, 0.6, 2, genes=genes)]))
    params = store.child(0).data.params
    assert len(params["long"]) == 6000
    assert params["long"].endswith("y…")
    assert params["a_b_/c/_/d"] == "0.3"
    assert params["_/up"] == "true"
    assert isnan(store.child(0).data.metrics["metric/loss"])
    assert len(store.history(store.child(0), "train/loss")) == 2100
    assert genes.keys() <= store.child(1).data.params.keys()


def test_the_hypervolume_is_measured_up_to_one_corner(store: Store) -> None:
    tracker = store.tracker()
    study = snapshot()
    for count in (2, 4, 6):
        tracker.sync(snapshot(TRIALS[:count]))
    assert [step for step, _ in store.history(store.parent(), "hypervolume_so_far")] == [1, 2, 3, 4, 5]
    assert store.history(store.parent(), "hypervolume") == []
    tracker.sync(study, final=True)
    assert [value for _, value in store.history(store.parent(), "hypervolume")] == study.hypervolume()


def test_a_declared_corner_gives_the_curve_at_once(store: Store) -> None:
    references = {"accuracy": 0.0, "num_params": 5000.0}
    objectives = tuple(replace(o, reference=references[o.name]) for o in OBJECTIVES)
    tracker = store.tracker()
    for count in (2, 4, 6):
        tracker.sync(snapshot(TRIALS[:count], objectives=objectives))
    curve = snapshot(objectives=objectives).hypervolume()
    assert [value for _, value in store.history(store.parent(), "hypervolume")] == curve


# How it gets there


def test_to_sync_again_changes_nothing(store: Store) -> None:
    tracker = store.tracker()
    for _ in range(2):
        assert tracker.sync(snapshot())
    before = store.everything()
    assert tracker.sync(snapshot())
    assert store.tracker().sync(snapshot()), "another process"
    assert store.everything() == before
    for _ in range(2):
        assert tracker.sync(snapshot(), final=True)
    assert len(store.runs()) == 1 + len(TRIALS)


def test_another_process_goes_on(store: Store) -> None:
    assert store.tracker().sync(snapshot(TRIALS[:3]), final=True)
    first = store.child(1)
    resumed = store.tracker()
    assert resumed.sync(snapshot(TRIALS[:4]))
    assert (store.parent().info.status, store.parent().data.tags["autopeft.state"]) == ("RUNNING", "running")
    assert resumed.sync(snapshot(), final=True)
    assert store.parent().info.status == "FINISHED"
    assert len(store.runs()) == 1 + len(TRIALS)
    assert store.child(1).info == first.info


@pytest.mark.parametrize("stop", [slow("log_batch"), "log_dict", slow("set_terminated")])
def test_a_child_that_was_cut_off_is_completed(store: Store, monkeypatch: pytest.MonkeyPatch, stop: str) -> None:
    def killed(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    tracker = store.tracker()
    tracker.sync(snapshot([]))
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, stop, killed)
        with pytest.raises(KeyboardInterrupt):
            tracker.sync(snapshot())
    assert store.child(0).info.status == "RUNNING"
    assert tracker.sync(snapshot())
    assert store.child(0).info.status == "FINISHED"
    assert len(store.runs()) == 1 + len(TRIALS)
    found = TRIALS[0].measurement
    assert found is not None
    assert store.history(store.child(0), "train/loss") == list(enumerate(found.losses, start=1))


@pytest.mark.slow
def test_a_run_that_was_deleted_comes_back(store: Store) -> None:
    tracker = store.tracker()
    tracker.sync(snapshot())
    store.client.delete_run(store.child(4).info.run_id)
    assert tracker.sync(snapshot(), final=True)
    assert store.front() == set(FRONT)


def test_it_leaves_the_process_as_it_was(store: Store) -> None:
    before = (dict(os.environ), mlflow.get_tracking_uri(), logging.getLogger("mlflow").level)
    store.tracker().sync(snapshot())
    Tracker(NOWHERE, "topics-project", store.folder).sync(snapshot())
    assert (dict(os.environ), mlflow.get_tracking_uri(), logging.getLogger("mlflow").level) == before


# Out of reach


def check_out_of_reach(tracker: Tracker, caplog: pytest.LogCaptureFixture, reason: str, what: str = "reached") -> None:
    began = time.monotonic()
    assert not tracker.sync(snapshot())
    assert time.monotonic() - began < 3.5
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"MLflow cannot be {what} (")
    assert reason in record.getMessage()
    assert "the study continues, and the missing data will be written later" in record.getMessage()


def test_a_server_that_is_not_there(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(NOWHERE, "topics-project", store.folder)
    check_out_of_reach(tracker, caplog, "Connection refused")
    tracker.uri = store.uri
    assert tracker.sync(snapshot(), final=True), "a final sync does not wait"
    assert store.front() == set(FRONT)
    assert len(store.runs()) == 1 + len(TRIALS)


def test_a_server_that_does_not_answer(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        check_out_of_reach(Tracker(uri, "topics-project", store.folder), caplog, "timed out")


def test_a_database_that_cannot_be_written(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    journal = store.folder / "mlflow.db-journal"
    journal.mkdir()  # SQLite wants a file of that name for every transaction
    tracker = store.tracker()
    check_out_of_reach(tracker, caplog, f"{store.uri}: Input/output error", "written")
    journal.rmdir()
    assert tracker.sync(snapshot(), final=True)
    assert store.front() == set(FRONT)


def test_pauses_grow_and_the_warning_comes_once(
    store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    tried = []

    def connect(self: Tracker) -> None:
        tried.append(now)
        raise OSError("no route to host")

    monkeypatch.setattr(mlflow_sync.time, "monotonic", lambda: now)
    tracker = store.tracker()
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "_connect", connect)
        for second in range(1000):
            now = float(second)
            assert not tracker.sync(snapshot())
        assert tried == [0, 10, 30, 70, 150, 310, 610, 910]
        assert len(caplog.records) == 1
        assert not tracker.sync(snapshot(), final=True)
        assert len(caplog.records) == 2
    now = 2000.0
    assert tracker.sync(snapshot())
    assert store.front() == set(FRONT)


# A server


@pytest.mark.slow
def test_a_server(store: Store) -> None:
    odd = trial(6, 0.3, 2)
    assert odd.measurement is not None
    values = {"accuracy": 0.3, "num_params": 300.0, "loss": nan}
    odd = replace(odd, measurement=replace(odd.measurement, values=values, losses=(1.0, nan)))
    with mlflow_server(store.uri, store.folder / "served") as uri:
        served = Store(store.folder, uri)
        tracker = served.tracker()
        assert tracker.sync(snapshot(TRIALS[:2]))
        assert tracker.sync(snapshot([*TRIALS, odd]), final=True)
        before = served.everything()
        assert tracker.sync(snapshot([*TRIALS, odd]), final=True)
        assert repr(served.everything()) == repr(before)
        assert served.front() == set(FRONT)
        assert isnan(served.child(6).data.metrics["metric/loss"])
        assert len(json.loads(served.artifact(served.parent(), "pareto/front.json"))) == len(FRONT)
        assert served.artifact(served.child(4), "architecture.json")
    assert (store.folder / "served").is_dir()
    assert not (store.folder / "mlartifacts").exists()


# Names of places


def test_uris_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///a/mlflow.db") == f"sqlite:///{tmp_path}/a/mlflow.db"
    assert absolute_uri("sqlite:////a/mlflow.db") == "sqlite:////a/mlflow.db"
    assert absolute_uri("http://server:5000") == "http://server:5000"


def test_the_command_that_opens_it() -> None:
    assert ui_command("sqlite:////a b/mlflow.db") == (
        "mlflow ui --backend-store-uri 'sqlite:////a b/mlflow.db' --port 5000"
    )
    assert ui_command("http://server:5000") == "python -m webbrowser http://server:5000"


def test_the_made_up_study_is_what_the_tests_take_it_for() -> None:
    assert {row.trial for row in snapshot().rows() if row.on_front} == set(FRONT)
