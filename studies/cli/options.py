"""Arguments and options that several commands share, and how results are printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from autopeft.studies.cli.streams import echo, is_unicode
from autopeft.studies.errors import ConfigurationError

StudyArgument = Annotated[Path, typer.Argument(metavar="STUDY", help="Study file, or a folder with a study.yaml.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, such as search.trials=5; repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")]


def names_of(text: str) -> list[str]:
    """Return the words between commas, without repetitions."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def numbers_of(option: str, text: str, least: int = 0) -> list[int]:
    """Return the whole numbers between commas, without repetitions. Raises ConfigurationError."""
    words = names_of(text)
    if not words or not all(word.isdecimal() and int(word) >= least for word in words):
        raise ConfigurationError(
            f"{option} {text}: must be whole numbers of at least {least}, such as {least + 1},{least + 2}"
        )
    return [int(word) for word in words]


def print_json(data: Any) -> None:
    """Print data as indented JSON on stdout, with escapes where it does not take every character."""
    echo(json.dumps(data, indent=2, ensure_ascii=not is_unicode()))
