"""`coverage`: simulations of the intervals and of the recommendation."""

from __future__ import annotations

from typing import Annotated

import typer

from autopeft.benchmarks.cli.shared import BenchView, print_result
from autopeft.studies.cli.options import JsonOption


def coverage(
    simulations: Annotated[
        int, typer.Option("--simulations", min=1, help="Simulated studies in each scenario.")
    ] = 2000,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the simulations.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Simulate studies: how often intervals contain the truth, and how good the recommended candidates are."""
    from autopeft.benchmarks import coverage as simulated

    with BenchView() as view:
        view.plan(len(simulated.INTERVAL_SCENARIOS) + len(simulated.CHOICE_SCENARIOS))
        intervals, choices = [], []
        view.stage("intervals")
        for scenario in simulated.INTERVAL_SCENARIOS:
            intervals.append(simulated.coverage(scenario, simulations=simulations, seed=seed))
            view.advance(1)
        view.stage("recommendations")
        for situation in simulated.CHOICE_SCENARIOS:
            choices.append(simulated.choices(situation, simulations=simulations, seed=seed))
            view.advance(1)
    arguments = intervals, choices
    print_result(as_json, lambda: simulated.to_dict(*arguments), lambda: simulated.to_markdown(*arguments))
