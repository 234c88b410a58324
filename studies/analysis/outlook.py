"""What more time would buy: the chance that a further batch of the search holds something cheaper that is as good."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from autopeft.search_space.problem import SEARCH, Trial
from autopeft.studies.analysis.recommendation import Recommendation
from autopeft.studies.errors import ConfigurationError
from autopeft.studies.versions import newer


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """The chance, by the searcher's model, that one of its next `trials` is as good as the best and costs less.

    It is about the member `recommended` with this margin `after` so many evaluations of the search. `minutes`: what the
    trials would take, at the speed of the search so far.
    """

    recommended: int
    after: int
    margin: float
    trials: int
    minutes: float
    chance: float

    @classmethod
    def read(cls, data: Mapping[str, Any] | None) -> Outlook | None:
        """Return the outlook of plain data, as `asdict` makes it. Raises ConfigurationError for unknown fields."""
        if unknown := (data or {}).keys() - {field.name for field in fields(cls)}:
            raise ConfigurationError(newer(f"the outlook in the ledger has the field {min(unknown)!r}"))
        return None if data is None else cls(**data)

    def is_about(self, found: Recommendation, evaluated: Iterable[Trial]) -> bool:
        """Return whether nothing has changed since: the recommended member, the evaluations, the margin."""
        now = found.recommended, num_searched(evaluated), found.margin
        return (self.recommended, self.after, self.margin) == now

    @property
    def sentence(self) -> str:
        """The outlook for reports."""
        minutes = f"{self.minutes:.0f} min" if self.minutes >= 1 else "less than a minute"
        return (
            f"More time: by the search's model, {self.trials} more trials (about {minutes}) hold a cheaper one that is"
            f" as good as the best with a chance of {self.chance:.0%}."
        )


def num_searched(evaluated: Iterable[Trial]) -> int:
    """Return the number of evaluations of the search."""
    return sum(trial.role == SEARCH for trial in evaluated)
