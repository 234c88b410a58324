"""The report files of a study: the front as page, picture, table and data, training curves, hypervolume."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autopeft.search_space.problem import Metric
from autopeft.studies.analysis.mixture_verdicts import Verdict, verdicts
from autopeft.studies.analysis.snapshot import Snapshot


def front_data(snapshot: Snapshot) -> list[dict[str, Any]]:
    """The members of the front, best quality first, as `autopeft pareto --json` prints them."""
    keys = {trial.number: trial.candidate.key for trial in snapshot.trials}
    members = sorted(
        (row for row in snapshot.rows() if row.on_front),
        key=lambda row: snapshot.objectives_by_name[snapshot.quality].loss(row.values[snapshot.quality]),
    )
    return [
        {
            "trial": row.trial,
            "key": keys[row.trial],
            "values": dict(row.values),
            "std_err": dict(row.std_err),
            "recommended": row.recommended,
            "summary": row.summary,
        }
        for row in members
    ]


def write_report(snapshot: Snapshot, folder: Path) -> list[Path]:
    """Write `front.html`, `front.png`, `front.csv`, `front.json`, `curves.png`, `hypervolume.png` and, where mixtures
    were compared with something, `routing.json`.

    Returns the files; none as long as there is no complete trial. Raises OSError.
    """
    from autopeft.studies.reports.page import front_html
    from autopeft.studies.reports.pictures import curves_png, front_png, hypervolume_png

    rows = snapshot.rows()
    if not rows:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"study": snapshot.study, "num_evaluations": len(snapshot.ended)}
    found = verdicts(snapshot)
    sections = [_routing(found, snapshot.metrics[snapshot.quality])] if found else []
    front_html(rows, snapshot.objectives, folder / "front.html", sections=sections, **about)
    front_png(rows, snapshot.objectives, folder / "front.png", **about)
    (folder / "front.json").write_text(json.dumps(front_data(snapshot), indent=2) + "\n", encoding="utf-8")
    _write_csv(snapshot, folder / "front.csv")
    if found:
        told = json.dumps([verdict.to_dict() for verdict in found], indent=2)
        (folder / "routing.json").write_text(told + "\n", encoding="utf-8")
    numbers = [row.trial for row in rows if row.on_front]
    curves_png(snapshot.search_trials, numbers, folder / "curves.png", study=snapshot.study)
    files = ["front.html", "front.png", "front.json", "front.csv", "curves.png"] + ["routing.json"] * bool(found)
    corner = snapshot.reference()
    if corner is not None:
        values = snapshot.hypervolume()
        hypervolume_png(values, corner.tolist(), snapshot.objectives, folder / "hypervolume.png", study=snapshot.study)
        files.append("hypervolume.png")
    return [folder / name for name in files]


def _routing(found: Sequence[Verdict], quality: Metric) -> tuple[str, list[str], Any]:
    """The section of the page about mixtures."""
    from autopeft.studies.reports.routing_picture import routing_figure

    # The figure has the differences with their intervals; the words are the verdicts.
    words = [verdict.lines(quality)[0] for verdict in found]
    return "Mixtures against what they are compared with", words, routing_figure(found, quality)


def _write_csv(snapshot: Snapshot, path: Path) -> None:
    """Every candidate and tuned baseline, one line each."""
    rows = snapshot.rows()
    names = sorted({name for row in rows for name in row.values})
    errors = sorted({name for row in rows for name in row.std_err})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["trial", "label", "role", "on_front", "recommended", *names, *(f"{n}_std_err" for n in errors), "summary"]
        )
        for row in rows:
            writer.writerow(
                [row.trial, row.label, str(row.role), row.on_front, row.recommended]
                + [row.values.get(name) for name in names]
                + [row.std_err.get(name) for name in errors]
                + [row.summary]
            )
