"""The report files of a study: the front as page, picture, table and data; training curves; hypervolume."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autopeft.evaluators.atomic import atomic_write, atomic_write_text
from autopeft.search_space.metrics import Metric
from autopeft.studies.analysis.comparable import left_out_notes
from autopeft.studies.analysis.front import Front, FrontRow
from autopeft.studies.analysis.gains import gains, other_qualities
from autopeft.studies.analysis.mixture_verdicts import Verdict, verdicts
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.errors import cause


@dataclass(frozen=True, slots=True)
class Report:
    """The files that were written, and the causes why others were not, by file."""

    files: list[Path]
    failed: dict[Path, str]

    @property
    def problems(self) -> list[str]:
        """A line for each file that could not be made."""
        return [f"{path}: cannot be made ({why}); the results are in the ledger" for path, why in self.failed.items()]


def front_data(snapshot: Snapshot, front: Front) -> list[dict[str, Any]]:
    """Return the members of the front, best quality first, as `autopeft pareto --json` prints them.

    `preliminary`: see `Snapshot.preliminary`; it is the same for all members. `reason`: why the recommended member is
    recommended. `gains`: that member against the baselines by rule, where the study has any.
    """
    against = [gain.to_dict() for gain in gains(snapshot, front)]
    keys = {trial.number: trial.candidate.key for trial in snapshot.trials}
    return [
        {
            **row.to_dict(snapshot.quality),
            "key": keys[row.trial],
            "preliminary": snapshot.preliminary,
            **({"reason": front.reason} if row.recommended else {}),
            **({"gains": against} if row.recommended and against else {}),
        }
        for row in snapshot.best_first(front.members)
    ]


def front_notes(snapshot: Snapshot, front: Front) -> list[str]:
    """Return sentences on the front: the recommendation, its reason and gains, what is preliminary or missing."""
    notes = left_out_notes(snapshot.left_out)
    if snapshot.nothing_learnt is not None:
        notes.append(f"Nothing learnt: {snapshot.nothing_learnt}.")
    if front.reason is not None:
        notes.append(f"Recommended: {front.reason}")
    notes += other_qualities(snapshot, front)
    notes += [gain.sentence for gain in gains(snapshot, front)]
    if front.reason is not None and snapshot.preliminary:
        notes.append(
            "The recommendation is preliminary: single runs favour candidates with a lucky seed. Missing: runs of the"
            " finalists with fresh seeds, which the study trains at its end."
        )
    if front.reason is not None:
        notes.append(
            "±: standard error over examples and seeds; as good: shown to be within the margin of the best; tied: not"
            " distinguished from the best, but not shown to be as good either."
        )
    outlook, found = snapshot.outlook, front.recommendation
    if outlook is not None and found is not None and outlook.is_about(found, snapshot.evaluated):
        notes.append(outlook.sentence)
    if front.left_out:
        shown = ", ".join(map(str, front.left_out[:10])) + ", ..." * (len(front.left_out) > 10)
        notes.append(
            f"{len(front.left_out)} members of the search's front were not trained again (trials {shown}): the study"
            " has at most finalists.most of them."
        )
    return notes


def write_report(snapshot: Snapshot, folder: Path) -> Report:
    """Write the report's files; without a complete trial, write none. A file that cannot be made stops no other one.

    They are `front.html`, `front.png`, `front.csv`, `front.json` and `curves.png`; `hypervolume.png` where there is a
    feasible trial, and `routing.json` where mixtures have matched baselines. Each is whole at every moment.
    """
    report = Report([], {})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, write in _writers(snapshot):
            try:
                write(folder / name)
                report.files.append(folder / name)
            except Exception as error:  # the results are in the ledger, whatever a picture lacks
                report.failed[folder / name] = cause(error)
    except Exception as error:
        report.failed[folder] = cause(error)
    return report


def _writers(snapshot: Snapshot) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Yield the name of each file, and the function that writes it to a path."""
    from autopeft.studies.reports import page, pictures

    front, study, objectives = snapshot.front(), snapshot.study, snapshot.objectives
    rows = front.rows
    if not rows:
        return
    about: dict[str, Any] = {"study": study, "num_evaluations": len(snapshot.evaluated)}
    found = verdicts(snapshot)

    def front_html(path: Path) -> None:
        sections = [_routing(found, snapshot.metrics[snapshot.quality])] if found else []
        notes = front_notes(snapshot, front)
        more = snapshot.reported
        page.front_html(rows, objectives, path, reported=more, notes=notes, sections=sections, **about)

    yield "front.html", front_html
    yield "front.png", lambda path: pictures.front_png(rows, objectives, path, **about)
    yield "front.json", lambda path: _write_json(front_data(snapshot, front), path)
    yield "front.csv", lambda path: _write_csv(rows, snapshot.quality, path)
    numbers = [row.trial for row in front.members]
    yield "curves.png", lambda path: pictures.curves_png(snapshot.search_trials, numbers, path, study=study)
    if found:
        yield "routing.json", lambda path: _write_json([verdict.to_dict() for verdict in found], path)
    corner = snapshot.reference()
    if corner is not None:
        worst = corner.tolist()
        yield (
            "hypervolume.png",
            lambda path: pictures.hypervolume_png(snapshot.hypervolume(), worst, objectives, path, study=study),
        )


def _routing(found: Sequence[Verdict], quality: Metric) -> tuple[str, list[str], Any]:
    """Return the section of the page about mixtures: heading, paragraphs and figure."""
    from autopeft.studies.reports.routing_picture import routing_figure

    # The figure has the differences with their intervals, so the results suffice as text.
    paragraphs = [verdict.lines(quality)[0] for verdict in found]
    return "Mixtures against their matched baselines", paragraphs, routing_figure(found, quality)


def _write_json(data: Any, path: Path) -> None:
    atomic_write_text(path, json.dumps(data, indent=2) + "\n")


def _write_csv(rows: Sequence[FrontRow], quality: str, path: Path) -> None:
    """Write a line for every candidate and tuned baseline."""
    numbers = [row.numbers(quality) for row in rows]
    names = sorted({name for found in numbers for name in found})
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "label", "role", "on_front", "recommended", "standing", *names, "summary"])
        for row, found in zip(rows, numbers, strict=True):
            writer.writerow(
                [row.trial, row.label, str(row.role), row.on_front, row.recommended, row.standing]
                + [found.get(name) for name in names]
                + [row.summary]
            )
