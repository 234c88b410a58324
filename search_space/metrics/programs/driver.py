"""The child process of `sandbox.py`: a script, without imports of this project, that runs one program with its tests.

It reads a request from its standard input, a JSON object, and writes the token of the request to its standard output if
the program and its tests end, or else one line of what went wrong. Two processes take part. The outer one limits the
time. The inner one has the limits of the operating system and an audit hook, and runs the code.
"""

from __future__ import annotations

import _thread
import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

#: Of linux/sched.h: user, process, network and IPC namespaces.
_NEW_USER, _NEW_REST = 0x10000000, 0x20000000 | 0x40000000 | 0x08000000
#: Of linux/prctl.h.
_SET_DEATH_SIGNAL, _SET_NO_NEW_PRIVILEGES = 1, 38
#: Audit events of what a program may not do, and beginnings of their names.
_DENIED = (
    *("os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.startfile", "subprocess.", "pty."),
    *("os.kill", "signal.pthread_kill", "ctypes."),
    *("socket.", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod"),
    *("os.chown", "os.lchown", "os.utime", "os.setxattr", "os.removexattr", "shutil.", "syslog."),
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_MOST_MESSAGE = 300


def main() -> None:
    """Run the request of the standard input."""
    request = json.loads(sys.stdin.buffer.read())
    # What the program reads and prints is nobody's: it must not meet the request or the verdict.
    verdict, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    libc = ctypes.CDLL(None, use_errno=True)
    _die_with_parent(libc)
    _isolate(libc)
    inner = os.fork()
    if inner == 0:
        _die_with_parent(libc)
        _run(request, verdict)
        os._exit(0)
    os.close(verdict)
    # In a process namespace of its own, the inner process takes all others of it along.
    signal.signal(signal.SIGALRM, lambda *_: os.kill(inner, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, request["wall_s"])
    os.waitpid(inner, 0)


def _die_with_parent(libc: Any) -> None:
    if sys.platform == "linux":
        libc.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        libc.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)


def _isolate(libc: Any) -> None:
    """Leave the network and the sight of other processes, where the operating system permits it."""
    if sys.platform == "linux":
        # A user namespace permits the others to users without privileges, where administrators have not forbidden it.
        _ = libc.unshare(_NEW_USER | _NEW_REST) == 0 or libc.unshare(_NEW_REST) == 0


def _run(request: dict[str, Any], verdict: int) -> None:
    """Run program and tests, and write the verdict."""
    write, execute, token = os.write, exec, request["token"].encode()
    _limit(request)
    try:
        program = compile(request["program"], "program", "exec")
        tests = compile(request["tests"], "tests", "exec")
        names: dict[str, Any] = {"__name__": "program"}  # what a program does as a script only is no part of its tests
        # The limit of processes counts threads, but for some users only: a result must not depend on the user.
        for name in ("start_new_thread", "start_new", "start_joinable_thread"):
            setattr(_thread, name, _no_thread)
        sys.addaudithook(_guard())
        execute(program, names)
        execute(tests, names)
    except BaseException as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        token = line.encode(errors="replace")[:_MOST_MESSAGE]
    write(verdict, token)


def _limit(request: dict[str, Any]) -> None:
    """Set the limits of the operating system; those of processes do not bind root."""
    for name, most in (
        ("RLIMIT_CPU", request["cpu_s"]),
        ("RLIMIT_AS", request["memory_bytes"]),
        ("RLIMIT_FSIZE", 0),  # no file takes a byte; pipes and devices are no files
        ("RLIMIT_CORE", 0),
        ("RLIMIT_NOFILE", 64),
        ("RLIMIT_NPROC", 1),
    ):
        kind = getattr(resource, name, None)
        if kind is not None:
            _, hard = resource.getrlimit(kind)
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            try:
                resource.setrlimit(kind, (most, most))
            except (ValueError, OSError):  # macOS refuses some of them
                continue


def _no_thread(*_: Any, **__: Any) -> int:
    raise PermissionError("a program may not start a thread")


def _guard() -> Callable[[str, tuple[Any, ...]], None]:
    """Return an audit hook that refuses what a program may not do."""
    denied, writes = _DENIED, _WRITES

    def guard(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(denied):
            raise PermissionError(f"a program may not call {event}")
        if event == "open" and arguments[2] is not None and arguments[2] & writes:
            raise PermissionError(f"a program may not write {arguments[0]!r}")

    return guard


if __name__ == "__main__":
    main()
