"""The problems that searchers race on, by name. Each is built when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from autopeft.studies.race import surrogate, synthetic
from autopeft.studies.race.base import RaceProblem

PROBLEMS: dict[str, Callable[[], RaceProblem]] = {
    "table": lru_cache(surrogate.tabulated),
    "per-layer": lru_cache(synthetic.per_layer),
    "types": lru_cache(synthetic.types),
    "autopeft": lru_cache(synthetic.autopeft),
    "three": lru_cache(synthetic.three),
}
