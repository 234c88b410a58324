"""`promises`: how often recipes keep what they promise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autopeft.benchmarks.cli.shared import BenchView, print_result
from autopeft.studies.cli.options import JsonOption


def promises(
    studies: Annotated[
        list[Path], typer.Argument(metavar="STUDY...", help="Study files, or folders with a study.yaml.")
    ],
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="New seeds for each recipe.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Train the finalists of finished studies with new seeds, and compare their test scores with the promises."""
    from autopeft.benchmarks import promises as kept
    from autopeft.studies.config.loading import load_study

    loaded = [load_study(study) for study in studies]
    found = []
    with BenchView() as view:
        view.plan(sum(len(list(kept.recipes(settings))) for settings in loaded))
        for settings in loaded:
            view.stage(settings.study)
            found += kept.check(settings, seeds, lambda: view.advance(1))
    print_result(as_json, lambda: kept.to_dict(found), lambda: kept.to_markdown(found))
