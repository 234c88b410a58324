"""`handmade`: whole studies against sweeps by hand, in equal time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autopeft.benchmarks.cli.shared import BenchView, print_result
from autopeft.studies.cli.files import check_names
from autopeft.studies.cli.options import JsonOption, names_of, numbers_of
from autopeft.studies.errors import file_errors


def handmade(
    arms: Annotated[str, typer.Option("--arms", help="Names, separated by commas.")] = "sweep,tpe,before,now",
    data: Annotated[str, typer.Option("--data", help="Data sets, separated by commas.")] = "topics,domains,returns",
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds of the studies, separated by commas.")] = "0,1,2,3,4",
    minutes: Annotated[
        float,
        typer.Option("--minutes", min=0.1, help="Processor minutes of each study; twice those that two cores take."),
    ] = 10.0,
    results: Annotated[
        Path, typer.Option("--results", help="File of results; what is in it does not run again.")
    ] = Path("handmade.jsonl"),
    as_json: JsonOption = False,
) -> None:
    """Compare what studies recommend with LoRA by the usual rules, tuned by hand, on test rows and fresh seeds."""
    from autopeft.benchmarks.handmade import arms as running
    from autopeft.benchmarks.handmade import report

    wanted, sets, numbers = names_of(arms), names_of(data), numbers_of("--seeds", seeds)
    check_names("arm", wanted, running.ARMS)
    check_names("data set", sets, running.SETS)
    with BenchView() as view, file_errors():
        done = {(one.arm.split(":")[0], one.data, one.seed) for one in report.read(results)}
        # Seed by seed, so that a benchmark that ends early has equally many of every arm.
        left = [(arm, name, seed) for seed in numbers for name in sets for arm in wanted]
        left = [key for key in left if key not in done]
        view.plan(len(left))
        for arm, name, seed in left:
            view.stage(f"{arm} on {name}, seed {seed}")
            report.append(results, running.run(name, seed, arm, minutes, report.read(results)))
            view.advance(1)
    found = [one for one in report.read(results) if one.data in sets and one.seed in numbers]
    print_result(as_json, lambda: report.to_dict(found), lambda: report.to_markdown(found))
