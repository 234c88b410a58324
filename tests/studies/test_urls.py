"""Passwords are in no message, ledger or report."""

from __future__ import annotations

from pathlib import Path

import pytest

from autopeft.studies.config.loading import load_study
from autopeft.studies.engine.check import check
from autopeft.studies.engine.session import open_ledger, open_study, recorded_settings
from autopeft.studies.errors import UserError
from autopeft.studies.storage.ledger import Ledger
from autopeft.studies.tracking.uri import ui_command
from autopeft.studies.urls import keeps_nothing, located, without_password

from ..support.tiny_study import save_study


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:s3cret@host:5432/db", "postgresql://me:***@host:5432/db"),
        ("postgresql+psycopg2://me:s3:c?r%2Ft@host/db", "postgresql+psycopg2://me:***@host/db"),
        ("https://me:s3cret@host/path", "https://me:***@host/path"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("sqlite:////folder/a@b.db", "sqlite:////folder/a@b.db"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("http://me:s3@cret@host", "http://me:***@host"),
        ("postgresql://me:s3/cret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://host/db?user=me&password=s3cret&x=1", "postgresql://host/db?user=me&password=***&x=1"),
        ("mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3Ds3cret", "mssql+pyodbc:///?odbc_connect=***"),
        ("storage=postgresql://me:s3cret@host/db", "storage=postgresql://me:***@host/db"),
    ],
)
def test_a_password_is_not_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown


@pytest.mark.parametrize(
    ("uri", "found"),
    [
        ("sqlite:///led.db", "sqlite:////here/led.db"),
        ("sqlite+pysqlite:///a/led.db", "sqlite+pysqlite:////here/a/led.db"),
        ("sqlite:////a/led.db", "sqlite:////a/led.db"),
        ("sqlite:///file:/d/led.db?nolock=1&uri=true", "sqlite:///file:/d/led.db?nolock=1&uri=true"),
        ("sqlite:///~/led.db", f"sqlite:///{Path.home()}/led.db"),
        ("mlruns", "/here/mlruns"),
        ("file:mlruns", "file:/here/mlruns"),
        ("file:///mlruns", "file:///mlruns"),
        ("http://host:5000", "http://host:5000"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
    ],
)
def test_where_a_uri_is(uri: str, found: str) -> None:
    assert located(uri, Path("/here")) == found


@pytest.mark.parametrize(
    ("url", "nothing"),
    [
        ("sqlite://", True), ("sqlite:///:memory:", True), ("sqlite:///:memory:?cache=shared", True),
        ("sqlite:///file::memory:?uri=true", True), ("sqlite:///file:x?mode=memory&uri=true", True),
        ("sqlite:///led.db", False), ("postgresql://host", False),
    ],
)  # fmt: skip
def test_what_keeps_nothing(url: str, nothing: bool) -> None:
    assert keeps_nothing(url) == nothing


@pytest.mark.parametrize(
    "url", ["nothing://me:s3cret@host/db", "postgresql+nodriver://me:s3cret@host/db", "a b://me:s3cret@h"]
)
def test_messages_of_a_storage_that_cannot_be(url: str) -> None:
    with pytest.raises(UserError) as caught:
        Ledger.names(url)
    assert "s3cret" not in str(caught.value)


def test_nothing_recorded_has_a_password_and_present_places_count(tmp_path: Path) -> None:
    tracking = {"enabled": True, "uri": "http://me:s3cret@127.0.0.1:9/x"}
    path = save_study(
        tmp_path, storage="sqlite:///led.db", tracking=tracking, search={"searcher": "random", "trials": 1}
    )
    settings = load_study(path)
    splits, _, _ = check(settings)
    with open_study(settings, splits, resume=False):
        ledger = open_ledger(settings)
        assert "s3cret" not in ledger.settings
        elsewhere = load_study(path, ["tracking.uri=http://other:5000", "output=moved"])
        found = recorded_settings(elsewhere, ledger)
        assert (found.tracking_uri, found.storage_url) == ("http://other:5000", settings.storage_url)
        assert found.output_folder == tmp_path / "moved"
    assert "s3cret" not in (tmp_path / "led.db").read_bytes().decode("latin-1")
    assert "s3cret" not in ui_command(settings.tracking_uri)
