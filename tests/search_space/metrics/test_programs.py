"""pass@1: which program of a text is run, and that no program passes without its tests, or outlives its limits."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest

from autopeft.search_space.metrics import PassAt1
from autopeft.search_space.metrics.programs import program_of
from autopeft.search_space.metrics.programs.sandbox import Limits, verdicts

ADD = 'def add(a, b):\n    """Return the sum."""\n'
TESTS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0\n"
#: Short, so that programs without an end are soon over.
SHORT = Limits(cpu_s=1, wall_s=4.0, memory_bytes=2**28)


def passes(program: str, tests: str = "assert f() == 1", limits: Limits = SHORT) -> bool:
    return verdicts([program], [tests], limits) == [""]


def test_a_text_continues_its_prompt_and_passes_where_its_tests_do() -> None:
    texts = ["    return a + b\n", "    return a - b\n", "    return a +", "", "    return abs(a + b)\n"]
    assert list(PassAt1().of([ADD] * 5, texts, [TESTS] * 5)) == [1, 0, 0, 0, 1]


def test_what_went_wrong_is_one_line() -> None:
    programs = ["def f(): return 2", "def f(:", "f = 1", "def f():\n    raise ValueError('a\\nb')"]
    found = verdicts(programs, ["assert f() == 1, 'other'"] * 4)
    assert found[0] == "AssertionError: other"
    assert found[1].startswith("SyntaxError: ")
    assert found[2] == "TypeError: 'int' object is not callable"
    assert found[3] == "ValueError: a b"


@pytest.mark.parametrize(
    ("start", "text", "program"),
    [
        ("def f():\n", "    return 1\n", "def f():\n    return 1\n"),
        ("", "Here it is:\n```python\nf = 1\n```\nThat was all.", "f = 1\n"),
        ("", "```\nf = 1\n```", "f = 1\n"),
        ("", "```py\nf = 1\n", "f = 1\n"),
        ("", "```python\nf = 1\n```\n```python\nf = 2\n```", "f = 1\n"),
        ("Write f.\n```python\n", "f = 1\n```\nDone.", "f = 1\n"),
        ("As in\n```python\ng = 1\n```\nwrite f.\n", "```python\nf = 1\n```", "f = 1\n"),
        ("", "f = 1", "f = 1"),
        ("", "", ""),
    ],
)
def test_the_program_is_the_first_fence_of_the_text_or_all(start: str, text: str, program: str) -> None:
    assert program_of(start, text) == program


ENDED = "ended before its tests, or exceeded a limit of time or memory"
#: Programs after a function that passes the tests, and what is said of them.
HOSTILE = {
    "ends before the tests": ("import os\nos._exit(0)", ENDED),
    "leaves before the tests": ("import sys\nsys.exit(0)", "SystemExit: 0"),
    "skips its tests": ("import sys\nsys.settrace(lambda *a: sys.exit(0))", "SystemExit: 0"),
    "replaces what runs tests": (
        "import builtins\nbuiltins.exec = builtins.compile = lambda *a: None\nf = lambda: 0",
        "AssertionError:",
    ),
    "reads the request": ("import os\nos.read(0, 10**6)[0]", "IndexError"),
    "loops": ("while True: pass", ENDED),
    "sleeps": ("import time\ntime.sleep(1000)", ENDED),
    "recurses": ("def f(): return f()", "RecursionError"),
    "takes memory": ("f = bytearray(10**10)", "MemoryError"),
    "fills the memory slowly": ("f = []\nwhile True: f.append('x' * 10**6)", ("MemoryError", ENDED)),
    "prints without an end": ("import os\nwhile True: os.write(1, b'x' * 10**6)", ENDED),
    "prints to every descriptor": (
        "import os\nfor n in range(64):\n    try: os.write(n, b'x' * 10**5)\n    except OSError: pass",
        "xxx",
    ),
    "forks": ("import os\nwhile True: os.fork()", "PermissionError"),
    "forks in C": (
        "import _posixsubprocess as p, os\nr, w = os.pipe()\n"
        "p.fork_exec([b'/bin/sleep', b'99.25'], [b'/bin/sleep'], True, (w,), None, [], -1, -1, -1, -1, -1, -1, r, w,"
        " False, False, -1, None, None, None, -1, None, False)\nwhile True: pass",
        ENDED,
    ),
    "threads": ("import threading\nthreading.Thread(target=print).start()", "PermissionError"),
    "runs a shell": ("import subprocess\nsubprocess.run(['sh', '-c', 'exit 0'])", "PermissionError"),
    "kills its parent": ("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)", "PermissionError"),
    "kills all": ("import os, signal\nos.kill(-1, signal.SIGKILL)", "PermissionError"),
    "kills its group": ("import os, signal\nos.killpg(0, signal.SIGKILL)", "PermissionError"),
    "connects": ("import socket\nsocket.create_connection(('127.0.0.1', 9), 1)", "PermissionError"),
    "loads a library": ("import ctypes\nctypes.CDLL(None)", "PermissionError"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_no_program_passes_without_its_tests_or_runs_on(what: str) -> None:
    before, (program, said) = set(psutil.pids()), HOSTILE[what]
    assert passes("def f(): return 1")
    begun = time.monotonic()
    (found,) = verdicts([f"def f(): return 1\n{program}"], ["assert f() == 1"], SHORT)
    assert found.startswith(said), found
    assert len(found) <= 200
    assert time.monotonic() - begun < SHORT.wall_s + 10, "it was ended"
    until = time.monotonic() + 10  # what is killed ends when the system has the time for it
    while left := _left(before):
        assert time.monotonic() < until, left
        time.sleep(0.05)


def _left(before: set[int]) -> set[int]:
    """Return the processes since `before` that are this one's or that the programs started."""
    ours = {process.pid for process in psutil.Process().children(recursive=True)}
    return {pid for pid in set(psutil.pids()) - before if pid in ours or _is_sleep(pid)}


def _is_sleep(pid: int) -> bool:
    try:
        return "99.25" in psutil.Process(pid).cmdline()
    except psutil.Error:
        return False


def test_programs_get_no_environment_no_packages_and_an_empty_folder_that_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", "secret")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    held = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(held, True)
    program = (
        "import os\nfolder = os.getcwd()\n"
        "held = [n for n in range(3, 64) if os.path.realpath(f'/proc/self/fd/{n}').startswith(FOLDER)]\n"
    ).replace("FOLDER", repr(str(tmp_path)))
    tests = (
        f"assert folder.startswith({str(tmp_path)!r}), folder\nassert os.listdir() == []\nassert held == []\n"
        "assert 'TOKEN' not in os.environ\n"
        "try:\n    import numpy\nexcept ImportError:\n    pass\nelse:\n    raise AssertionError\n"
    )
    try:
        assert verdicts([program], [tests]) == [""]
    finally:
        os.close(held)
    assert list(tmp_path.iterdir()) == []


def test_no_program_writes_or_removes_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    name, new = repr(str(tmp_path / "mine")), repr(str(tmp_path / "new"))
    programs = [
        f"import os\nos.remove({name})\ndef f(): return 1",
        f"open({name}, 'w').write('lost')\ndef f(): return 1",
        f"open({new}, 'wb').write(b'x' * 10**9)\ndef f(): return 1",
        f"import shutil\nshutil.rmtree({str(tmp_path)!r})\ndef f(): return 1",
        "open('here', 'w')\ndef f(): return 1",
    ]
    assert all("PermissionError" in found for found in verdicts(programs, ["assert f() == 1"] * len(programs), SHORT))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]
    # Below the audit hook, no file takes a byte.
    assert passes("import resource", "assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == 0")


def test_the_order_of_sets_is_the_same_each_time() -> None:
    program = "f = hash('a word')"
    (found,) = verdicts([program], ["raise ValueError(f)"])
    assert verdicts([program], ["raise ValueError(f)"]) == [found]


def test_equal_pairs_run_once_and_results_keep_their_order() -> None:
    programs = ["def f(): return 1", "def f(): return 2"] * 20
    found = verdicts(programs, ["assert f() == 1"] * 40)
    assert [not problem for problem in found] == [True, False] * 20
