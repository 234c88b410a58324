"""`rungs`: rules for the rungs over recorded trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autopeft.benchmarks.cli.shared import print_result
from autopeft.studies.cli.options import JsonOption


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
