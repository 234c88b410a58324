"""Which trial of a study a user means: recommended, best, a number, or a condition."""

from __future__ import annotations

import re
from operator import ge, gt, le, lt

from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.errors import ConfigurationError, NoFeasibleCandidateError

_COMPARE = {"<=": le, ">=": ge, "<": lt, ">": gt}
_CONDITION = re.compile(r"([\w-]+?)\s*(<=|>=|<|>)\s*([-+.\deE_]+)")


def pick(snapshot: Snapshot, wish: str) -> int:
    """The trial that `wish` names: recommended, best, trial:N, or a condition as num_params<=50000 (the best of the
    front that meets it). Raises ConfigurationError for a wish that makes no sense and NoFeasibleCandidateError.
    """
    rows = [row for row in snapshot.rows() if row.on_front]
    quality = snapshot.objectives_by_name[snapshot.quality]
    if wish.startswith("trial:"):
        number = wish.removeprefix("trial:")
        complete = [entry.trial.number for entry in snapshot.entries()]
        if not number.isdigit() or int(number) not in complete:
            raise ConfigurationError(f"{wish}: no complete trial has that number; {_known(complete)}")
        return int(number)
    if wish == "recommended":
        rows = [row for row in rows if row.recommended]
    elif wish != "best":
        condition = _CONDITION.fullmatch(wish.strip())
        if condition is None:
            raise ConfigurationError(
                f"--pick {wish}: use recommended, best, trial:N, or a condition as num_params<=50000"
            )
        name, sign, number = condition.groups()
        if any(name not in row.values for row in rows):
            raise ConfigurationError(f"--pick {wish}: {name} was not measured in this study")
        rows = [row for row in rows if _COMPARE[sign](row.values[name], float(number))]
    if not rows:
        raise NoFeasibleCandidateError(f"--pick {wish}: no member of the front qualifies")
    return min(rows, key=lambda row: quality.loss(row.values[quality.name])).trial


def _known(numbers: list[int]) -> str:
    return f"complete are {', '.join(map(str, numbers[:20]))}" if numbers else "none is complete yet"
