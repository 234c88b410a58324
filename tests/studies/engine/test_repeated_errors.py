"""Trainings that keep failing with the same error stop the study; what a candidate itself causes does not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from autopeft.evaluators.training import packed
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.evaluators.training.record import TrainingFailedError
from autopeft.search_space.metrics import MetricError
from autopeft.studies.config.loading import load_study
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.session import open_ledger, read_snapshot
from autopeft.studies.errors import NoFeasibleCandidateError, RepeatedError

from ...support.tiny_study import save_study
from .test_study import Quiet, run

SPACE = {"adapters": {"lora": {"at": ["attn.q"], "rank": [1, 2, 4]}, "scales": {"kind": "norm", "placement": "layer"}}}
CHANGES: dict[str, Any] = {
    "space": SPACE,
    "training": {"learning_rate": 1.0e-2, "epochs": 1, "batch_size": 8},
    "search": {"searcher": "random", "trials": 8, "batch": 2},
    "baselines": {"names": ["lora-r8-qv"], "learning_rates": [1.0e-2]},
    "finalists": {"seeds": 1, "most": 1},
}
steps_of = packed.PackedEvaluator._steps_of


def breaking(monkeypatch: pytest.MonkeyPatch, error: type[Exception], *kinds: str, most: int = 99) -> list[int]:
    """Let the training of candidates with one of `kinds` (default: all) fail, the first `most` of them."""
    failed: list[int] = []

    def steps(self: PackedEvaluator, pack: Sequence[Any], *rest: Any) -> Any:
        broken = [run for run in pack if not kinds or set(kinds) & set(run.request.candidate.architecture.kinds)]
        if broken and len(failed) < most:
            if len(pack) == 1:
                failed.append(len(failed))
            # Numbers differ from candidate to candidate: a layer, a size.
            raise error(f"no kernel for {40 + len(failed)} features")
        return steps_of(self, pack, *rest)

    monkeypatch.setattr(packed.PackedEvaluator, "_steps_of", steps)
    return failed


def in_ledger(settings: StudyFile) -> dict[int, str]:
    return {trial.number: trial.state for trial in read_snapshot(settings, open_ledger(settings)).trials}


def test_an_error_of_an_adapter_type_stops_and_resume_trains_its_candidates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    path = save_study(tmp_path / "study", **{**CHANGES, "tracking": {"enabled": True, "uri": uri}})
    settings = load_study(path)
    breaking(monkeypatch, RuntimeError, "norm")
    watcher = Quiet()
    with pytest.raises(RepeatedError) as caught:
        run(settings, watcher=watcher)
    text = str(caught.value)
    assert "3 trainings failed with the same error: RuntimeError: no kernel for 43 features" in text
    assert "all of them have norm, and no training that succeeded has it" in text
    assert "`autopeft resume`" in text
    failed = {trial.number for trial in watcher.ended if trial.state == "failed"}
    assert len(failed) == 3
    states = in_ledger(settings)
    assert {states[number] for number in failed} == {"running"}
    kept = {number for number, state in states.items() if state == "complete"}
    assert kept, "the baseline"

    monkeypatch.undo()
    again = Quiet()
    snapshot = run(settings, resume=True, watcher=again)
    assert "failed" not in in_ledger(settings).values()
    assert failed <= {trial.number for trial in again.ended}
    assert not kept & {trial.number for trial in again.ended}
    assert sum(trial.state == "complete" for trial in snapshot.search_trials) == 8

    from mlflow import MlflowClient

    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert {one.info.status for one in runs} == {"FINISHED"}


def test_an_error_of_all_candidates_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_study(save_study(tmp_path / "study", **CHANGES))
    breaking(monkeypatch, KeyError)
    with pytest.raises(RepeatedError, match="no training has succeeded"):
        run(settings)


@pytest.mark.slow
def test_a_few_failures_are_recorded_and_stop_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_study(save_study(tmp_path / "study", **CHANGES))
    failed = breaking(monkeypatch, RuntimeError, "norm", most=2)
    snapshot = run(settings)
    assert len(failed) == 2
    assert sum(trial.state == "failed" for trial in snapshot.search_trials) == 2
    assert sorted(in_ledger(settings).values()).count("failed") == 2


@pytest.mark.parametrize("error", [TrainingFailedError, MetricError])
def test_what_a_candidate_causes_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """A loss that is not finite, or a metric that is undefined for some predictions, as long as others succeed."""
    settings = load_study(save_study(tmp_path / "study", **CHANGES))
    failed = breaking(monkeypatch, error, "norm")
    snapshot = run(settings)
    assert len(failed) >= 3
    assert sum(trial.state == "failed" for trial in snapshot.search_trials) == len(failed)


def test_all_losses_may_diverge_but_not_all_metrics_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, TrainingFailedError)
    with pytest.raises(NoFeasibleCandidateError, match="no kernel"):
        run(load_study(save_study(tmp_path / "losses", **CHANGES)))
    monkeypatch.undo()
    breaking(monkeypatch, MetricError)
    with pytest.raises(RepeatedError, match="no training has succeeded"):
        run(load_study(save_study(tmp_path / "metrics", **CHANGES)))
