"""Run phases one after the other, each as a process with a time limit; `gpu.json` is valid at every moment."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from queue import Empty, Queue
from typing import IO, Any

from autopeft.benchmarks.gpu.phase import FULL_MINUTES, Phase, ResultRow
from autopeft.evaluators.atomic import atomic_write_text

#: The version of the layout of `gpu.json`.
SCHEMA = 1
#: Bytes of the end of a phase's standard error that are recorded if it fails.
LOG_TAIL = 4000
#: With less time left no phase is started.
LEAST_SECONDS = 5.0


@dataclass(slots=True)
class PhaseResult:
    """Result of a phase.

    `status`: "ok"; "cut" (it left something out for lack of time: `left_out`); "failed" (an exception: `error`);
    "crashed" (the process died: `error`); "timed out"; "interrupted"; "skipped" (this machine cannot: `reason`); "not
    run" (no time was left). `rows`: all that were measured, whatever the status. `passed`: whether every test passed,
    None without tests.
    """

    status: str
    seconds: float = 0.0
    limit_s: float = 0.0
    passed: bool | None = None
    rows: list[ResultRow] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    reason: str = ""
    error: dict[str, str] | None = None
    log: str = ""

    @property
    def tests(self) -> list[bool]:
        """Whether each test passed."""
        return [row["passed"] for row in self.rows if "passed" in row]

    @property
    def good(self) -> bool:
        """Whether the phase ended well and no test failed."""
        return self.status in ("ok", "cut", "skipped") and self.passed is not False


def run_kit(
    phases: Sequence[Phase],
    folder: Path,
    *,
    device: str,
    minutes: float = FULL_MINUTES,
    commit: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, PhaseResult]:
    """Run `phases`, write `gpu.json` and `gpu.log` into `folder`, and return the result of each.

    No phase outlives its limit, and all together not `minutes`. An interrupt ends the running phase and is raised
    again; finished measurements are saved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    results: dict[str, PhaseResult] = {}
    head = {
        "schema": SCHEMA,
        "commit": commit,
        "device": device,
        "minutes": minutes,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }

    def save() -> None:
        whole = {**head, "phases": {name: asdict(result) for name, result in results.items()}}
        atomic_write_text(folder / "gpu.json", json.dumps(whole, indent=1) + "\n")

    with (folder / "gpu.log").open("w+", encoding="utf-8", errors="replace") as log:
        for number, phase in enumerate(phases, 1):
            left = 60.0 * minutes - (time.monotonic() - begin)
            limit = min(phase.limit_s * minutes / FULL_MINUTES, left)
            result = results[phase.name] = PhaseResult(status="not run", limit_s=round(limit, 1))
            say(f"[{number}/{len(phases)}] {phase.name}: {phase.summary} (at most {max(limit, 0):.0f} s)")
            try:
                if limit >= LEAST_SECONDS:
                    _run_phase(phase, device, limit, result, log, save)
            finally:
                save()
            say(f"      {describe(result)}")
    return results


def describe(result: PhaseResult) -> str:
    """Return a summary in one line."""
    words = [f"{result.status} after {result.seconds:.0f} s", f"{len(result.rows)} rows"]
    if result.tests:
        words.append(f"{sum(result.tests)} of {len(result.tests)} tests passed")
    if result.left_out:
        words.append(f"left out: {', '.join(result.left_out)}")
    if result.reason:
        words.append(result.reason)
    if result.error:
        words.append(
            f"{result.error['type']}: {result.error['message'].splitlines()[0] if result.error['message'] else ''}"
        )
    return "; ".join(words)


def _run_phase(
    phase: Phase, device: str, limit: float, result: PhaseResult, log: IO[str], save: Callable[[], None]
) -> None:
    begin = time.monotonic()
    log.write(f"=== {phase.name}\n")
    log.flush()
    start_of_log = log.tell()
    process = subprocess.Popen(
        [sys.executable, "-m", "autopeft.benchmarks.gpu.worker", phase.module, device, str(limit)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        encoding="utf-8",
        env=os.environ | _environment(phase, device),
        process_group=0,  # so that its children can be ended with it
    )
    assert process.stdout is not None
    lines: Queue[str | None] = Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    result.status = "interrupted"
    try:
        while True:
            try:
                line = lines.get(timeout=max(0.0, limit - (time.monotonic() - begin)))
            except Empty:
                result.status = "timed out"
                break
            if line is None:
                result.status = _ended(result, process, limit - (time.monotonic() - begin))
                break
            _take(result, line)
            result.seconds = round(time.monotonic() - begin, 1)
            save()
    finally:
        _end(process)
        result.seconds = round(time.monotonic() - begin, 1)
        result.passed = all(result.tests) if result.tests else None
        end_of_log = log.seek(0, os.SEEK_END)
        if result.status not in ("ok", "cut", "skipped"):
            log.seek(max(start_of_log, end_of_log - LOG_TAIL))
            result.log = log.read()


def _environment(phase: Phase, device: str) -> dict[str, str]:
    if device == "cuda":
        # The first of several usable cards: a Trainer would spread its minibatches over all of them.
        return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    # At the sizes of a dry run threads would only wait for each other.
    return {"OMP_NUM_THREADS": "1", **({"TRITON_INTERPRET": "1"} if phase.interpreted else {})}


def _ended(result: PhaseResult, process: subprocess.Popen[str], seconds_left: float) -> str:
    """Return the status of a phase that has closed its output."""
    try:
        code = process.wait(max(1.0, seconds_left))
    except subprocess.TimeoutExpired:
        return "timed out"
    if result.error is not None:
        return "failed"
    if code:
        result.error = {"type": "Crash", "message": _death(code), "traceback": ""}
        return "crashed"
    if result.reason:
        return "skipped"
    return "cut" if result.left_out else "ok"


def _take(result: PhaseResult, line: str) -> None:
    try:
        message: dict[str, Any] = json.loads(line)
    except ValueError:  # half a line of a process that has died
        return
    if "row" in message:
        result.rows.append(message["row"])
    result.left_out += message.get("left_out", [])
    result.reason = message.get("skipped", result.reason)
    result.error = message.get("error", result.error)


def _read(stream: IO[str], lines: Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _end(process: subprocess.Popen[str]) -> None:
    """Kill the phase and all processes that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in a driver dies when the driver returns
        process.wait(10)


def _death(code: int) -> str:
    if code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process ended with exit code {code}"
