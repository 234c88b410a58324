"""Every trial of a study as one row of a table."""

from __future__ import annotations

from typing import Any

from autopeft.studies.analysis.snapshot import Snapshot


def trial_rows(snapshot: Snapshot) -> list[dict[str, Any]]:
    """In the order of the ledger: what it was for, how it ended, values with standard errors, and its genes by name.

    Values are those of this one evaluation; the front's are means over all evaluations of a candidate. Only trials of
    the search have genes; other trials and genes that are not active have no entry there.
    """
    members = {row.trial: row for row in snapshot.rows()}
    rows = []
    for trial in snapshot.trials:
        member, measurement = members.get(trial.number), trial.measurement
        row: dict[str, Any] = {
            "trial": trial.number,
            "role": str(trial.role),
            "state": trial.state,
            "of": trial.of,
            "seed": trial.seed,
            "on_front": member is not None and member.on_front,
            "recommended": member is not None and member.recommended,
            "error": trial.error,
        }
        if measurement is not None:
            row |= measurement.values
            row |= {f"{name}_std_err": error for name, error in measurement.std_err.items()}
            row |= {"share": measurement.share, "wall_s": measurement.wall_s, "train_s": measurement.train_s}
        rows.append({**row, **trial.genes})
    return rows
