"""The tracking store at its worst: half-made, begun by two at once, deleted, moved, slow, refused."""

from __future__ import annotations

import logging
import shutil
import socket
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from autopeft.studies.errors import ConfigurationError
from autopeft.studies.tracking import store, worker
from autopeft.studies.tracking.mlflow_sync import Tracker

from ...support.full_disk import full_from
from ...support.slow import mostly_slow, slow
from ...support.tracked_study import FRONT, TRIALS, snapshot

ALL = 1 + len(TRIALS)
LATER = "the missing data will be written later"


def runs(path: Path, study_id: str = "5d2f") -> list[Run]:
    client = MlflowClient(f"sqlite:///{path}")
    experiment = client.get_experiment_by_name("p")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], f"tags.`autopeft.study_id` = '{study_id}'"))


def change(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        for statement in statements:
            database.execute(statement)


# A database that is not whole


def half_made(path: Path) -> None:
    """As a process leaves it that is killed while MLflow brings its first tables up to date."""
    change(path, "DELETE FROM experiments", "DROP TABLE logged_models", "DROP TABLE webhooks",
           "UPDATE alembic_version SET version_num = '451aebb31d03'")  # fmt: skip


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def left_with_a_journal(path: Path) -> None:
    path.unlink()
    path.with_name("mlflow.db-journal").write_bytes(b"of a database that is gone" * 100)


@pytest.mark.parametrize("damage", mostly_slow((half_made, emptied, left_with_a_journal), left_with_a_journal))
def test_a_half_made_database_is_made_anew(empty_store: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = Path(shutil.copy(empty_store, tmp_path / "mlflow.db"))
    damage(path)
    tracker = Tracker(f"sqlite:///{path}", "p", tmp_path)
    tracker.begin()
    assert tracker.sync(snapshot(), final=True)
    assert len(runs(path)) == ALL
    assert not list(tmp_path.glob(".mlflow.db.?*[!k]")), "nothing is left beside it but the lock"


@pytest.mark.parametrize(
    ("statements", "said"),
    [
        (["UPDATE alembic_version SET version_num = '451aebb31d03'"], "out-of-date database schema"),
        (["ALTER TABLE experiments RENAME TO others", "DELETE FROM alembic_version",
          "INSERT INTO alembic_version VALUES ('v3.0.0.d')"], "locate revision"),
    ],
)  # fmt: skip
def test_a_database_that_holds_something_is_never_replaced(
    empty_store: Path, tmp_path: Path, statements: list[str], said: str
) -> None:
    path = Path(shutil.copy(empty_store, tmp_path / "mlflow.db"))
    change(path, *statements)
    table = "others" if "others" in statements[0] else "experiments"
    with pytest.raises(ConfigurationError, match=said):
        Tracker(f"sqlite:///{path}", "p", tmp_path).begin()
    with closing(sqlite3.connect(path)) as database:
        assert database.execute(f"SELECT count(*) FROM {table}").fetchone() == (1,)


def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_text("notes of mine, not a database" * 50)
    with pytest.raises(ConfigurationError, match=r"tracking.uri 'sqlite:.*file is not a database"):
        Tracker(f"sqlite:///{path}", "p", tmp_path).begin()
    assert path.read_text().startswith("notes of mine")


def test_a_database_is_not_there_until_it_is_whole(
    empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mlflow.db"

    def killed(temporary: Path) -> None:
        shutil.copy(empty_store, temporary)
        half_made(temporary)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "_make", killed)
        with pytest.raises(KeyboardInterrupt):
            Tracker(f"sqlite:///{path}", "p", tmp_path).begin()
    assert path.read_bytes() == b""
    assert Tracker(f"sqlite:///{path}", "p", tmp_path).sync(snapshot(), final=True)
    assert len(runs(path)) == ALL


def test_two_studies_begin_with_one_new_database(
    empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, made = tmp_path / "mlflow.db", []

    def slowly(temporary: Path) -> None:
        made.append(temporary)
        time.sleep(0.5)
        shutil.copy(empty_store, temporary)

    def study(name: str) -> None:
        with store._opening(f"sqlite:///{path}"), closing(sqlite3.connect(path)) as database:
            seen[name] = database.execute("SELECT count(*) FROM experiments").fetchone()

    seen: dict[str, object] = {}
    monkeypatch.setattr(store, "_make", slowly)
    both = [threading.Thread(target=study, args=(name,)) for name in ("one", "two")]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert seen == {"one": (1,), "two": (1,)}
    assert len(made) == 1


# A disk that fills up


@pytest.mark.slow
def test_a_full_disk_loses_nothing(empty_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def folder(name: str) -> tuple[str, Path]:
        (tmp_path / name).mkdir()
        shutil.copy(empty_store, tmp_path / name / "mlflow.db")
        return f"sqlite:///{tmp_path}/{name}/mlflow.db", tmp_path / name

    uri, place = folder("whole")
    with full_from(None) as writes:
        assert Tracker(uri, "p", place).sync(snapshot(), final=True)
    files = sorted(file.name for file in place.rglob("*") if file.is_file())
    assert len(files) > 10
    for at in range(0, len(writes), len(writes) // 8):
        uri, place = folder(str(at))
        tracker = Tracker(uri, "p", place)
        caplog.clear()
        with full_from(at):
            assert not tracker.sync(snapshot())
        *_, record = caplog.records  # before it, one on the report's files may stand
        assert "No space left on device" in record.getMessage(), writes[at]
        assert "MLflow cannot be written (" in record.getMessage()
        assert tempfile.gettempdir() in record.getMessage(), f"the file of {writes[at]}"
        assert tracker.sync(snapshot(), final=True)
        assert len(runs(place / "mlflow.db")) == ALL
        assert {run.info.status for run in runs(place / "mlflow.db")} == {"FINISHED", "FAILED"}
        assert sorted(file.name for file in place.rglob("*") if file.is_file()) == files


# An experiment that was deleted


def test_a_deleted_experiment_is_told_at_once(
    empty_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(shutil.copy(empty_store, tmp_path / "mlflow.db"))
    client = MlflowClient(f"sqlite:///{path}")
    tracker = Tracker(f"sqlite:///{path}", "p", tmp_path)
    assert tracker.sync(snapshot(TRIALS[:3]))
    experiment = client.get_experiment_by_name("p").experiment_id
    client.delete_experiment(experiment)
    said = f"'p' was deleted in MLflow.*experiments restore --experiment-id {experiment}.*or set tracking.experiment to"
    with pytest.raises(ConfigurationError, match=f"tracking.experiment: {said}"):
        Tracker(f"sqlite:///{path}", "p", tmp_path).begin()
    assert not tracker.sync(snapshot())
    (record,) = caplog.records
    assert LATER not in record.getMessage()
    assert "once this is mended, `autopeft resume` writes" in record.getMessage()
    client.restore_experiment(experiment)
    resumed = Tracker(f"sqlite:///{path}", "p", tmp_path)
    resumed.begin()
    assert resumed.sync(snapshot(), final=True)
    assert len(runs(path)) == ALL


# Folders that move


def places(path: Path, study_id: str = "5d2f") -> set[Path]:
    found = set()
    for run in runs(path, study_id):
        folder = Path(run.info.artifact_uri.removeprefix("file://"))
        assert any(folder.iterdir()), "the artifacts are where MLflow looks for them"
        found.add(folder.parent.parent)
    return found


@pytest.fixture
def study(empty_store: Path, tmp_path: Path) -> Path:
    """A folder with a study that MLflow has the first trials of."""
    folder = tmp_path / "study"
    folder.mkdir()
    shutil.copy(empty_store, folder / "mlflow.db")
    assert Tracker(f"sqlite:///{folder}/mlflow.db", "p", folder).sync(snapshot(TRIALS[:3]), final=True)
    assert places(folder / "mlflow.db") == {folder / "mlartifacts"}
    return folder


@pytest.mark.parametrize("in_its_place", [None, slow("file")])
def test_artifacts_move_with_the_study(study: Path, tmp_path: Path, in_its_place: str | None) -> None:
    moved = study.rename(tmp_path / "moved")
    if in_its_place:
        study.touch()
    assert Tracker(f"sqlite:///{moved}/mlflow.db", "p", moved).sync(snapshot(), final=True)
    assert places(moved / "mlflow.db") == {moved / "mlartifacts"}
    assert len(runs(moved / "mlflow.db")) == ALL
    assert study.is_file() if in_its_place else not study.exists()


@pytest.mark.slow
def test_a_copy_of_a_study_leaves_the_original_alone(study: Path, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in study.rglob("*") if file.is_file()}
    copy = Path(shutil.copytree(study, tmp_path / "copy"))
    assert Tracker(f"sqlite:///{copy}/mlflow.db", "p", copy).sync(snapshot(), final=True)
    assert places(copy / "mlflow.db") == {copy / "mlartifacts"}
    assert {file: file.read_bytes() for file in study.rglob("*") if file.is_file()} == before


@pytest.mark.slow
def test_studies_that_share_an_experiment_keep_their_artifacts_apart(study: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    uri = f"sqlite:///{study}/mlflow.db"
    assert Tracker(uri, "p", other).sync(snapshot(study_id="second"), final=True)
    assert places(study / "mlflow.db", "second") == {other / "mlartifacts"}
    assert places(study / "mlflow.db") == {study / "mlartifacts"}


# Servers


@contextmanager
def server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that answers each connection so, in a thread."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        done = threading.Event()

        def one(connection: socket.socket) -> None:
            with connection:
                try:
                    answer(connection)
                except OSError:
                    return

        def serve() -> None:
            listening.settimeout(0.1)
            while not done.is_set():
                try:
                    connection, _ = listening.accept()
                except TimeoutError:
                    continue
                threading.Thread(target=one, args=(connection,), daemon=True).start()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            done.set()
            thread.join()


def a_byte_at_a_time(
    connection: socket.socket,
    opening: bytes = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n",
) -> None:
    connection.recv(65536)
    connection.sendall(opening)
    for _ in range(900):
        connection.sendall(b" ")
        time.sleep(0.2)


def headers_a_byte_at_a_time(connection: socket.socket) -> None:
    a_byte_at_a_time(connection, b"HTTP/1.1 200 OK\r\nX: ")


def never(connection: socket.socket) -> None:
    time.sleep(30)


@pytest.mark.parametrize("answer", [slow(a_byte_at_a_time), slow(headers_a_byte_at_a_time), never])
def test_a_slow_server_does_not_hold_up_a_study(
    empty_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    answer: Callable[[socket.socket], None],
) -> None:
    monkeypatch.setattr(worker, "PATIENCE_S", 0.5)
    monkeypatch.setattr(worker, "CALL_S", 1.0)
    with server(answer) as uri:
        tracker = Tracker(uri, "p", tmp_path)
        began = time.monotonic()
        tracker.begin()
        assert time.monotonic() - began < 30, "MLflow may have to be imported"
        assert len(caplog.records) == 1
        assert LATER in caplog.records[0].getMessage()
        began = time.monotonic()
        for _ in range(50):  # it pauses, and does not wait each time
            assert not tracker.sync(snapshot())
        assert not tracker.sync(snapshot(), final=True)
        assert time.monotonic() - began < 30
    assert "`autopeft resume` writes the missing data" in caplog.records[-1].getMessage()
    path = Path(shutil.copy(empty_store, tmp_path / "mlflow.db"))
    resumed = Tracker(f"sqlite:///{path}", "p", tmp_path)
    assert resumed.sync(snapshot(), final=True)
    assert {int(r.data.tags["autopeft.trial"]) for r in runs(path) if "autopeft.pareto" in r.data.tags} >= set(FRONT)
    assert len(runs(path)) == ALL


def test_a_sync_that_takes_long_goes_on_beside_the_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "PATIENCE_S", 0.1)
    monkeypatch.setattr(worker, "CALL_S", 0.3)
    done, go_on, threads = [], threading.Event(), worker.Worker()

    def slow() -> None:
        go_on.wait()
        done.append("slow")

    for _ in range(2):  # the second is not begun while the first goes on
        with pytest.raises(TimeoutError):
            threads.do(slow)
    go_on.set()
    threads.do(lambda: done.append("next"), last=True)
    assert done == ["slow", "next"]
    with pytest.raises(ZeroDivisionError):
        threads.do(lambda: 1 / 0)


def test_nothing_is_written_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that wakes up later gets no call of a study that has ended: another process may write by then."""
    monkeypatch.setattr(worker, "CALL_S", 0.3)
    go_on, calls, ended, threads = threading.Event(), [], threading.Event(), worker.Worker()

    def write() -> None:
        try:
            threads.call(go_on.wait)
            threads.call(calls.append, "late")
        finally:
            ended.set()

    with pytest.raises(TimeoutError):
        threads.do(write, last=True)
    go_on.set()
    ended.wait()
    assert calls == []


def test_a_last_sync_may_take_long_while_its_calls_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "CALL_S", 1.0)
    calls, threads = [], worker.Worker()

    def write() -> None:
        for number in range(8):
            threads.call(time.sleep, 0.25)
            calls.append(number)

    threads.do(write, last=True)
    assert calls == list(range(8))


def answering(status: str, body: str) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.recv(65536)
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        connection.sendall((head + body).encode())

    return answer


@pytest.mark.parametrize(
    ("status", "body"),
    [
        ("401 Unauthorized", "no"),
        ("403 Forbidden", '{"error_code": "PERMISSION_DENIED", "message": "not you"}'),
        ("404 Not Found", "<html>no such page</html>"),
        ("200 OK", "<html>another server</html>"),
        ("400 Bad Request", '{"error_code": "INVALID_PARAMETER_VALUE", "message": "no"}'),
    ],
)
def test_what_can_never_work_is_refused_at_the_start(tmp_path: Path, status: str, body: str) -> None:
    with server(answering(status, body)) as uri, pytest.raises(ConfigurationError) as refused:
        Tracker(uri.replace("http://", "http://me:secret@"), "p", tmp_path).begin()
    assert "tracking.uri 'http://me:***@127.0.0.1" in str(refused.value)
    assert "--set tracking.enabled=false" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("status", ["500 Internal Server Error", "503 Service Unavailable", "429 Too Many Requests"])
def test_what_is_of_the_moment_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture, status: str) -> None:
    with server(answering(status, "later")) as uri:
        Tracker(uri, "p", tmp_path).begin()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert LATER in record.getMessage()


def test_a_place_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for uri, said in (
        (f"sqlite:///{tmp_path}/file/mlflow.db", "File exists"),
        (f"sqlite:///{tmp_path}", "unable to open database file"),
        (f"{tmp_path}/mlruns", "maintenance mode"),
        ("postgresql+nodriver://h/db", "nodriver"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            Tracker(uri, "p", tmp_path).begin()
