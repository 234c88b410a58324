"""`contest`: whole studies of several searchers in the same time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autopeft.benchmarks.cli.shared import STUDY_HELP, BenchView, load_study_or_table, print_result
from autopeft.studies.cli.files import check_names
from autopeft.studies.cli.options import JsonOption, SetOption, names_of, numbers_of
from autopeft.studies.errors import file_errors


def contest(
    study: Annotated[Path | None, typer.Argument(metavar="[STUDY]", help=STUDY_HELP)] = None,
    set_: SetOption = None,
    searchers: Annotated[
        str, typer.Option("--searchers", help="Names, separated by commas; the first sets the time of the others.")
    ] = "proxy,nsga2",
    times: Annotated[
        float, typer.Option("--times", min=0, help="Time of each other searcher, in multiples of that of the first.")
    ] = 2.0,
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds of the studies, separated by commas.")] = "0,1,2,3,4",
    results: Annotated[
        Path, typer.Option("--results", help="File of results; studies in it are not run again.")
    ] = Path("contest.jsonl"),
    as_json: JsonOption = False,
) -> None:
    """Run whole studies and compare their final fronts at limited time (processor seconds of one thread)."""
    from autopeft.benchmarks import contest as contests
    from autopeft.searchers import SEARCHERS
    from autopeft.studies.engine.check import check

    names = names_of(searchers)
    check_names("searcher", names, SEARCHERS)
    numbers = numbers_of("--seeds", seeds)
    settings = load_study_or_table(study, [*(set_ or ()), f"search.searcher={names[0]}"])
    splits, _, _ = check(settings)
    key = contests.study_key(settings)
    found = {outcome.key: outcome for outcome in contests.read(results) if outcome.settings == key}
    with BenchView() as view, file_errors():
        view.plan(sum((name, seed) not in found for name in names for seed in numbers))
        for seed in numbers:
            for name in names:
                allowed_s = None if name == names[0] else times * found[names[0], seed].took_s
                previous = found.get((name, seed))
                if previous is None or previous.allowed_s != allowed_s:
                    view.stage(f"{name}, seed {seed}")
                    found[name, seed] = contests.run(settings, splits, name, seed, allowed_s)
                    contests.append(results, found[name, seed])
                    view.advance(1)
    ended = [found[name, seed] for seed in numbers for name in names]
    arguments = ended, settings.objectives_list(), names
    print_result(as_json, lambda: contests.to_dict(*arguments), lambda: contests.to_markdown(*arguments))
