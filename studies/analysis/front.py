"""The front of a study as every report shows it: table, page, JSON, CSV, MLflow and recipes read these rows alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autopeft.search_space.problem import SEARCH, Role
from autopeft.studies.analysis.recommendation import Recommendation, Standing
from autopeft.studies.analysis.statistics import Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontRow:
    """One evaluated candidate as the reports show it. Values are in the metrics' own direction and unit."""

    trial: int
    label: str
    values: Mapping[str, float]
    #: Standard errors by metric name, where they are known.
    std_err: Mapping[str, float] = field(default_factory=dict)
    on_front: bool = False
    recommended: bool = False
    role: Role = SEARCH
    #: The architecture in a line or two.
    summary: str = ""
    #: Seeds of the runs that the values are means of.
    seeds: tuple[int, ...] = ()
    #: How a member of the front compares with the best one; None off the front.
    standing: Standing | None = None
    #: Quality minus that of the best member; None off the front and for the best.
    difference: Estimate | None = None
    #: Quality on the test split, with the interval for one more run with another seed; None if it was not scored.
    test: Estimate | None = None

    @property
    def is_baseline(self) -> bool:
        """Whether the candidate is a tuned baseline."""
        return self.role.kind == "baseline"

    def to_dict(self, quality: str) -> dict[str, Any]:
        """Return what reports write of this row, as plain data for JSON. `quality`: name of the compared metric."""
        return {
            "trial": self.trial,
            "label": self.label,
            "values": dict(self.values),
            "std_err": dict(self.std_err),
            "seeds": list(self.seeds),
            "recommended": self.recommended,
            "standing": self.standing,
            "difference": None if self.difference is None else interval(self.difference),
            "test": None if self.test is None else {quality: interval(self.test)},
            "summary": self.summary,
        }

    def numbers(self, quality: str) -> dict[str, float]:
        """Return every number of this row by a name of its own, for tables with one number per cell."""
        found = dict(self.values) | {f"{name}_std_err": error for name, error in self.std_err.items()}
        for name, estimate in ((f"{quality}_difference", self.difference), (f"test_{quality}", self.test)):
            if estimate is not None:
                own = interval(estimate)
                found |= {name + (f"_{part}" if part != "value" else ""): number for part, number in own.items()}
        return found


def interval(found: Estimate) -> dict[str, float]:
    """Return value, standard error and interval of an estimate."""
    return {"value": found.value, "std_err": found.std_err, "low": found.low, "high": found.high}


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """All candidates of a study with the front among them, and why one member is recommended.

    `rows`: every complete candidate, and each baseline with its best learning rate. `reason`: the recommendation in one
    or two sentences; both are None without a front. `left_out`: members of the search's front that were not trained
    again with fresh seeds, so they cannot be on this one.
    """

    rows: tuple[FrontRow, ...]
    recommendation: Recommendation | None = None
    reason: str | None = None
    left_out: tuple[int, ...] = ()

    @property
    def members(self) -> tuple[FrontRow, ...]:
        """The rows on the front."""
        return tuple(row for row in self.rows if row.on_front)
