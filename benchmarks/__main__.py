"""`python -m autopeft.benchmarks`: races, contests, adapters, audits, simulations, replays, speed.

`make gpu` is apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from autopeft.benchmarks.cli.adapters import adapters
from autopeft.benchmarks.cli.auditing import audit
from autopeft.benchmarks.cli.contest import contest
from autopeft.benchmarks.cli.coverage import coverage
from autopeft.benchmarks.cli.draws import draws
from autopeft.benchmarks.cli.handmade import handmade
from autopeft.benchmarks.cli.memory import memory
from autopeft.benchmarks.cli.promises import promises
from autopeft.benchmarks.cli.racing import race, tabulate
from autopeft.benchmarks.cli.replaying import perturb, rungs
from autopeft.benchmarks.cli.speed import speed
from autopeft.studies.cli.app import make_app, run_app

app = make_app(
    "autopeft.benchmarks",
    "Benchmarks of autopeft itself. The published results are in benchmarks/results and in docs/.",
    (speed, race, adapters, rungs, perturb, tabulate, audit, contest, handmade, draws, coverage, promises, memory),
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit, with the exit codes of `autopeft`."""
    run_app(app, "python -m autopeft.benchmarks", arguments)


if __name__ == "__main__":
    main()
