"""The GPU kit: its dry run, and that no phase takes another with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest
from packaging.requirements import Requirement

from autopeft.benchmarks.gpu import report
from autopeft.benchmarks.gpu.__main__ import main
from autopeft.benchmarks.gpu.phase import Phase
from autopeft.benchmarks.gpu.phases import PHASES
from autopeft.benchmarks.gpu.phases.step_overhead import TARGETS
from autopeft.benchmarks.gpu.runner import PhaseResult, run_kit
from autopeft.search_space.adapters import ADAPTERS
from autopeft.studies.reports import markdown

ROOT = Path(__file__).resolve().parents[3]
#: What a bare GPU machine has; `demo` alone needs more.
BARE = ("torch", "triton", "transformers", "peft", "safetensors", "numpy")
#: Every adapter type and the mixture on two models in two types, but `full`; the decoder has no site for `bitfit`.
PACKS = 4 * len(ADAPTERS) - 2


# A phase that goes wrong

BODIES = {
    "well": "yield {'value': 1.5, 'passed': True}\n    yield {'value': float('nan')}",
    "noisy": "print('not JSON')\n    os.write(1, b'nor this')\n    yield {'value': 2}",
    "raising": "yield {'value': 3}\n    raise ValueError('of its own')",
    "dying": "yield {'value': 4}\n    os.kill(os.getpid(), signal.SIGSEGV)",
    "exiting": "yield {'value': 5}\n    os._exit(7)",
    "hanging": "yield {'value': 6}\n    subprocess.Popen(['sleep', '99'])\n    time.sleep(99)",
    "deaf": "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    yield {'value': 7}\n    time.sleep(99)",
    "breaking off": (
        "yield {'value': 9}\n    for fd in range(3, 32):\n        try:\n            os.write(fd, b'{\"row\": {\"val')\n"
        "        except OSError:\n            pass\n    os._exit(1)"
    ),
    "lingering": "threading.Thread(target=time.sleep, args=(99,)).start()\n    yield {'value': 10}",
    "failing": "yield {'passed': True}\n    yield {'passed': False}",
    "unable": "raise Skipped('no such thing here')\n    yield {}",
    "late": "assert not run.has_time('the rest', 1e9)\n    yield {'value': 8}",
}


@pytest.fixture
def phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Phase]:
    """Phases that do what their names say, of at most three seconds in a run of eight minutes."""
    folder = tmp_path / "modules"
    folder.mkdir()
    head = "import os, signal, subprocess, threading, time\nfrom autopeft.benchmarks.gpu.phase import Skipped\n\n\n"
    for name, body in BODIES.items():
        (folder / f"phase_{name.replace(' ', '_')}.py").write_text(f"{head}def measure(run):\n    {body}\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
    limits = {"hanging": 6.0, "deaf": 6.0, "lingering": 6.0}
    return {name: Phase(name, f"phase_{name.replace(' ', '_')}", limits.get(name, 60.0), "a test") for name in BODIES}


@pytest.mark.slow
def test_a_phase_that_goes_wrong_leaves_all_others_with_results(phases: dict[str, Phase], tmp_path: Path) -> None:
    said: list[str] = []
    results = run_kit(list(phases.values()), tmp_path / "out", device="cpu", commit="abc", say=said.append)
    assert {name: result.status for name, result in results.items()} == {
        "well": "ok",
        "noisy": "ok",
        "raising": "failed",
        "dying": "crashed",
        "exiting": "crashed",
        "hanging": "timed out",
        "deaf": "timed out",
        "breaking off": "crashed",
        "lingering": "timed out",
        "failing": "ok",
        "unable": "skipped",
        "late": "cut",
    }
    values = {name: result.rows[0].get("value") for name, result in results.items() if result.rows}
    numbered = dict(noisy=2, raising=3, dying=4, exiting=5, hanging=6, deaf=7, late=8, lingering=10)
    assert values == {"well": 1.5, "failing": None, "breaking off": 9, **numbered}
    assert results["well"].rows[1] == {"value": "nan"}
    assert results["raising"].error is not None
    assert "of its own" in results["raising"].error["traceback"]
    assert results["dying"].error is not None
    assert "SIGSEGV" in results["dying"].error["message"]
    assert "Fatal Python error" in results["dying"].log, "the stack of a crash is kept"
    assert results["exiting"].error is not None
    assert "7" in results["exiting"].error["message"]
    assert "phase_hanging.py" in results["hanging"].log, "a hang says where it hangs"
    assert {name: result.passed for name, result in results.items() if result.passed is not None} == {
        "well": True,
        "failing": False,
    }
    good = {name for name, result in results.items() if result.good}
    assert good == {"well", "noisy", "unable", "late"}
    assert results["unable"].reason == "no such thing here"
    assert results["late"].left_out == ["the rest"]
    written = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert list(written["phases"]) == list(phases)
    assert written["commit"] == "abc"
    for name, result in results.items():
        assert PhaseResult(**written["phases"][name]) == result
    assert "not JSON" in (tmp_path / "out" / "gpu.log").read_text()
    assert any("ValueError: of its own" in line for line in said)
    assert not _processes("phase_"), "nothing that a phase has started outlives it"
    sleeping = [p for p in psutil.Process().children(recursive=True) if p.name() == "sleep"]
    assert not sleeping


def test_together_they_end_in_time(phases: dict[str, Phase], tmp_path: Path) -> None:
    begin = time.monotonic()
    wanted = [Phase("first", phases["hanging"].module, 99999.0, ""), phases["well"]]
    results = run_kit(wanted, tmp_path, device="cpu", minutes=0.1)
    assert time.monotonic() - begin < 9
    assert [result.status for result in results.values()] == ["timed out", "not run"]


def test_the_limits_grow_with_the_minutes(phases: dict[str, Phase], tmp_path: Path) -> None:
    results = run_kit([phases["well"]], tmp_path, device="cpu", minutes=16.0)
    assert results["well"].limit_s == 120.0


def test_interrupted_it_keeps_what_it_has(phases: dict[str, Phase], tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from autopeft.benchmarks.gpu import __main__ as kit\n"
        "from autopeft.benchmarks.gpu.phase import Phase\n"
        "kit.PHASES = {n: Phase(n, f'phase_{n}', 99.0, '') for n in ('well', 'deaf')}\n"
        f"sys.exit(kit.main(['--device', 'cpu', '--output', {str(tmp_path)!r}]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    file = tmp_path / "gpu.json"
    for _ in _until(60):
        if file.exists() and "deaf" in (found := json.loads(file.read_text())["phases"]) and found["deaf"]["rows"]:
            break
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "gpu.json" in said
    found = json.loads(file.read_text())["phases"]
    assert found["well"]["status"] == "ok"
    assert found["deaf"]["status"] == "interrupted"
    assert found["deaf"]["rows"] == [{"value": 7}]
    assert not _processes("phase_deaf")


def _until(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.1)
    raise AssertionError(f"it did not happen within {seconds} s")


def _processes(words: str) -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if any(words in word for word in p.cmdline())]


# The command


def test_wrong_words(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in ((["--only", "kernel-speeds"], "kernel-speeds"), (["--minutes", "0"], "--minutes")):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a card")
def test_without_a_card(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--output", str(tmp_path)]) == 4
    assert "DEVICE=cpu" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# The dry run


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the packages of `BARE`, what they depend on, and nothing else; autopeft is not in it."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    packages = folder / "packages"
    packages.mkdir()
    for distribution in _closure(BARE):
        for file in metadata.files(distribution) or ():
            top = Path(file.parts[0])
            target = metadata.distribution(distribution).locate_file(top)
            if top.name not in ("..", "__pycache__") and not (packages / top).exists():
                (packages / top).symlink_to(Path(str(target)))
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "bare.pth").write_text(f"{packages}\n")
    return folder / "venv" / "bin" / "python"


def _closure(names: tuple[str, ...]) -> set[str]:
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for text in metadata.requires(name) or ():
            wanted = Requirement(text)
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                waiting.append(wanted.name)
    return found


@pytest.mark.slow
def test_the_bare_environment_is_bare(bare_python: Path) -> None:
    code = "import importlib.util as u; print([n for n in {!r} if u.find_spec(n)])"
    absent = ("autopeft", "mlflow", "optuna", "botorch", "datasets", "pandas", "pyarrow", "scipy", "sklearn")
    words = [bare_python, "-c", code.format(absent)]
    # Elsewhere than in the root, where the folder `autopeft` is found by its name.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=bare_python.parent, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def dry_run(bare_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`make gpu DEVICE=cpu` on the bare machine: `gpu.json`, and how the command ended."""
    folder = tmp_path_factory.mktemp("dry")
    # So many minutes that a busy machine cuts nothing.
    words = ["DEVICE=cpu", "MINUTES=60", f"OUTPUT={folder}", f"GPU_PYTHON={bare_python}"]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MAKEFLAGS")}
    done = subprocess.run(
        ["make", "--no-print-directory", "gpu", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    found: dict[str, Any] = json.loads((folder / "gpu.json").read_text())
    return found | {"exit": done.returncode, "stdout": done.stdout}


@pytest.mark.slow
def test_dry_run_on_a_bare_machine(dry_run: dict[str, Any]) -> None:
    """All phases; the one that needs more says so."""
    found = dry_run["phases"]
    said = {name: (phase["status"], phase["error"], phase["log"]) for name, phase in found.items()}
    assert list(found) == list(PHASES)
    assert all(phase["status"] == ("skipped" if name == "demo" else "ok") for name, phase in found.items()), said
    assert "mlflow" in found["demo"]["reason"]
    assert not [
        row for phase in found.values() for row in phase["rows"] if row.get("passed") is False or "error" in row
    ]
    assert dry_run["exit"] == 0
    assert "kernel-parity" in dry_run["stdout"]
    tested = {name: sum("passed" in row for row in phase["rows"]) for name, phase in found.items()}
    assert tested["kernel-parity"] == 43
    assert tested["pack-parity"] == PACKS
    assert tested["equal-work"] == 2
    assert {row["model"] for row in found["step-overhead"]["rows"] if row.get("extrapolated")} == set(TARGETS)


@pytest.mark.slow
def test_the_demo_as_a_phase(tmp_path: Path) -> None:
    assert main(["--device", "cpu", "--minutes", "60", "--only", "demo", "--output", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "gpu.json").read_text())["phases"]["demo"]["rows"]
    assert row["wall_s"] > 0
    assert [member for member in row["front"] if member["recommended"]]


# The report


CARD = {"what": "card", "name": "NVIDIA X1 80GB", "memory_bytes": 2**36, "multiprocessors": 132, "driver": "1.2"}


def of_a_card(dry_run: dict[str, Any]) -> dict[str, Any]:
    """The dry run as if it had been on a card."""
    found = json.loads(json.dumps({name: dry_run[name] for name in ("schema", "started", "phases")}))
    found["phases"]["environment"]["rows"].append(CARD)
    return found | {"device": "cuda", "commit": "0123456789abcdef"}


def test_the_page_is_what_the_results_say() -> None:
    page = report.PAGE.read_text()
    text = report.section(report.load(report.RESULTS))
    assert markdown.with_section(page, report.BEGIN, report.END, text) == page


def test_without_results_nothing_is_claimed() -> None:
    text = report.section([])
    assert text.startswith("**Not measured.**")
    assert "| measured" not in text


@pytest.mark.slow
def test_the_section_has_what_was_found(dry_run: dict[str, Any], tmp_path: Path) -> None:
    path = report.merge(of_a_card(dry_run), tmp_path)
    assert path.name == "gpu-nvidia-x1-80gb.json"
    text = report.section(report.load(tmp_path))
    rows = {name: phase["rows"] for name, phase in dry_run["phases"].items()}
    for whole in (row for row in rows["step-overhead"] if row.get("extrapolated")):
        assert f"{whole['rho']:.2f}" in text
    for row in rows["equal-work"]:
        assert f"{row['speedup']:.2f} ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})" in text
    assert "kernel-parity: 43 of 43 tests passed" in text
    assert f"pack-parity: {PACKS} of {PACKS} tests passed" in text
    for table, phase, what in (("operator", "kernel-speed", "kernel"), ("product", "kernel-speed", "product")):
        wanted = [row for row in rows[phase] if row["what"] == table]
        assert wanted
        assert all(row[what] in text and row["shape"] in text for row in wanted)
    assert text.count("| pack | starved |") == 3
    assert "0123456789" in text
    assert "(command" not in text
    assert "\n\n\n" not in text


@pytest.mark.slow
def test_a_failure_is_named(dry_run: dict[str, Any], tmp_path: Path) -> None:
    found = of_a_card(dry_run)
    rows = found["phases"]["kernel-parity"]["rows"]
    rows[0] |= {"passed": False, "relative_error": 0.5}
    rows[1] |= {"passed": False, "error": "RuntimeError: it broke"}
    del rows[1]["relative_error"]
    report.merge(found, tmp_path)
    text = report.section(report.load(tmp_path))
    assert f"- failed: {rows[0]['op']}, {rows[0]['types']}" in text
    assert "0.5, allowed is" in text
    assert "RuntimeError: it broke" in text
    assert "41 of 43" in text


@pytest.mark.slow
def test_a_second_run_replaces_its_phases_alone(dry_run: dict[str, Any], tmp_path: Path) -> None:
    first = of_a_card(dry_run)
    report.merge(first, tmp_path)
    second = of_a_card(dry_run) | {"commit": "fedcba9876543210"}
    second["phases"] = {name: second["phases"][name] for name in ("environment", "graphs", "memory")}
    second["phases"]["memory"] |= {"rows": [], "status": "timed out"}
    report.merge(second, tmp_path)
    (whole,) = report.load(tmp_path)
    commits = {name: phase["commit"][:4] for name, phase in whole["phases"].items()}
    assert commits == {name: "fedc" if name in ("environment", "graphs") else "0123" for name in PHASES}
    assert whole["phases"]["memory"]["rows"], "a run that found nothing takes nothing away"


@pytest.mark.slow
def test_what_is_no_measurement_is_refused(dry_run: dict[str, Any], tmp_path: Path) -> None:
    found = of_a_card(dry_run)
    without = json.loads(json.dumps(found))
    without["phases"]["environment"]["rows"].pop()
    for bad, words in ((found | {"device": "cpu"}, "dry run"), (without, "environment"), ({"schema": 0}, "layout")):
        with pytest.raises(ValueError, match=words):
            report.merge(bad, tmp_path)
    assert not list(tmp_path.iterdir())
