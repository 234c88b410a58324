"""Commands about the results of a study: `pareto` and `export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autopeft.studies.cli.options import JsonOption, SetOption, StudyArgument, print_json
from autopeft.studies.cli.streams import echo, on_stdout
from autopeft.studies.errors import ConfigurationError

if TYPE_CHECKING:
    from autopeft.studies.analysis.snapshot import Snapshot
    from autopeft.studies.config.study_file import StudyFile
    from autopeft.studies.storage.ledger import Ledger

PickOption = Annotated[
    str, typer.Option("--pick", help="Candidate: recommended, best, trial:N, or a condition such as num_params<=50000.")
]
TargetOption = Annotated[
    str, typer.Option("--to", help="Format: native, peft, peft-patterns, trl-script, axolotl or merged.")
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", help="Folder to write; default: exports/PICK-FORMAT in the study's output folder."),
]
LossyOption = Annotated[
    bool, typer.Option("--allow-lossy", help="Export even if the format loses parts of the recipe.")
]
#: Columns for the architecture where the width of a table is free.
LEAST_TEXT = 40
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an earlier export.")]


def pareto(study: StudyArgument, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """Print the front so far, best quality first, with standard errors and the recommendation."""
    from autopeft.studies.reports.report import front_data

    _, _, snapshot = recorded(study, set_)
    if as_json:
        say_left_out(snapshot)
        print_json(front_data(snapshot, snapshot.front()))
    else:
        print_front(snapshot)


def say_left_out(snapshot: Snapshot) -> None:
    """Name the trials that are left out, on stderr."""
    from autopeft.studies.analysis.comparable import left_out_notes

    for note in left_out_notes(snapshot.left_out):
        echo(note, err=True)


def recorded(study: Path, set_: list[str] | None) -> tuple[StudyFile, Ledger, Snapshot]:
    """Return a study from its ledger: the settings that it was run with, the ledger and a snapshot."""
    from autopeft.studies.config.loading import load_study
    from autopeft.studies.engine.session import open_ledger, read_snapshot, recorded_settings

    settings = load_study(study, set_ or ())
    ledger = open_ledger(settings)
    settings = recorded_settings(settings, ledger)
    return settings, ledger, read_snapshot(settings, ledger)


def print_front(snapshot: Snapshot) -> None:
    """Print the front and the tuned baselines as a table, and one of the metrics that are only reported."""
    from rich.console import Console, JustifyMethod
    from rich.markup import escape
    from rich.table import Table

    from autopeft.studies.analysis.mixture_verdicts import verdicts
    from autopeft.studies.cli.progress import measured
    from autopeft.studies.reports.report import front_notes

    found = snapshot.front()
    rows = snapshot.best_first(found.rows)
    members = [row for row in rows if row.on_front]
    preliminary = snapshot.preliminary
    front, star = ("preliminary front", "(*)") if preliminary else ("front", "*")
    table = Table(
        title=f"{snapshot.study}: {len(members)} candidates on the {front}, from {len(snapshot.evaluated)} evaluations"
    )
    table.add_column("")
    table.add_column("candidate", no_wrap=True)
    objectives = snapshot.objectives_by_name
    # The number of parameters is shown even where it is not an objective.
    names = list(dict.fromkeys([*objectives, "num_params"]))
    for name in (*names, "minus the best (95 %)", "standing", f"test {snapshot.quality}"):
        justify: JustifyMethod = "left" if name == "standing" else "right"
        table.add_column(escape(on_stdout(name)), justify=justify, no_wrap=True)
    table.add_column("architecture", overflow="fold")
    more = Table(title="reported")
    for name in ("", "candidate", *(measure.name for measure in snapshot.reported)):
        more.add_column(escape(on_stdout(name)), justify="right" if more.columns[1:] else "left", no_wrap=True)
    shown = (members, [row for row in rows if row.is_baseline and not row.on_front])
    for position, group in enumerate(shown):
        for row in group:
            gap, test = row.difference, row.test
            figures = [
                measured(objectives[name], row.values, row.std_err)
                if name in objectives
                else f"{row.values[name]:,.0f}"
                for name in names
            ]
            figures += [
                f"{gap.value:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})" if gap else "-",
                row.standing or "-",
                f"{test.value:.4f} ± {test.std_err:.4f}" if test else "-",
            ]
            mark = star if row.recommended else ""
            table.add_row(mark, *map(on_stdout, (row.label, *figures, row.summary)))
            figures = [measured(measure, row.values, row.std_err) for measure in snapshot.reported]
            more.add_row(mark, *map(on_stdout, (row.label, *figures)))
        if position == 0:
            table.add_section()
            more.add_section()
    console = Console()
    for made in (table, more) if snapshot.reported else (table,):
        # Without a terminal the width is free: a table cut at 80 columns is of no use in a log.
        wide = max(console.width, 160, Console(width=10_000).measure(made).minimum + LEAST_TEXT)
        Console(width=None if console.is_terminal else wide, highlight=False).print(made)
    for note in front_notes(snapshot, found):
        echo(f"{star} {note}" if note.startswith("Recommended:") else note)
    mixtures = verdicts(snapshot)
    if mixtures:
        echo("\nmixtures against their matched baselines")
    for line in (line for verdict in mixtures for line in verdict.lines(snapshot.metrics[snapshot.quality])):
        echo(f"  {line}")


def export(
    study: StudyArgument,
    pick: PickOption = "recommended",
    to: TargetOption = "native",
    out: OutOption = None,
    allow_lossy: LossyOption = False,
    force: ForceOption = False,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Export a candidate and its recipe in the format of another tool, with trained weights if the format has them."""
    from autopeft.search_space.spelling import did_you_mean
    from autopeft.studies.engine.exporting import export_trial
    from autopeft.studies.exporters import EXPORTERS
    from autopeft.studies.recipes.pick import pick as picked

    if to not in EXPORTERS:
        raise ConfigurationError(f"--to {to}: unknown format{did_you_mean(to, EXPORTERS)}")
    settings, ledger, snapshot = recorded(study, set_)
    say_left_out(snapshot)
    number = picked(snapshot, pick)
    folder, fit = export_trial(settings, ledger, snapshot, number, to, out, allow_lossy=allow_lossy, force=force)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    if as_json:
        found = {"fit": fit.level, "lost": list(fit.lost), "remarks": list(fit.remarks)}
        print_json({"trial": number, "target": to, **found, "folder": str(folder)})
        return
    echo(f"trial {number} as {to} ({fit.level}) in {folder}")
    for name in files:
        echo(f"  {name}")
    for line in fit.lost:
        echo(f"  lost: {line}")
    for line in fit.remarks:
        echo(f"  note: {line}")
    echo(f"train again:       autopeft train {folder / 'recipe.yaml'}")
    echo(f"check its promise: autopeft verify {folder / 'recipe.yaml'}")
