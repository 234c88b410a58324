"""The app, and `main`, which turns exceptions into exit codes.

A command is a function in a module of this package, listed in `COMMANDS`; its docstring is the text of `--help`. The
modules import torch, Optuna, MLflow and other slow packages inside functions, so that `autopeft --help` is fast.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import typer

from autopeft.studies.cli.data import data
from autopeft.studies.cli.doctor import doctor
from autopeft.studies.cli.files import init, schema, validate
from autopeft.studies.cli.results import export, pareto
from autopeft.studies.cli.retraining import train, verify
from autopeft.studies.cli.running import plan, resume, run, status
from autopeft.studies.cli.streams import adapted_streams, echo
from autopeft.studies.errors import UnusableEnvironmentError, UserError

DEBUG = "AUTOPEFT_DEBUG"

COMMANDS: tuple[Callable[..., Any], ...] = (
    init, validate, data, plan, run, resume, status, pareto, export, train, verify, schema, doctor,
)  # fmt: skip


def make_app(name: str, help_text: str, commands: Sequence[Callable[..., Any]]) -> typer.Typer:
    """Return an app with `commands`, in the order of `--help`."""
    app = typer.Typer(
        name=name, help=help_text, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
    )
    for command in commands:
        app.command()(command)
    return app


app = make_app(
    "autopeft",
    "Search adapter types, ranks, placement and training settings for a frozen transformer; the result is a Pareto "
    "front of quality and cost.",
    COMMANDS,
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command of `autopeft` and exit."""
    run_app(app, "autopeft", arguments)


def run_app(app: typer.Typer, name: str, arguments: Sequence[str] | None) -> NoReturn:
    """Run a command of `app` and exit.

    Exit codes: 0 success, 1 failure, 2 wrong usage or configuration, 3 no feasible candidate, 4 unusable environment,
    130 interrupted.
    """
    # torch's threads spin while they wait for each other. On cores that other programs use too, a training step then
    # takes six times as long (docs/performance.md); on idle ones sleeping costs nothing. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # These warnings are addressed to developers of libraries; a user cannot act on them.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, for studies that do not need it too
    try:
        with adapted_streams():
            app(args=arguments, prog_name=name)
    except Exception as error:
        if os.environ.get(DEBUG, "0") not in ("", "0"):
            raise
        with adapted_streams():
            echo(explain(error), err=True)
        sys.exit(exit_code(error))
    sys.exit(0)


def exit_code(error: Exception) -> int:
    """Return the exit code of an error."""
    if isinstance(error, UserError):
        return error.exit_code
    return UnusableEnvironmentError.exit_code if isinstance(error, ModuleNotFoundError) else UserError.exit_code


def explain(error: Exception) -> str:
    """Return the text that a user sees of an error."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is missing; `autopeft doctor` checks all of them"
    return f"{type(error).__name__}: {error}\n({DEBUG}=1 prints the traceback)"


if __name__ == "__main__":
    main()
