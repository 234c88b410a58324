"""The command: `make gpu`, or `python -m autopeft.benchmarks.gpu`."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from pathlib import Path

from autopeft.benchmarks.gpu.phase import FULL_MINUTES
from autopeft.benchmarks.gpu.phases import PHASES
from autopeft.benchmarks.gpu.runner import describe, run_kit


def main(arguments: list[str] | None = None) -> int:
    """Run the kit and return an exit code.

    0 if every phase ended well and every test passed, 1 if not, 2 for wrong arguments, 4 without the device, 130 if
    interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="autopeft.benchmarks.gpu",
        description="Test and measure everything on a GPU. Results are in OUTPUT/gpu.json after every phase.",
        epilog="phases: " + "; ".join(f"{phase.name} - {phase.summary}" for phase in PHASES.values()),
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run at toy sizes")
    parser.add_argument(
        "--minutes", type=float, default=FULL_MINUTES, help="for all phases together (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="a folder (default: %(default)s)")
    parser.add_argument("--only", metavar="PHASE,...", help="these phases alone")
    parser.add_argument("--commit", default=_commit(), help="commit to record in gpu.json (default: that of git)")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error("--minutes must be above 0")
    names = options.only.split(",") if options.only else list(PHASES)
    if unknown := [name for name in names if name not in PHASES]:
        parser.error(f"unknown phase {', '.join(unknown)}; the phases are: {', '.join(PHASES)}")
    if problem := _problem(options.device):
        print(f"gpu kit: {problem}", file=sys.stderr)
        return 4
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends its phase first
    try:
        results = run_kit(
            [phase for name, phase in PHASES.items() if name in names],
            options.output,
            device=options.device,
            minutes=options.minutes,
            commit=options.commit,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except KeyboardInterrupt:
        print(f"interrupted; what was measured is in {options.output / 'gpu.json'}", file=sys.stderr)
        return 130
    width = max(map(len, results))
    for name, result in results.items():
        print(f"{name:<{width}}  {describe(result)}")
    print(f"{'results':<{width}}  {options.output / 'gpu.json'}")
    return 0 if all(result.good for result in results.values()) else 1


def _problem(device: str) -> str | None:
    """Return why the device cannot be used, or None; a child process asks, so that this one holds no GPU memory."""
    question = "import torch; print(torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return f"{sys.executable} cannot import torch ({reason}); `make install`, or make gpu PYTHON=..."
    if device == "cuda" and done.stdout.strip() != "True":
        return "torch sees no CUDA device here; `--device cpu` (make gpu DEVICE=cpu) is a dry run at toy sizes"
    return None


def _commit() -> str | None:
    """Return the commit of this file's checkout, with "+" where files differ from it; None outside of a checkout."""
    here = Path(__file__).resolve().parent
    asked = [["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"]]
    try:
        head, changes = (subprocess.run(ask, cwd=here, capture_output=True, text=True, check=True) for ask in asked)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


if __name__ == "__main__":
    sys.exit(main())
