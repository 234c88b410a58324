"""`contest`: whole studies of several searchers in the same time."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from autopeft.benchmarks.cli.speed import BenchView
from autopeft.studies.cli.files import check_names, file_errors
from autopeft.studies.cli.options import JsonOption, SetOption, names_of, numbers_of, print_json


def contest(
    study: Annotated[
        Path | None, typer.Argument(metavar="[STUDY]", help="Study file, or its folder; default: the demo's.")
    ] = None,
    set_: SetOption = None,
    searchers: Annotated[
        str, typer.Option("--searchers", help="Names, with commas; the time of the first is the measure.")
    ] = "proxy,nsga2",
    times: Annotated[
        float, typer.Option("--times", min=0, help="How much of the first one's time each other searcher has.")
    ] = 2.0,
    seeds: Annotated[str, typer.Option("--seeds", help="Of the studies, with commas.")] = "0,1,2,3,4",
    results: Annotated[
        Path, typer.Option("--results", help="Keeps every study; those that are there are not run again.")
    ] = Path("contest.jsonl"),
    as_json: JsonOption = False,
) -> None:
    """Run whole studies and compare the fronts that they end with, in processor seconds of one thread."""
    from autopeft.benchmarks import contest as contests
    from autopeft.searchers import SEARCHERS
    from autopeft.studies.config.loading import load_study
    from autopeft.studies.engine.check import check

    names = names_of(searchers)
    check_names("searcher", names, SEARCHERS)
    numbers = numbers_of("--seeds", seeds)
    path = study or Path(str(files("autopeft.studies.examples") / "demo.yaml"))
    settings = load_study(path, [*(set_ or ()), f"search.searcher={names[0]}"])
    splits, _, _ = check(settings)
    key = contests.study_key(settings)
    known = {ended.key: ended for ended in contests.read(results) if ended.settings == key}
    with BenchView() as view, file_errors():
        view.plan(sum((name, seed) not in known for name in names for seed in numbers))
        for seed in numbers:
            for name in names:
                allowed_s = None if name == names[0] else times * known[names[0], seed].took_s
                there = known.get((name, seed))
                if there is None or there.allowed_s != allowed_s:
                    view.stage(f"{name}, seed {seed}")
                    known[name, seed] = contests.run(settings, splits, name, seed, allowed_s)
                    contests.append(results, known[name, seed])
                    view.advance(1)
    ended = [known[name, seed] for seed in numbers for name in names]
    objectives = settings.objectives_list()
    if as_json:
        print_json(contests.to_dict(ended, objectives, names))
    else:
        typer.echo(contests.to_markdown(ended, objectives, names), nl=False)
