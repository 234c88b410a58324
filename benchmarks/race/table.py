"""The tabular benchmark: evaluations of one study's space at full fidelity, as a CSV file.

One row per training: the searcher's genes (JSON), the seed, validation quality with its standard error, declared costs,
the held-out loss at rungs on the way, and the training loss of each step. The file only grows; its provenance is in the
JSON beside it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from autopeft.search_space.problem import DECLARED, Measurement
from autopeft.search_space.spaces.genes import Assignment

#: The table that the project ships, and the study over whose space it is.
SHIPPED = Path(str(files("autopeft.benchmarks.race"))) / "table.csv"
STUDY = SHIPPED.with_suffix(".yaml")
QUALITY = ("accuracy", "loss")
#: Shares of the training steps at which the held-out loss is recorded.
RUNGS = (0.15, 0.4)
COLUMNS = (
    "candidate", "seed", "genes", *QUALITY, *(f"{name}_std_err" for name in QUALITY), *DECLARED,
    *(f"loss_at_{share}" for share in RUNGS), "train_losses", "train_s",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """One training. `candidate`: the key of the candidate, the same for all its seeds."""

    candidate: str
    seed: int
    genes: Assignment
    measurement: Measurement

    @property
    def key(self) -> tuple[str, int]:
        """Candidate and seed."""
        return self.candidate, self.seed


def read(path: Path) -> list[TableRow]:
    """Read the rows of a table; none if there is no file yet."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(_rows(csv.DictReader(file)))


def _rows(lines: csv.DictReader[str]) -> Iterator[TableRow]:
    for line in lines:
        measurement = Measurement(
            values={name: float(line[name]) for name in (*QUALITY, *DECLARED)},
            std_err={name: float(line[f"{name}_std_err"]) for name in QUALITY},
            seed=int(line["seed"]),
            evaluator="packed",
            train_s=float(line["train_s"]),
            losses=tuple(map(float, line["train_losses"].split())),
            rungs=tuple((share, {"loss": float(line[f"loss_at_{share}"])}) for share in RUNGS),
        )
        yield TableRow(
            candidate=line["candidate"],
            seed=int(line["seed"]),
            genes=json.loads(line["genes"]),
            measurement=measurement,
        )


def by_candidate(rows: Iterable[TableRow]) -> dict[str, list[TableRow]]:
    """Group rows by candidate, in their order."""
    found: dict[str, list[TableRow]] = {}
    for row in rows:
        found.setdefault(row.candidate, []).append(row)
    return found


def append(path: Path, rows: Sequence[TableRow]) -> None:
    """Append rows; write the header before the first ones of a table."""
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(_line(row) for row in rows)


def _line(row: TableRow) -> dict[str, object]:
    m = row.measurement
    at_rung = {share: values["loss"] for share, values in m.rungs}
    return {
        "candidate": row.candidate,
        "seed": row.seed,
        "genes": json.dumps(row.genes),
        **{name: f"{m.values[name]:.6g}" for name in QUALITY},
        **{f"{name}_std_err": f"{m.std_err[name]:.4g}" for name in QUALITY},
        **{name: int(m.values[name]) for name in DECLARED},
        **{f"loss_at_{share}": f"{at_rung[share]:.6g}" for share in RUNGS},
        "train_losses": " ".join(f"{loss:.4g}" for loss in m.losses),
        "train_s": f"{m.train_s:.3f}",
    }
