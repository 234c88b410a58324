"""Arguments and options that several commands share, and how results are printed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

StudyArgument = Annotated[Path, typer.Argument(metavar="STUDY", help="Study file, or the folder of a study.yaml.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting: --set search.trials=5. May be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON, alone on stdout.")]


def print_json(data: Any) -> None:
    json.dump(data, sys.stdout, indent=2, ensure_ascii=False)
    print()
