"""Arguments and options that several commands share, and how results are printed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from autopeft.studies.errors import ConfigurationError

StudyArgument = Annotated[Path, typer.Argument(metavar="STUDY", help="Study file, or the folder of a study.yaml.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting: --set search.trials=5. May be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON, alone on stdout.")]


def names_of(text: str) -> list[str]:
    """The words between commas, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def numbers_of(option: str, text: str, least: int = 0) -> list[int]:
    """Whole numbers between commas, each once. Raises ConfigurationError."""
    words = names_of(text)
    if not words or not all(word.isdecimal() and int(word) >= least for word in words):
        raise ConfigurationError(
            f"{option} {text}: write whole numbers from {least} on, such as {least + 1},{least + 2}"
        )
    return [int(word) for word in words]


def print_json(data: Any) -> None:
    json.dump(data, sys.stdout, indent=2, ensure_ascii=False)
    print()
