"""Run generated programs with their tests, each in a process of its own. No security boundary: see docs/llm.md."""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_DRIVER = Path(__file__).with_name("driver.py")
#: Bytes of a verdict that are read.
_MOST_READ = 4096
#: Characters of what went wrong.
_MOST_SHOWN = 200
#: Seconds after the driver's own limit of time.
_GRACE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one program with its tests.

    The processor time decides, because it is nearly the same on a busy machine. The wall time ends programs that wait.
    """

    cpu_s: int = 5
    wall_s: float = 20.0
    memory_bytes: int = 2**30


DEFAULT = Limits()


def verdicts(programs: Sequence[str], tests: Sequence[str], limits: Limits = DEFAULT) -> list[str]:
    """Return for each program "" if it passes its tests, or what went wrong in one line; several at a time."""
    pairs = dict.fromkeys(zip(programs, tests, strict=True))
    with ThreadPoolExecutor(max_workers=_num_cores()) as pool:
        found = dict(zip(pairs, pool.map(lambda pair: _verdict(pair[0], pair[1], limits), pairs), strict=True))
    return [found[pair] for pair in zip(programs, tests, strict=True)]


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _verdict(program: str, tests: str, limits: Limits) -> str:
    # The program cannot know it before it runs, so that its own output, or its exit code, is no proof of a pass.
    token = secrets.token_hex(32)
    request = {"program": program, "tests": tests, "token": token, "cpu_s": limits.cpu_s, "wall_s": limits.wall_s}
    request |= {"memory_bytes": limits.memory_bytes}
    with tempfile.TemporaryDirectory(prefix="autopeft-program-", ignore_cleanup_errors=True) as folder:
        # -P and -s without PYTHON* variables are -I, except that the order of sets is the same each time.
        child = subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", "-B", str(_DRIVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        try:
            found = _answer(child, json.dumps(request).encode(), time.monotonic() + limits.wall_s + _GRACE_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if found == token.encode():
        return ""
    # It may be of the program itself, if that has found the descriptor.
    line = " ".join(found.decode(errors="replace").split())[:_MOST_SHOWN]
    return line or "ended before its tests, or exceeded a limit of time or memory"


def _answer(child: subprocess.Popen[bytes], request: bytes, deadline: float) -> bytes:
    """Return the beginning of what the child writes until it closes its output or the time is over."""
    assert child.stdin is not None
    assert child.stdout is not None
    with child.stdin, child.stdout, suppress(BrokenPipeError):
        child.stdin.write(request)
        child.stdin.close()
        found = b""
        while len(found) < _MOST_READ:
            ready, _, _ = select.select([child.stdout], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(child.stdout.fileno(), _MOST_READ) if ready else b""
            if not part:
                break
            found += part
        return found
    return b""
