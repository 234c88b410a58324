"""Output fits its stream: no sign, no pipe and no closed file ends a command."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autopeft.studies.cli.options import print_json
from autopeft.studies.cli.streams import adapted_streams, echo, on_stdout

from ...support.tiny_study import save_study

SHORT = {
    "search": {"searcher": "random", "trials": 2, "batch": 2},
    "finalists": {"seeds": 1, "most": 1},
    "baselines": {"names": ["head"], "learning_rates": [1.0e-2]},
}


def written(monkeypatch: pytest.MonkeyPatch, encoding: str, errors: str, text: str) -> bytes:
    """The bytes that `echo` writes to a stdout of this encoding."""
    raw = io.FileIO(os.memfd_create("stdout"), "r+")
    stream = io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, errors=errors)
    monkeypatch.setattr(sys, "stdout", stream)
    with adapted_streams():
        assert on_stdout(text).encode(encoding) == text.encode(encoding, sys.stdout.errors)
        echo(text)
    assert sys.stdout is stream
    raw.seek(0)
    return raw.read()


@pytest.mark.parametrize(
    ("encoding", "errors", "text", "expected"),
    [
        ("ascii", "strict", "0.7 ± 0.1, a ≤ b → c…", b"0.7 +/- 0.1, a <= b -> c...\n"),
        ("ascii", "surrogateescape", "größe", b"gr\\xf6\\xdfe\n"),
        ("cp1252", "strict", "± ö ≤ π", b"\xb1 \xf6 <= \\u03c0\n"),
        ("utf-8", "strict", "± \udc80", "± \\udc80\n".encode()),
    ],
)
def test_signs_that_a_stream_lacks_are_replaced(
    monkeypatch: pytest.MonkeyPatch, encoding: str, errors: str, text: str, expected: bytes
) -> None:
    assert written(monkeypatch, encoding, errors, text) == expected


def test_json_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding in ("ascii", "cp1252", "utf-8"):
        buffer = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding=encoding))
        print_json({"label": "± ≤ größe"})
        assert json.loads(buffer.getvalue().decode(encoding)) == {"label": "± ≤ größe"}
    assert "größe" in buffer.getvalue().decode(), "readable where the stream takes it"


def closed_pipe() -> int:
    """The end for writing of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def command(*arguments: object, **streams: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "autopeft.studies.cli.app", *map(str, arguments)],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        timeout=120,
        check=False,
        **streams,
    )


@pytest.mark.slow
def test_a_study_ends_though_nobody_reads(tmp_path: Path) -> None:
    """As in `autopeft run ... 2>&1 | head -1`, and on a stream without ±."""
    path = save_study(tmp_path, **SHORT)
    pipe = closed_pipe()
    try:
        assert command("run", path, stdout=pipe, stderr=pipe).returncode == 0
    finally:
        os.close(pipe)
    assert (tmp_path / "runs" / "tiny" / "report" / "front.json").is_file()
    shown = command("pareto", path, capture_output=True)
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert b" +/- " in shown.stdout
    lines = [line for line in shown.stdout.splitlines() if line.startswith((b"|", b"+-"))]
    assert len({len(line) for line in lines}) == 1, "the columns of the table are even"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_stdout_is_said_once() -> None:
    with Path("/dev/full").open("wb") as full:
        done = command("schema", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr.count(b"No space left on device") == 1
    assert b"Traceback" not in done.stderr
