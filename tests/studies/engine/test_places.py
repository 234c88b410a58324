"""Where a study keeps its results: paths count from its file, and what is shared is locked and has one owner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autopeft.studies.config.loading import load_study
from autopeft.studies.config.source import StudyFileError
from autopeft.studies.engine.check import check
from autopeft.studies.engine.session import (
    is_running,
    open_ledger,
    open_study,
    read_snapshot,
    recorded_settings,
    was_started,
)
from autopeft.studies.errors import ConfigurationError

from ...support.slow import slow
from ...support.tiny_study import save_study
from .test_study import Quiet, run

SHORT = {"search": {"searcher": "random", "trials": 2, "batch": 2}, "finalists": {"seeds": 1, "most": 1}}


def problems(folder: Path, *overrides: str) -> str:
    with pytest.raises(StudyFileError) as caught:
        load_study(save_study(folder), overrides)
    return str(caught.value)


def test_all_paths_count_from_the_study_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_study(tmp_path / "study", storage="sqlite:///led.db", tracking={"uri": "sqlite:///ml/ml.db"})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    settings = load_study(path)
    assert settings.storage_url == f"sqlite:///{tmp_path}/study/led.db"
    assert settings.tracking_uri == f"sqlite:///{tmp_path}/study/ml/ml.db"
    other = load_study(path, ["storage=sqlite:////a/led.db", "tracking.uri=http://server:5000"])
    assert (other.storage_url, other.tracking_uri) == ("sqlite:////a/led.db", "http://server:5000")


@pytest.mark.parametrize("name", ["q?lr=1", slow("p%20x"), slow("a{b}")])
def test_a_folder_that_no_database_can_be_in_is_refused(tmp_path: Path, name: str) -> None:
    assert "study.yaml:" in (said := problems(tmp_path / name))
    assert "output: no database can be opened in" in said
    path = save_study(tmp_path / "study", output=str(tmp_path / name / "runs"))
    with pytest.raises(StudyFileError, match="no database can be opened"):
        load_study(path)
    overrides = ["storage=sqlite:///led.db", "tracking.enabled=false", "search.searcher=random", "search.trials=1"]
    there = load_study(path, [*overrides, "finalists.seeds=1", "finalists.most=1"])
    assert there.output_folder == tmp_path / name / "runs", "without a database in it, it is only a folder"
    run(there)
    ledger = open_ledger(there)
    assert read_snapshot(recorded_settings(there, ledger), ledger).front().rows
    assert run(there, resume=True).study_id == ledger.study_id
    save_study(tmp_path / name, output=str(tmp_path / "out"))
    with pytest.raises(StudyFileError, match=r"storage: no database can be opened in .*: give an absolute path"):
        load_study(tmp_path / name, ["storage=sqlite:///led.db"])


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite+pysqlite://"])
def test_a_ledger_in_memory_is_refused(tmp_path: Path, url: str) -> None:
    assert "storage: a database in memory keeps nothing" in problems(tmp_path, f"storage='{url}'")


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("localhost:5000", "MLflow has no store for 'localhost'; a server is http://localhost:5000"),
        ("foo://x", "MLflow has no store for 'foo'"),
        ("htp://x", "MLflow has no store for 'htp'; did you mean 'http'?"),
        ("sqlite://", "a database in memory keeps nothing"),
    ],
)
def test_a_tracking_server_that_cannot_be_is_refused(tmp_path: Path, uri: str, said: str) -> None:
    assert said in problems(tmp_path, f"tracking.uri={uri}", "tracking.enabled=true")
    load_study(save_study(tmp_path), [f"tracking.uri={uri}", "tracking.enabled=false"])
    several = (
        "https://u:p@host/x",
        "mlruns",
        "file:mlruns",
        "postgresql+psycopg2://h/db",
        "./a:b",
        "/2024-01-01T10:00/x",
    )
    for fine in ("http://localhost:5000", "HTTP://host", *several):
        load_study(save_study(tmp_path), [f"tracking.uri={fine}", "tracking.enabled=true"])


def test_a_name_that_mlflow_does_not_take_is_refused(tmp_path: Path) -> None:
    said = "MLflow takes names of at most 500 characters, this has 501"
    found = problems(tmp_path, "tracking.enabled=true", f"tracking.experiment={'x' * 501}")
    assert f"tracking.experiment: {said}" in found
    assert f"study: {said}" in problems(tmp_path, "tracking.enabled=true", f"study={'x' * 501}")
    for fine in (f"tracking.experiment={'x' * 500}", f"study={'x' * 501}"):
        load_study(save_study(tmp_path), [fine, f"tracking.enabled={'true' if '.' in fine else 'false'}"])


@pytest.mark.parametrize("url", ["ledger.db", "postgresql://u:p@h:port/db"])
def test_what_is_no_url_is_refused(tmp_path: Path, url: str) -> None:
    assert "storage: is not the URL of a database" in problems(tmp_path, f"storage={url}")


def test_the_default_ledger_is_open_once_too(tmp_path: Path) -> None:
    path = save_study(tmp_path / "study", **SHORT)
    settings = load_study(path)
    splits, _, _ = check(settings)
    with open_study(settings, splits, resume=False):
        second = load_study(path, [f"storage=sqlite:///{settings.output_folder / 'ledger.db'}", "output=other"])
        with pytest.raises(ConfigurationError, match="another process"), open_study(second, splits, resume=True):
            pass


def test_one_storage_is_open_once(tmp_path: Path) -> None:
    """With another output folder, and through a link to the database."""
    storage = tmp_path / "shared.db"
    path = save_study(tmp_path / "study", storage=f"sqlite:///{storage}", **SHORT)
    settings = load_study(path, ["output=one"])
    (tmp_path / "link.db").symlink_to(storage)
    splits, _, _ = check(settings)
    with open_study(settings, splits, resume=False):
        for overrides in (["output=two"], ["output=three", f"storage=sqlite:///{tmp_path}/link.db"]):
            second = load_study(path, overrides)
            for resume in (True, False):
                refused = pytest.raises(ConfigurationError, match="another process is running")
                with refused, open_study(second, splits, resume=resume):
                    pass
            assert is_running(second)
        other = load_study(path, ["output=four", "study=other"])
        with open_study(other, splits, resume=False):
            pass  # another study in the same database does not wait
    assert not is_running(settings)
    with open_study(load_study(path, ["output=two"]), splits, resume=True) as loop:
        snapshot = loop.run(Quiet())
    assert len(snapshot.search_trials) == 2


@pytest.mark.slow
def test_one_output_folder_has_one_study(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/shared.db"
    path = save_study(tmp_path / "study", storage=storage, **SHORT)
    first, second = (load_study(path, [f"study={name}", "output=out"]) for name in ("one", "two"))
    run(first)
    kept = {file: file.read_bytes() for file in sorted(first.output_folder.rglob("*.safetensors"))}
    assert kept
    with pytest.raises(ConfigurationError, match="holds the results of another study"):
        run(second)
    assert not was_started(second)
    assert {file: file.read_bytes() for file in sorted(first.output_folder.rglob("*.safetensors"))} == kept
    run(load_study(path, ["study=two", "output=elsewhere"]))
    with pytest.raises(ConfigurationError, match="holds the results of another study"):
        run(second, resume=True)
    assert run(first, resume=True).study_id == open_ledger(first).study_id


def test_a_study_whose_output_folder_is_gone_goes_on(tmp_path: Path) -> None:
    path = save_study(tmp_path / "study", storage=f"sqlite:///{tmp_path}/led.db", **SHORT)
    settings = load_study(path)
    with pytest.raises(ConfigurationError, match="no study 'tiny' to resume"):
        run(settings, resume=True)
    with pytest.raises(KeyboardInterrupt):
        run(settings, watcher=Quiet(stop_after=1))
    for file in sorted(settings.output_folder.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    settings.output_folder.rmdir()
    assert len(run(settings, resume=True).search_trials) == 2


def test_nothing_outside_of_the_output_folder_is_written(tmp_path: Path) -> None:
    settings = load_study(save_study(tmp_path / "study", **SHORT))
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    settings.output_folder.mkdir(parents=True)
    (settings.output_folder / ".write-test").symlink_to(precious)
    run(settings)
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("split", ["validation", "test"])
def test_one_row_is_too_few_to_score(tmp_path: Path, split: str) -> None:
    settings = load_study(save_study(tmp_path / "study"))
    rows = tmp_path / "study" / f"{split}.jsonl"
    rows.write_text(rows.read_text().splitlines()[0] + "\n")
    with pytest.raises(StudyFileError, match=f"the {split} split has one row"):
        check(settings)
    assert json.loads(rows.read_text())
