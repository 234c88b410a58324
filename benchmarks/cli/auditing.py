"""`audit`: how well supernets and proxies without training rank candidates of a table of trainings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autopeft.benchmarks.cli.shared import STUDY_HELP, BenchView, load_study_or_table, print_result
from autopeft.studies.cli.files import check_names
from autopeft.studies.cli.options import JsonOption, SetOption
from autopeft.studies.cli.streams import echo
from autopeft.studies.errors import ConfigurationError, file_errors

if TYPE_CHECKING:
    from autopeft.evaluators.data.splits import Splits
    from autopeft.studies.config.study_file import StudyFile


def audit(
    arms: Annotated[
        list[str] | None, typer.Argument(metavar="[ARM]...", help="Proxies, or policies of the supernet; default: all.")
    ] = None,
    study: Annotated[Path | None, typer.Option("--study", help=STUDY_HELP)] = None,
    set_: SetOption = None,
    table: Annotated[
        Path | None, typer.Option("--table", help="Table of trainings; default: benchmarks/race/table.csv.")
    ] = None,
    epochs: Annotated[float, typer.Option("--epochs", min=0, help="Epochs of a supernet's training.")] = 2.0,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Seeds of each arm.")] = 2,
    results: Annotated[Path, typer.Option("--results", help="File of scores; arms in it are not run again.")] = Path(
        "proxies.jsonl"
    ),
    latency: Annotated[
        int, typer.Option("--latency", min=0, help="Compare only predicted and measured latencies, of N candidates.")
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Score the candidates in a table of trainings with each proxy; report how well the scores rank them."""
    from autopeft.benchmarks import proxy_audit as auditing
    from autopeft.benchmarks.race.table import SHIPPED, read
    from autopeft.evaluators.base import OutOfMemoryError
    from autopeft.evaluators.training.record import TrainingFailedError
    from autopeft.searchers.scored.ranking import LEAST_RANKED
    from autopeft.studies.engine.check import check
    from autopeft.studies.engine.proxy_scores import NoScoresError
    from autopeft.studies.engine.session import packed_evaluator_for

    names = list(dict.fromkeys(arms or auditing.ARMS))
    check_names("arm", names, auditing.ARMS)
    settings = load_study_or_table(study, set_ or ())
    splits, _, space = check(settings)
    if latency:
        _audit_latency(settings, splits, latency, as_json)
        return
    rows = read(table or SHIPPED)
    every = auditing.references(rows, space.decode)
    # A single training is a noisy reference: candidates with several are preferred.
    every = [reference for reference in every if reference.seeds > 1] or every
    if len(every) < LEAST_RANKED:
        raise ConfigurationError(
            f"{table or SHIPPED}: has {len(every)} trainings, but a rank correlation needs {LEAST_RANKED}:"
            " `python -m autopeft.benchmarks tabulate` adds some"
        )
    present = {(e.arm, e.epochs, e.seed) for e in auditing.matching(auditing.read(results), settings, every)}
    lacking = [
        (name, seed)
        for name in names
        for seed in range(seeds)
        if (name, auditing.epochs_of(name, epochs), seed) not in present
    ]
    refused: dict[str, str] = {}
    with BenchView() as view, file_errors():
        view.plan(len(lacking))
        if lacking:
            view.stage("loading")
            evaluator = packed_evaluator_for(settings, splits)
            reference_s = auditing.training_s(evaluator, every)
            for name, seed in lacking:
                view.stage(f"{name}, seed {seed}")
                try:
                    scored = auditing.score(settings, name, epochs, seed, evaluator, every, reference_s)
                    auditing.append(results, scored)
                except (TrainingFailedError, OutOfMemoryError, NoScoresError) as error:  # the other arms go on
                    refused[name] = str(error)
                view.advance(1)
    for name, reason in refused.items():
        echo(f"{name} has no scores: {reason}", err=True)
    entries = [e for e in auditing.matching(auditing.read(results), settings, every) if e.arm in names]
    reports = auditing.reports(entries, rows, every)
    print_result(
        as_json,
        lambda: [report.to_dict() for report in reports],
        lambda: "\n".join(report.to_markdown() for report in reports),
    )


def _audit_latency(settings: StudyFile, splits: Splits, draws: int, as_json: bool) -> None:
    from autopeft.benchmarks.latency_model_audit import audit_latency
    from autopeft.searchers.scored.ranking import LEAST_RANKED
    from autopeft.studies.engine.session import packed_evaluator_for

    if draws < LEAST_RANKED:
        raise ConfigurationError(f"--latency {draws}: must be at least {LEAST_RANKED} for a rank correlation")
    with BenchView() as view:
        view.plan(draws)
        view.stage("latencies")
        found = audit_latency(settings, packed_evaluator_for(settings, splits), draws, lambda: view.advance(1))
    print_result(as_json, found.to_dict, found.to_markdown)
