"""Files and folders are written whole or not at all."""

import errno
import os
import signal
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import matplotlib.figure
import pytest
import torch
from safetensors.torch import save_file

from autopeft.evaluators.atomic import atomic_folder, atomic_write, atomic_write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_file_appears_at_the_end_of_the_block(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    with atomic_write(path) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    atomic_write_text(path, "newer")
    assert path.read_text() == "newer"
    assert names(tmp_path) == ["found.json"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()])
@pytest.mark.parametrize("old", ["the old one", None])
def test_a_failure_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, error: BaseException, old: str | None
) -> None:
    path = tmp_path / "found.json"
    if old is not None:
        path.write_text(old)
    with pytest.raises(type(error)) as raised, atomic_write(path) as temporary:
        temporary.write_text("a part")
        raise error
    assert raised.value is error
    assert [file.read_text() for file in tmp_path.iterdir()] == ([] if old is None else [old])


def test_a_failing_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_write_text(tmp_path / "found.json", "the old one")

    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        atomic_write_text(tmp_path / "found.json", "new")
    assert names(tmp_path) == ["found.json"]
    assert (tmp_path / "found.json").read_text() == "the old one"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "found.json", "the old one")
    with pytest.raises(OSError, match="No space left"), atomic_write(tmp_path / "found.json") as temporary:
        temporary.unlink()
        temporary.symlink_to("/dev/full")
        temporary.write_text("new")
    assert names(tmp_path) == ["found.json"]
    assert (tmp_path / "found.json").read_text() == "the old one"


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "found.json"
    with pytest.raises(FileNotFoundError) as raised:
        atomic_write_text(path, "new")
    assert raised.value.filename == str(path)


def test_concurrent_writers_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "found.txt"
    wholes = [str(writer) * 200_000 for writer in range(6)]
    atomic_write_text(path, wholes[0])
    done = threading.Event()
    seen: set[str] = set()

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=atomic_write_text, args=(path, whole)) for whole in wholes for _ in range(3)]
    reader.start()
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    done.set()
    reader.join()
    assert {*seen, path.read_text()} <= {*wholes}
    assert names(tmp_path) == ["found.txt"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("before", [None, 0o600, 0o664])
def test_permissions_are_those_that_open_gives(tmp_path: Path, umask: int, before: int | None) -> None:
    def save_picture(path: Path) -> None:
        matplotlib.figure.Figure().savefig(path, format="png")

    writers = {
        "text": lambda path: path.write_text("new"),
        "tensors": lambda path: save_file({"x": torch.zeros(1)}, path),
        "torch": lambda path: torch.save({}, path),
        "picture": save_picture,
    }
    old = os.umask(umask)
    try:
        for name, save in writers.items():
            plain, atomic = tmp_path / f"{name}.plain", tmp_path / f"{name}.atomic"
            for path in (plain, atomic):
                if before is not None:
                    path.touch()
                    path.chmod(before)
            plain.open("w").close()
            with atomic_write(atomic) as temporary:
                save(temporary)
            assert stat.S_IMODE(atomic.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode), name
    finally:
        os.umask(old)


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    atomic_write_text(tmp_path / "disk" / "found.json", "the old one")
    (tmp_path / "link.json").symlink_to(tmp_path / "disk" / "found.json")
    atomic_write_text(tmp_path / "link.json", "new")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "disk" / "found.json").read_text() == "new"
    assert names(tmp_path / "disk") == ["found.json"]


# Folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "export"
    with atomic_folder(path) as temporary:
        (temporary / "old").write_text("old")
        assert not path.exists()
    return path


def test_a_folder_is_replaced_whole(folder: Path) -> None:
    with atomic_folder(folder) as temporary:
        (temporary / "new").write_text("new")
        assert names(folder) == ["old"]
    assert names(folder) == ["new"]
    assert names(folder.parent) == ["export"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_folder(folder: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), atomic_folder(folder) as temporary:
        (temporary / "new").write_text("a part")
        raise error
    assert names(folder) == ["old"]
    assert names(folder.parent) == ["export"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_failing_rename_leaves_the_old_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    rename, renamed = Path.rename, []

    def fail_second(self: Path, target: Path) -> Path:
        renamed.append(self)
        if len(renamed) == 2:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_second)
    with pytest.raises(type(error)), atomic_folder(folder) as temporary:
        (temporary / "new").write_text("new")
    assert names(folder) == ["old"]
    assert names(folder.parent) == ["export"]


def killed(work: Callable[[], None]) -> None:
    """Run `work` in a process that SIGKILL ends within it."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_killed_processes_left_is_removed_by_the_next_write(tmp_path: Path) -> None:
    path, export = tmp_path / "found [1].json", tmp_path / "export"

    def file() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("a part")
            die()

    def folder() -> None:
        with atomic_folder(export) as temporary:
            (temporary / "new").write_text("a part")
            die()

    killed(file)
    killed(folder)
    assert len(names(tmp_path)) == 2, "each left something"
    with atomic_write(path) as mine:
        atomic_write_text(path, "of another one, meanwhile")
        assert mine.exists(), "a living writer keeps its file"
        mine.write_text("whole")
    with atomic_folder(export) as temporary:
        (temporary / "new").write_text("whole")
    assert names(tmp_path) == ["export", "found [1].json"]
    assert path.read_text() == "whole"


def test_a_folder_whose_replacement_was_killed_comes_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def once(self: Path, target: Path) -> None:
        rename(self, target)
        die()

    def replace() -> None:
        monkeypatch.setattr(Path, "rename", once)
        with atomic_folder(folder) as temporary:
            (temporary / "new").write_text("new")

    killed(replace)
    assert not folder.exists()
    with pytest.raises(ValueError, match="amid"), atomic_folder(folder):
        raise ValueError("amid the next one")
    assert names(folder) == ["old"]
    assert names(folder.parent) == ["export"]
