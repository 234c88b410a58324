"""`perturb`, `rungs`: replays of recorded searches, and of recorded trainings under rules for the rungs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autopeft.benchmarks.cli.shared import BenchView, print_result
from autopeft.studies.cli.options import JsonOption, SetOption


def perturb(
    studies: Annotated[
        list[Path], typer.Argument(metavar="STUDY...", help="Study files, or folders with a study.yaml.")
    ],
    set_: SetOption = None,
    by: Annotated[float, typer.Option("--by", min=0, max=0.5, help="Largest relative change of a loss.")] = 1e-6,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Replays of each study, each perturbed anew.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Replay the search of finished studies over their recorded losses, slightly changed, and compare the trials."""
    from autopeft.benchmarks import replay
    from autopeft.studies.config.loading import load_study

    recordings = [replay.Recording.of(load_study(study, set_ or ())) for study in studies]
    found = []
    with BenchView() as view:
        view.plan(len(recordings) * (repeats + 1))
        for recording in recordings:
            view.stage(recording.study)
            found.append(replay.stability(recording, by, repeats, lambda: view.advance(1)))
    print_result(as_json, lambda: replay.to_dict(found, by), lambda: replay.to_markdown(found, by))


def rungs(
    table: Annotated[Path | None, typer.Option("--table", help="Table of trainings; default: the shipped one.")] = None,
    replays: Annotated[int, typer.Option("--replays", min=1, help="Draws of candidates.")] = 300,
    as_json: JsonOption = False,
) -> None:
    """Replay recorded trainings under rules for the rungs: who survives, and what it costs."""
    from autopeft.benchmarks import rungs as replaying
    from autopeft.benchmarks.race.table import SHIPPED, read

    found = replaying.summaries(read(table or SHIPPED), replays=replays)
    print_result(as_json, lambda: replaying.to_dict(found), lambda: replaying.to_markdown(found))
