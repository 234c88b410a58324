"""A table with a row for every trial of a study."""

from __future__ import annotations

from typing import Any

from autopeft.studies.analysis.snapshot import Snapshot


def trial_rows(snapshot: Snapshot) -> list[dict[str, Any]]:
    """Return a row per trial, in the order of the ledger: role, state, values with standard errors, genes by name.

    Values are those of the single evaluation, whereas the front has means over all evaluations of a candidate. Only
    trials of the search have genes; inactive genes have no entry.
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
