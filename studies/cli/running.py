"""Commands that run a study or look at it: `plan`, `run`, `resume`, `status`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from autopeft.studies.cli.options import JsonOption, SetOption, StudyArgument, print_json
from autopeft.studies.cli.streams import echo, printable
from autopeft.studies.errors import UserError, cause

if TYPE_CHECKING:
    from autopeft.studies.analysis.snapshot import Snapshot
    from autopeft.studies.config.study_file import StudyFile

ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the study if it has been started.")]


def run(
    study: StudyArgument, set_: SetOption = None, resume: ResumeOption = False, as_json: JsonOption = False
) -> None:
    """Run a study: baselines, search and final front. Ctrl-C is safe: `autopeft resume` continues the study."""
    from autopeft.studies.config.loading import load_study
    from autopeft.studies.engine.session import was_started

    settings = load_study(study, set_ or ())
    run_study(settings, resume=resume and was_started(settings), as_json=as_json)


def resume(study: StudyArgument, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """Continue an interrupted study, or a finished one with a larger `search.trials`; finished trials are kept."""
    from autopeft.studies.config.loading import load_study

    run_study(load_study(study, set_ or ()), resume=True, as_json=as_json)


def run_study(settings: StudyFile, *, resume: bool, as_json: bool = False) -> None:
    """Start or resume a study and print its front."""
    from autopeft.studies.cli.files import checked
    from autopeft.studies.cli.progress import ProgressView
    from autopeft.studies.cli.results import print_front, say_left_out
    from autopeft.studies.engine.session import open_study
    from autopeft.studies.reports.report import front_data, write_report

    splits, _, _ = checked(settings)
    with interruptible(settings) as stop_if_asked, open_study(settings, splits, resume=resume) as study:
        space = study.problem.space
        for note in study.evaluator.notes_on(space.decode(space.largest())):
            echo(f"warning: {note}", err=True)
        with ProgressView(between=stop_if_asked) as view:
            snapshot = study.run(view)
        report = write_report(snapshot, settings.output_folder / "report")
    for problem in report.problems:
        echo(f"warning: {problem}", err=True)
    if as_json:
        say_left_out(snapshot)
        print_json(front_data(snapshot, snapshot.front()))
        return
    try:
        print_front(snapshot)
    except Exception as error:
        if isinstance(error, OSError):  # stdout itself
            raise
        echo(f"warning: the table of the front cannot be shown ({cause(error)}); the study has ended", err=True)
    for line in study.samples.lines() if study.samples else ():
        echo(printable(line))
    if report.files:
        names = [*(path.name for path in report.files), *(("samples.md",) if study.samples else ())]
        echo(f"\nreport    {report.files[0].parent}: {', '.join(names)}")
    if settings.tracking.enabled:
        from autopeft.studies.tracking.uri import ui_command

        echo(f"MLflow    {ui_command(settings.tracking_uri)}")
        echo("          filter of the front: tags.`autopeft.pareto` = 'true'")
    echo(f"export    autopeft export {settings.words} --pick recommended --to peft")


@contextmanager
def interruptible(settings: StudyFile) -> Iterator[Callable[[], None]]:
    """End the study between two steps on SIGINT and SIGTERM: print how to continue, exit with 130.

    Yields a function to call between two steps, as `stopping_between_steps` does.
    """
    from autopeft.studies.cli.progress import stopping_between_steps

    try:
        with stopping_between_steps(signal.SIGINT, signal.SIGTERM) as stop_if_asked:
            yield stop_if_asked
    except KeyboardInterrupt:
        echo(f"\ninterrupted; finished work is saved. Continue with: autopeft resume {settings.words}", err=True)
        sys.exit(130)
    except UserError:
        raise
    except Exception:
        from autopeft.studies.engine.session import was_started

        with suppress(Exception):  # the error itself says more
            if was_started(settings):
                echo(f"finished work is saved; `autopeft resume {settings.words}` goes on after this error:", err=True)
        raise


def status(study: StudyArgument, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """Show the progress of a study; safe while it runs."""
    from autopeft.studies.analysis.diagnostics import diagnostics, num_held_out
    from autopeft.studies.analysis.snapshot import state_counts
    from autopeft.studies.cli.results import recorded
    from autopeft.studies.config.loading import load_study
    from autopeft.studies.engine.session import as_started, is_running, was_started

    settings = load_study(study, set_ or ())  # the recorded settings lack a larger `search.trials` of `resume`
    settings = as_started(settings) if was_started(settings) else settings
    running = is_running(settings)  # before the ledger is read: a trial that has ended by then is not interrupted
    _, ledger, snapshot = recorded(study, set_)
    interrupted = 0 if running else len(snapshot.unfinished)
    curve = snapshot.hypervolume()
    latest = diagnostics(snapshot.trials)[-1:]
    if as_json:
        print_json(
            {
                "study": snapshot.study,
                "trials": dict(state_counts(snapshot.trials)),
                "interrupted": interrupted,
                "left_out": {str(number): why for number, why in snapshot.left_out.items()},
                "hypervolume": curve[-1] if curve else 0.0,
                "diagnostics": latest[0].to_dict() if latest else None,
            }
        )
        return
    members = sum(row.on_front for row in snapshot.rows())
    states = {
        **state_counts(snapshot.evaluated),
        "running": len(snapshot.unfinished) - interrupted,
        "interrupted": interrupted,
    }
    counts = [f"{count} {state}" for state, count in states.items() if count]
    echo(f"{snapshot.study}: evaluations: {', '.join(counts) or 'none yet'}")
    if interrupted:
        echo(f"  interrupted  no process runs this study; `autopeft resume {settings.words}` trains them again")
    for number, why in snapshot.left_out.items():
        echo(f"  left out     trial {number}: {why}")
    echo(f"  search       {_search_progress(snapshot, max(settings.search.trials, ledger.planned))}")
    echo(f"  front        {members} candidates{' (preliminary)' * snapshot.preliminary}")
    echo(f"  hypervolume  {curve[-1]:.6g}" if curve else "  hypervolume  none yet")
    train_s = sum(t.measurement.train_s for t in snapshot.evaluated if t.measurement)
    wall_s = sum(t.measurement.wall_s for t in snapshot.evaluated if t.measurement)
    if wall_s:
        echo(f"  time         {wall_s:,.0f} s of evaluations, {train_s / wall_s:.0%} of it in training steps")
    for found in latest:
        for heading, line in found.lines(num_held_out(snapshot.trials, found.trial, settings.search.batch)):
            echo(f"  {heading:<11}  {line}")


def _search_progress(snapshot: Snapshot, planned: int) -> str:
    """Describe how many of the planned trials have ended, and how many candidates were rejected besides them."""
    from autopeft.studies.analysis.outlook import num_searched

    ended = num_searched(snapshot.evaluated)
    rejected = sum(trial.state == "infeasible" for trial in snapshot.search_trials)
    # An earlier version did not record what `resume --set search.trials=...` asked for.
    line = f"{ended} of {max(ended, planned)} trials"
    return line + (f"; candidates rejected without training: {rejected}" if rejected else "")


def plan(study: StudyArgument, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """Estimate a study before it runs: size of the space, range of parameters, time, memory, export formats."""
    from autopeft.studies.cli.files import checked, losses
    from autopeft.studies.config.loading import load_study
    from autopeft.studies.engine.cost_estimate import estimate_study

    settings = load_study(study, set_ or ())
    splits, _, _ = checked(settings)
    found = estimate_study(settings, splits)
    if as_json:
        print_json({**found.to_dict(), **losses(splits)})
        return
    for note in found.notes:
        echo(f"warning: {note}", err=True)
    for line in found.lines():
        echo(line)
