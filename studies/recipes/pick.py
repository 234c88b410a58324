"""Selection of a trial by the user: recommended, best, a number, or a condition."""

from __future__ import annotations

import re
from operator import ge, gt, le, lt

from autopeft.search_space.spelling import did_you_mean
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.errors import ConfigurationError, NoFeasibleCandidateError

_COMPARE = {"<=": le, ">=": ge, "<": lt, ">": gt}
_CONDITION = re.compile(r"([\w-]+?(?:@.+?)?)\s*(<=|>=|<|>)\s*([-+.\deE_]+)")


def pick(snapshot: Snapshot, choice: str) -> int:
    """Return the number of a trial by `choice`: recommended, best, trial:N, or a condition such as num_params<=50000.

    A condition selects the best member of the front that meets it. Raises ConfigurationError for an invalid choice, and
    NoFeasibleCandidateError if no member of the front qualifies.
    """
    rows = [row for row in snapshot.rows() if row.on_front]
    if not (rows or choice.startswith("trial:")):
        raise NoFeasibleCandidateError(f"--pick {choice}: the front has no member yet")
    quality = snapshot.objectives_by_name[snapshot.quality]
    if choice.startswith("trial:"):
        number = choice.removeprefix("trial:")
        complete = [entry.trial.number for entry in snapshot.entries()]
        if not number.isdigit() or int(number) not in complete:
            raise ConfigurationError(f"--pick {choice}: no complete trial has this number; {_shown(complete)}")
        return int(number)
    if choice == "recommended":
        rows = [row for row in rows if row.recommended]
    elif choice != "best":
        condition = _CONDITION.fullmatch(choice.strip())
        if condition is None:
            raise ConfigurationError(
                f"--pick {choice}: use recommended, best, trial:N, or a condition such as num_params<=50000"
            )
        name, sign, number = condition.groups()
        if any(name not in row.values for row in rows):
            raise ConfigurationError(
                f"--pick {choice}: {name} was not measured in this study{did_you_mean(name, rows[0].values)}"
            )
        rows = [row for row in rows if _COMPARE[sign](row.values[name], float(number))]
    if not rows:
        raise NoFeasibleCandidateError(f"--pick {choice}: no member of the front meets this condition")
    return min(rows, key=lambda row: quality.loss(row.values[quality.name])).trial


def _shown(numbers: list[int]) -> str:
    return f"complete trials are {', '.join(map(str, numbers[:20]))}" if numbers else "no trial is complete yet"
