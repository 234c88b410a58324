"""`speed`: speed-up over a loop over peft and Trainer, measured on this machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autopeft.benchmarks.cli.shared import STUDY_HELP, BenchView, load_study_or_table, print_result
from autopeft.studies.cli.options import JsonOption, SetOption

if TYPE_CHECKING:
    from autopeft.evaluators.data.splits import Splits
    from autopeft.studies.config.study_file import StudyFile


def speed(
    study: Annotated[Path | None, typer.Argument(metavar="STUDY", help=STUDY_HELP)] = None,
    set_: SetOption = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda; default: the study's.")] = None,
    candidates: Annotated[int, typer.Option("--candidates", min=2, help="Candidates that each arm trains.")] = 8,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Runs of each arm.")] = 3,
    ranking: Annotated[
        int, typer.Option("--ranking", min=0, help="Candidates to rank at early losses; 0: skip this.")
    ] = 24,
    seed: Annotated[int | None, typer.Option("--seed", help="Random seed; default: the study's.")] = None,
    experts: Annotated[
        bool, typer.Option("--experts", help="Measure only the cost of routing between experts.")
    ] = False,
    texts: Annotated[bool, typer.Option("--texts", help="Measure only the generation of texts (causal-lm).")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure the speed-up over a loop over peft and Trainer; exit with 1 and without figures if their work differs."""
    from autopeft.benchmarks.speed.benchmark import run_bench
    from autopeft.benchmarks.speed.report import to_markdown
    from autopeft.studies.engine.check import check

    changes = {"device": device, "seed": seed}
    own = [f"{key}={value}" for key, value in changes.items() if value is not None]
    settings = load_study_or_table(study, [*(set_ or ()), *own])
    splits, _, _ = check(settings)
    if experts:
        _experts(settings, splits, as_json)
        return
    if texts:
        _texts(settings, splits, rounds, as_json)
        return
    with BenchView() as view:
        result = run_bench(settings, splits, candidates=candidates, rounds=rounds, ranked=ranking, watch=view)
    print_result(as_json, result.to_dict, lambda: to_markdown(result))


def _experts(settings: StudyFile, splits: Splits, as_json: bool) -> None:
    from autopeft.benchmarks.speed.experts import PLACES, SLOTS, measure_experts, to_markdown
    from autopeft.search_space.training import Training
    from autopeft.studies.config.problem import space_for
    from autopeft.studies.engine.proxy_scores import middle_training
    from autopeft.studies.engine.session import packed_evaluator_for

    with BenchView() as view:
        view.stage("loading")
        evaluator = packed_evaluator_for(settings, splits)
        view.plan(2 * len(PLACES) * len(SLOTS))
        view.stage("steps with experts")
        training: Training = middle_training(settings, space_for(settings, evaluator.backbone))
        rows = measure_experts(evaluator, training, lambda: view.advance(1))
    print_result(as_json, lambda: [asdict(row) for row in rows], lambda: to_markdown(rows))


def _texts(settings: StudyFile, splits: Splits, rounds: int, as_json: bool) -> None:
    from autopeft.benchmarks.speed.texts import measure_texts, num_runs, to_markdown
    from autopeft.studies.engine.session import evaluator_for

    with BenchView() as view:
        view.stage("loading")
        evaluator = evaluator_for(settings, splits)
        view.plan(num_runs(rounds))
        view.stage("generating")
        rows = measure_texts(evaluator, rounds, lambda: view.advance(1))
    print_result(as_json, lambda: [asdict(row) for row in rows], lambda: to_markdown(rows))
