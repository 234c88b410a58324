"""`coverage`: simulations of the intervals, of the recommendation, and of metrics that are no means."""

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
    from autopeft.benchmarks import metric_coverage as of_metrics

    with BenchView() as view:
        scenarios = (simulated.INTERVAL_SCENARIOS, simulated.CHOICE_SCENARIOS, of_metrics.METRIC_SCENARIOS)
        view.plan(sum(map(len, scenarios)))
        intervals, choices, metrics = [], [], []
        view.stage("intervals")
        for scenario in simulated.INTERVAL_SCENARIOS:
            intervals.append(simulated.coverage(scenario, simulations=simulations, seed=seed))
            view.advance(1)
        view.stage("recommendations")
        for situation in simulated.CHOICE_SCENARIOS:
            choices.append(simulated.choices(situation, simulations=simulations, seed=seed))
            view.advance(1)
        view.stage("metrics")
        for setting in of_metrics.METRIC_SCENARIOS:
            metrics.append(of_metrics.metric_coverage(setting, simulations=simulations, seed=seed))
            view.advance(1)
    print_result(
        as_json,
        lambda: {**simulated.to_dict(intervals, choices), "metrics": of_metrics.to_dict(metrics)},
        lambda: f"{simulated.to_markdown(intervals, choices)}\n{of_metrics.to_markdown(metrics)}",
    )
