"""`autopeft.Study(metric=...)`: a function, an object or a name, and what other processes see of it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from autopeft.search_space.metrics import QUALITIES, OverSet, PerExample
from autopeft.studies.config.loading import load_study
from autopeft.studies.config.source import StudyFileError
from autopeft.studies.notebook.study import Study

from ...support.tiny_study import save_data, save_model, settings

if TYPE_CHECKING:
    from autopeft.search_space.metrics.base import Indices

MODULE = "def half(targets, predictions):\n    return (targets == predictions).mean() / 2\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Share(OverSet):
    """The share of correct predictions."""

    name: str = "share"
    unit: str = "share"
    maximise: bool = True
    summary: str = "correct predictions"

    def of(self, targets: Indices, predictions: Indices) -> float:
        return float(np.mean(targets == predictions))


def declared(**arguments: Any) -> Study:
    return Study(**{"space": {"adapters": {"lora": {"rank": [1, 2]}}}, **arguments})


def names(study: Study) -> list[str]:
    return [objective.name for objective in study.settings.objectives]


@pytest.fixture
def registered() -> Iterator[None]:
    yield
    if "share" in QUALITIES:
        del QUALITIES["share"]


def test_a_name_goes_first_among_the_objectives() -> None:
    assert names(declared(metric="macro-f1")) == ["macro-f1", "num_params"]
    assert names(declared(metric="macro-f1", objectives=["accuracy", "latency_s"])) == [
        "macro-f1", "accuracy", "latency_s"
    ]  # fmt: skip
    assert names(declared(metric="loss", objectives=["accuracy", "loss"])) == ["accuracy", "loss"]


def test_a_function_of_a_module_is_recorded_by_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    half = importlib.import_module("half_module").half
    study = declared(metric=half)
    assert names(study) == ["half", "num_params"]
    assert study.settings.metrics == {"half": "half_module:half"}
    study = declared(metrics={"mine": half}, objectives=[{"name": "mine", "direction": "minimise"}, "num_params"])
    assert study.settings.metrics == {"mine": "half_module:half"}
    assert not study.settings.own_metrics()["mine"].maximise


@pytest.mark.usefixtures("registered")
def test_an_object_is_registered_in_this_process() -> None:
    for _ in range(2):  # as a cell that runs again
        study = declared(metric=Share())
        assert names(study) == ["share", "num_params"]
        assert Share() in study.settings.qualities()
    with pytest.raises(StudyFileError, match="metric: 'accuracy' is already a metric"):
        declared(metric=PerExample(name="accuracy", unit="", maximise=False, summary="another"))


@pytest.mark.parametrize("metric", [lambda targets, predictions: 1.0, 7])
def test_what_cannot_be_recorded(metric: Any) -> None:
    with pytest.raises(StudyFileError, match=r"^metric: (.* cannot be imported by its name|must be a function)"):
        declared(metric=metric)


def test_a_function_of_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(targets: Indices, predictions: Indices) -> float:
        return 2 * float(np.mean(targets == predictions))

    twice.__module__, twice.__qualname__ = "__main__", "twice"
    monkeypatch.setattr(sys.modules["__main__"], "twice", twice, raising=False)
    model = save_model(tmp_path / "model")
    save_data(tmp_path)
    like = {key: settings()[key] for key in ("baselines", "finalists", "tracking", "device", "space", "training")}
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")}
    data = {"source": "files", **files, "max_length": 16}
    study = Study(model, data, metric=twice, trials=1, folder=tmp_path / "study", **like)
    result = study.run(progress=False)
    values = result.candidates[0].values
    assert values["twice"] == pytest.approx(2 * values["accuracy"])
    recorded = load_study(tmp_path / "study")
    assert recorded.metrics == {"twice": "__main__:twice"}, "as it is: no other process has it"
    monkeypatch.undo()
    with pytest.raises(StudyFileError, match=r"metrics\.twice: the function twice was defined in a notebook"):
        Study.load(tmp_path / "study").run(progress=False)
