"""`adapters`: what every adapter type is worth, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autopeft.benchmarks.cli.shared import BenchView, print_result
from autopeft.studies.cli.files import check_names
from autopeft.studies.cli.options import JsonOption, names_of, numbers_of
from autopeft.studies.errors import ConfigurationError, UserError, file_errors


def adapters(
    model: Annotated[str, typer.Option("--model", help="encoder, llm, or a study file over your own.")] = "encoder",
    kinds: Annotated[
        str | None, typer.Option("--kinds", help="Types, separated by commas; default: all, or a dozen for llm.")
    ] = None,
    seeds: Annotated[
        str, typer.Option("--seeds", help="Fresh seeds of the best rates, separated by commas.")
    ] = "1,2,3",
    results: Annotated[
        Path, typer.Option("--results", help="File of results; what is in it is not measured again.")
    ] = Path("benchmarks/results/adapters.jsonl"),
    report_: Annotated[
        bool, typer.Option("--report", help="Measure nothing; write the tables of the results into docs/adapters.md.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train every adapter type in a small and a large setting at its best rate, and compare quality and cost."""
    from autopeft.benchmarks.adapters import report, runs
    from autopeft.benchmarks.adapters.rows import HEAD, PARTS, RATES, Part, rows_of
    from autopeft.search_space.adapters import ADAPTERS
    from autopeft.studies.config.loading import load_study
    from autopeft.studies.engine.check import check

    if report_:
        with file_errors():
            try:
                report.write(runs.read(results))
            except ValueError as error:
                raise ConfigurationError(f"{report.PAGE}: {error}") from None
        return
    part = PARTS.get(model) or Part(Path(model))
    wanted = list(part.default_kinds) if kinds is None else names_of(kinds)
    check_names("adapter type", wanted, (HEAD, *ADAPTERS))
    numbers = numbers_of("--seeds", seeds, least=1)
    settings = load_study(part.study)
    with BenchView() as view, file_errors():
        view.stage("loading")
        splits, _, _ = check(settings)
        results.parent.mkdir(parents=True, exist_ok=True)
        bench = runs.Bench.of(settings, splits, results)
        rows = [row for row in rows_of(wanted) if bench.fits(row)]
        view.plan(len(rows) * (len(RATES) + len(numbers)))
        for row in rows:
            view.stage(f"{row.kind} {row.setting}".strip())
            bench.measure(row, numbers, lambda: view.advance(1))
    if bench.problems:
        raise UserError("\n".join([*bench.problems, "the rest is in the file; the same command tries these again"]))
    found = report.table_of(runs.read(results).of(bench.study, bench.inputs), bench.metrics)
    print_result(as_json, lambda: report.to_dict(found), lambda: report.to_markdown(found))
