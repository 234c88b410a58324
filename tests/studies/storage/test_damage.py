"""Ledgers with records of newer versions or damaged ones: the former are refused, the latter left out and named."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autopeft.studies.analysis.outlook import Outlook
from autopeft.studies.cli import app as cli
from autopeft.studies.config.loading import load_study
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.session import open_ledger
from autopeft.studies.errors import ConfigurationError
from autopeft.studies.storage import ledger as module
from autopeft.studies.storage.ledger import Ledger
from autopeft.studies.storage.records import pack

from ...support.slow import mostly_slow
from ...support.tiny_study import save_study
from ..engine.test_study import run

NEWER = "made by a newer version of autopeft: upgrade"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "study"
    short = {"search": {"searcher": "bo", "trials": 4, "batch": 2}, "finalists": {"seeds": 2, "most": 1}}
    run(load_study(save_study(folder, **short)))
    return folder


@pytest.fixture
def settings(finished: Path, tmp_path: Path) -> StudyFile:
    return load_study(shutil.copytree(finished, tmp_path / "study"))


def edit(settings: StudyFile, table: str, key: str, number: int | None, change: Callable[[Any], str]) -> None:
    """Change the text of an attribute: of trial `number`, or of the study."""
    with sqlite3.connect(settings.output_folder / "ledger.db") as ledger:
        where, values = "key = ?", [key]
        if number is not None:
            where += " and trial_id = (select trial_id from trials where number = ?)"
            values += [str(number)]
        [(text,)] = ledger.execute(f"select value_json from {table} where {where}", values).fetchall()
        ledger.execute(f"update {table} set value_json = ? where {where}", [change(json.loads(text)), *values])
    ledger.close()


def command(capsys: pytest.CaptureFixture[str], name: str, settings: StudyFile, *more: str) -> tuple[str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, str(settings.folder), *more])
    out, err = capsys.readouterr()
    assert ended.value.code == 0, err
    return out, err


def searched(settings: StudyFile) -> int:
    return next(t.number for t in open_ledger(settings).trials() if t.role.kind == "search" and t.state == "complete")


def test_a_newer_ledger_is_refused(settings: StudyFile, capsys: pytest.CaptureFixture[str]) -> None:
    edit(settings, "study_user_attributes", module.VERSION, None, lambda version: json.dumps(version + 1))
    with pytest.raises(ConfigurationError, match=NEWER):
        open_ledger(settings)
    for name in ("status", "pareto", "export", "resume"):
        with pytest.raises(SystemExit) as ended:
            cli.main([name, str(settings.folder)])
        assert ended.value.code == 2
        assert NEWER in (err := capsys.readouterr().err)
        assert "Error:" not in err


def with_measurement(result: Any, **changes: object) -> str:
    return json.dumps({**result, "measurement": {**result["measurement"], **changes}})


def in_adapter(declared: Any) -> str:
    site = next(iter(declared["candidate"]["architecture"]))
    declared["candidate"]["architecture"][site][0]["brand_new"] = 1
    return json.dumps(declared)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        (module.TRIAL, lambda declared: json.dumps({**declared, "brand_new": 1})),
        (module.TRIAL, in_adapter),
        (module.RESULT, lambda result: json.dumps({**result, "brand_new": 1})),
        (module.RESULT, lambda result: with_measurement(result, brand_new=1)),
    ],
)
def test_unknown_fields_of_a_trial_are_of_a_newer_version(
    settings: StudyFile, key: str, change: Callable[[Any], str]
) -> None:
    edit(settings, "trial_user_attributes", key, searched(settings), change)
    with pytest.raises(ConfigurationError, match=f"{NEWER}.*'brand_new'"):
        open_ledger(settings).trials()


@pytest.mark.parametrize(
    ("key", "read", "change"),
    [
        (module.BACKBONE, lambda ledger: ledger.backbone, lambda found: json.dumps({**found, "brand_new": 1})),
        (module.HEAD, lambda ledger: ledger.head_sites, lambda found: json.dumps([{**found[0], "brand_new": 1}])),
        (module.PRIOR_TRIALS, lambda ledger: ledger.prior_trials, lambda found: json.dumps(pack([PRIOR]))),
        (module.OUTLOOK, lambda ledger: Outlook.read(ledger.outlook), lambda found: json.dumps({"brand_new": 1})),
    ],
)
def test_unknown_fields_of_a_study_are_of_a_newer_version(
    settings: StudyFile, key: str, read: Callable[[Ledger], object], change: Callable[[Any], str]
) -> None:
    edit(settings, "study_user_attributes", key, None, change)
    with pytest.raises(ConfigurationError, match=f"{NEWER}.*'brand_new'"):
        read(open_ledger(settings))


PRIOR = {
    "number": 1,
    "role": "search",
    "candidate": {"architecture": {}, "training": {}},
    "genes": {},
    "values": {},
    "std_err": {},
    "brand_new": 1,
}

DAMAGED: dict[str, tuple[str, Callable[[Any], str], str]] = {
    "not JSON": (module.RESULT, lambda found: '{"state": "comp', "its record is not JSON"),
    "cut": (
        module.RESULT,
        lambda r: with_measurement(r, per_example=r["measurement"]["per_example"][:-9]),
        "its record cannot be read",
    ),
    "no number": (
        module.RESULT,
        lambda r: with_measurement(r, values={"accuracy": "much"}),
        "its record cannot be read: ValueError",
    ),
    "no result": (module.RESULT, lambda found: "{}", "its result is missing"),
    "no candidate": (module.TRIAL, lambda found: json.dumps({"role": "search"}), "KeyError: 'candidate'"),
    "fewer rows": (
        module.RESULT,
        lambda r: with_measurement(r, per_example=pack({"accuracy": [1.0, 0.0]})),
        "it has scores of 2 validation rows, the others of 30",
    ),
}


@pytest.mark.parametrize("what", mostly_slow(DAMAGED, "not JSON", "fewer rows"))
def test_a_damaged_trial_is_left_out_and_named(
    what: str, settings: StudyFile, capsys: pytest.CaptureFixture[str]
) -> None:
    key, change, said = DAMAGED[what]
    number, before = searched(settings), len(open_ledger(settings).trials())
    edit(settings, "trial_user_attributes", key, number, change)
    assert said in open_ledger(settings).readable()[1][number]
    assert f"left out     trial {number}: " in command(capsys, "status", settings)[0]
    assert str(number) in json.loads(command(capsys, "status", settings, "--json")[0])["left_out"]
    note = f"Left out: trial {number}: "
    assert note in command(capsys, "pareto", settings)[0]
    out, err = command(capsys, "pareto", settings, "--json")
    assert note in err
    assert all(row["trial"] != number for row in json.loads(out))
    assert note in command(capsys, "export", settings)[1]
    assert len(open_ledger(settings).trials()) < before


@pytest.mark.parametrize("what", ["not JSON", "fewer rows"])
def test_a_study_with_a_damaged_trial_goes_on(what: str, settings: StudyFile) -> None:
    """It trains another one in its place."""
    key, change, _ = DAMAGED[what]
    number = searched(settings)
    edit(settings, "trial_user_attributes", key, number, change)
    snapshot = run(settings, resume=True)
    complete = [trial for trial in snapshot.search_trials if trial.state == "complete"]
    assert len(complete) == settings.search.trials
    assert number not in {trial.number for trial in snapshot.trials}
    assert number in snapshot.left_out
    assert snapshot.front().members
    again = open_ledger(settings)
    assert {trial.number for trial in again.trials()} == {trial.number for trial in snapshot.trials}
