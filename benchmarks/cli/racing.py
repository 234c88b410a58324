"""`race`: searchers against each other on problems with a known front; `tabulate`: the trainings of one of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autopeft.benchmarks.cli.shared import STUDY_HELP, BenchView, load_study_or_table, print_result
from autopeft.search_space.problem import Goal
from autopeft.studies.cli.files import check_names
from autopeft.studies.cli.options import JsonOption, SetOption, names_of, numbers_of
from autopeft.studies.cli.streams import echo
from autopeft.studies.errors import ConfigurationError, file_errors

if TYPE_CHECKING:
    from autopeft.benchmarks.race.base import RaceProblem


def race(
    problems: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROBLEM]...", help="Problems by name; default: the five of docs/searchers.md."),
    ] = None,
    searchers: Annotated[
        str, typer.Option("--searchers", help="Names, separated by commas.")
    ] = "random,qmc,tpe,nsga2,bo",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Races of each searcher on each problem.")] = 20,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Evaluations of a race.")] = 200,
    batch: Annotated[
        int, typer.Option("--batch", min=1, help="Candidates that are proposed and measured together.")
    ] = 4,
    goal: Annotated[
        Goal, typer.Option("--goal", help="What the searchers look for, and what they are scored by.")
    ] = "front",
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes with one thread each.")] = 1,
    results: Annotated[Path, typer.Option("--results", help="File of results; races in it are not run again.")] = Path(
        "races.jsonl"
    ),
    picture: Annotated[Path | None, typer.Option("--picture", help="PNG file for the curves.")] = None,
    clocked: Annotated[
        str | None,
        typer.Option("--clock", metavar="N,N", help="Measure only the seconds per suggestion after N trials."),
    ] = None,
    surrogates: Annotated[
        str | None,
        typer.Option(
            "--surrogates", metavar="N,N", help="Measure only how well each surrogate predicts after N trials."
        ),
    ] = None,
    outlook: Annotated[
        bool, typer.Option("--outlook", help="Measure only whether the chances that `bo` gives its next batch hold.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run searchers on problems with a known front; report all races of these problems in the file of results."""
    from autopeft.benchmarks.race import races, report
    from autopeft.benchmarks.race.problems import BY_DEFAULT, PROBLEMS
    from autopeft.benchmarks.race.surrogate import NoTableError

    names = list(dict.fromkeys(problems or BY_DEFAULT))
    asked = names_of(searchers)
    check_names("problem", names, PROBLEMS)
    check_names("searcher", asked, races.ARMS)
    try:
        built = {name: PROBLEMS[name]() for name in names}
    except NoTableError as error:
        raise ConfigurationError(str(error)) from None
    for searcher, name in product(asked, names):
        try:
            races.ARMS[searcher](built[name].problem, 0)
        except ValueError as error:
            raise ConfigurationError(f"{searcher} on {name}: {error}") from None
    if clocked is not None:
        from autopeft.benchmarks.race import clock

        histories = numbers_of("--clock", clocked, least=2)
        timed = partial(clock.clock, searchers=asked, histories=histories, batch=batch)
        _print_each(built, timed, len(asked) * len(histories) * clock.REPEATS, clock.to_markdown, as_json)
        return
    if surrogates is not None:
        from autopeft.benchmarks.race import models
        from autopeft.searchers.bo.surrogate import KERNELS

        counts = numbers_of("--surrogates", surrogates, least=2)
        fitted = partial(models.compare, counts=counts)
        _print_each(built, fitted, len(counts) * len(KERNELS) * models.REPEATS, models.to_markdown, as_json)
        return
    if outlook:
        from autopeft.benchmarks.forecasts import Forecast, forecasts, to_markdown

        forecast: list[Forecast] = []
        with BenchView() as view:
            view.plan(seeds * len(names))
            for race in races.planned(names, ("bo",), seeds, trials, batch, "cheapest_as_good"):
                forecast += forecasts(race, built[race.problem])
                view.advance(1)
        print_result(as_json, lambda: list(map(asdict, forecast)), lambda: to_markdown(forecast))
        return
    planned = races.planned(names, asked, seeds, trials, batch, goal)
    with BenchView() as view, file_errors():
        lacking = races.missing(planned, races.read(results))
        view.plan(len(lacking))
        if lacking:
            view.stage(f"{len(lacking)} of {len(planned)} races")
        races.run_all(lacking, results, workers, lambda _: view.advance(1))
    keys = {name: problem.key for name, problem in built.items()}
    ended = [
        e
        for e in races.read(results)
        if (e.race.batch, e.race.goal) == (batch, goal) and e.problem_key == keys.get(e.race.problem)
    ]
    curves = {name: found for name, found in report.curves_of(ended).items() if name in names}
    tables = [report.table_of(name, built[name].summary, curves[name]) for name in names]
    if picture is not None:
        with file_errors():
            report.picture({name: curves[name] for name in names}, picture)
    print_result(as_json, lambda: report.to_dict(tables, batch, goal), lambda: report.to_markdown(tables, batch, goal))


def _print_each(
    problems: Mapping[str, RaceProblem],
    measure: Callable[..., Sequence[Any]],
    steps: int,
    to_markdown: Callable[[str, Sequence[Any]], str],
    as_json: bool,
) -> None:
    """Print the results of `measure` on each problem, which take `steps` steps each."""
    found = {}
    with BenchView() as view:
        view.plan(len(problems) * steps)
        for name, problem in problems.items():
            view.stage(name)
            found[name] = measure(problem, advance=lambda: view.advance(1))
    print_result(
        as_json,
        lambda: {name: [asdict(entry) for entry in entries] for name, entries in found.items()},
        lambda: "\n".join(to_markdown(name, entries) for name, entries in found.items()),
    )


def tabulate(
    output: Annotated[Path, typer.Option("--output", help="The table: a CSV file; missing rows are added.")],
    study: Annotated[Path | None, typer.Argument(metavar="[STUDY]", help=STUDY_HELP)] = None,
    set_: SetOption = None,
    candidates: Annotated[int, typer.Option("--candidates", min=1, help="Random candidates to train.")] = 330,
    repeated: Annotated[
        int, typer.Option("--repeated", min=0, help="Candidates to train with two more seeds each.")
    ] = 40,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draws.")] = 0,
) -> None:
    """Train random candidates of a study's space in full and add the results to a table; skip those that it has."""
    from autopeft.benchmarks.race import collect, table
    from autopeft.studies.engine.check import check
    from autopeft.studies.engine.session import evaluator_for

    settings = load_study_or_table(study, set_ or ())
    splits, _, space = check(settings)
    with BenchView() as view, file_errors():
        view.stage("loading")
        evaluator = evaluator_for(settings, splits)
        try:
            collect.write_provenance(output, collect.provenance(settings, space, seed))
        except ValueError as error:
            raise ConfigurationError(str(error)) from None
        lacking = collect.missing(space, table.read(output), seed=seed, candidates=candidates, repeated=repeated)
        view.plan(len(lacking))
        view.stage(f"{len(lacking)} trainings")
        collect.collect(evaluator, output, lacking, lambda: view.advance(1))
    failed = collect.missing(space, table.read(output), seed=seed, candidates=candidates, repeated=repeated)
    lacks = f", {len(failed)} failed" if failed else ""
    echo(f"{output}: {len(table.read(output))} rows{lacks}")
