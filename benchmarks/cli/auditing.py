"""`audit`: how well supernets and proxies without training rank candidates whose trainings are known."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autopeft.benchmarks.cli.speed import BenchView
from autopeft.search_space.spelling import did_you_mean
from autopeft.studies.cli.files import written
from autopeft.studies.cli.options import JsonOption, SetOption, print_json
from autopeft.studies.errors import ConfigurationError

if TYPE_CHECKING:
    from autopeft.evaluators.data.splits import Splits
    from autopeft.studies.config.study_file import StudyFile


def audit(
    arms: Annotated[
        list[str] | None, typer.Argument(metavar="[ARM]...", help="Proxies, and policies of a supernet; default: all.")
    ] = None,
    study: Annotated[
        Path | None, typer.Option("--study", help="Study file, or its folder; default: the demo's.")
    ] = None,
    set_: SetOption = None,
    table: Annotated[Path | None, typer.Option("--table", help="Known trainings; default: those of the demo.")] = None,
    epochs: Annotated[float, typer.Option("--epochs", min=0, help="Of a supernet's training.")] = 2.0,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Of each arm.")] = 2,
    results: Annotated[
        Path, typer.Option("--results", help="Keeps what every arm said; what is there is not asked again.")
    ] = Path("proxies.jsonl"),
    latency: Annotated[
        int, typer.Option("--latency", min=0, help="Instead: foretell and measure the latency of so many draws.")
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Score candidates whose trainings are known by every proxy, and report how well that ranks them."""
    from autopeft.benchmarks import proxy_audit as auditing
    from autopeft.benchmarks.race.table import SHIPPED, read
    from autopeft.evaluators.base import OutOfMemoryError
    from autopeft.evaluators.training.record import TrainingFailedError
    from autopeft.searchers.scored.ranking import LEAST_RANKED
    from autopeft.studies.config.loading import load_study
    from autopeft.studies.engine.check import check
    from autopeft.studies.engine.proxy_scores import NoScoresError
    from autopeft.studies.engine.session import packed_evaluator_for

    names = list(dict.fromkeys(arms or auditing.ARMS))
    unknown = [
        f"unknown arm {name!r}{did_you_mean(name, auditing.ARMS)}" for name in names if name not in auditing.ARMS
    ]
    if unknown:
        raise ConfigurationError("\n".join(unknown))
    path = study or Path(str(files("autopeft.studies.examples") / "demo.yaml"))
    settings = load_study(path, set_ or ())
    splits, _, space = check(settings)
    if latency:
        _foretell(settings, splits, latency, as_json)
        return
    rows = read(table or SHIPPED)
    every = auditing.references(rows, space.decode)
    # One training of a candidate says too little of it, where there are some with several.
    every = [reference for reference in every if reference.seeds > 1] or every
    if len(every) < LEAST_RANKED:
        raise ConfigurationError(
            f"{table or SHIPPED}: {len(every)} trainings; a ranking needs {LEAST_RANKED}"
            " (`python -m autopeft.benchmarks tabulate`)"
        )
    known = {(t.arm, t.epochs, t.seed) for t in auditing.fitting(auditing.read(results), settings, every)}
    lacking = [
        (name, seed)
        for name in names
        for seed in range(seeds)
        if (name, auditing.epochs_of(name, epochs), seed) not in known
    ]
    refused: dict[str, str] = {}
    with BenchView() as view, written():
        view.plan(len(lacking))
        if lacking:
            view.stage("loading")
            evaluator = packed_evaluator_for(settings, splits)
            reference_s = auditing.training_s(evaluator, every)
            for name, seed in lacking:
                view.stage(f"{name}, seed {seed}")
                try:
                    told = auditing.ask(settings, name, epochs, seed, evaluator, every, reference_s)
                    auditing.append(results, told)
                except (
                    TrainingFailedError,
                    OutOfMemoryError,
                    NoScoresError,
                ) as error:  # the other arms have their say all the same
                    refused[name] = str(error)
                view.advance(1)
    for name, reason in refused.items():
        typer.echo(f"{name} has no scores: {reason}", err=True)
    asked = [told for told in auditing.fitting(auditing.read(results), settings, every) if told.arm in names]
    reports = auditing.reports(asked, rows, every)
    if as_json:
        print_json([report.to_dict() for report in reports])
    else:
        typer.echo("\n".join(report.to_markdown() for report in reports), nl=False)


def _foretell(settings: StudyFile, splits: Splits, draws: int, as_json: bool) -> None:
    from autopeft.benchmarks.latency_model_audit import foretell
    from autopeft.searchers.scored.ranking import LEAST_RANKED
    from autopeft.studies.engine.session import packed_evaluator_for

    if draws < LEAST_RANKED:
        raise ConfigurationError(f"--latency {draws}: a ranking needs {LEAST_RANKED} draws")
    with BenchView() as view:
        view.plan(draws)
        view.stage("latencies")
        found = foretell(settings, packed_evaluator_for(settings, splits), draws, lambda: view.advance(1))
    if as_json:
        print_json(found.to_dict())
    else:
        typer.echo(found.to_markdown(), nl=False)
