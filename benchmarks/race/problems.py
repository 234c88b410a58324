"""The problems that searchers race on, by name. Each is built at its first use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from random import Random

from autopeft.benchmarks.race import surrogate, synthetic
from autopeft.benchmarks.race.base import RaceProblem
from autopeft.search_space.problem import SEARCH, Trial

#: Trials of a prior study, drawn at random.
NUM_PRIOR = 60


def _after(attn: Sequence[float], mlp: Sequence[float]) -> RaceProblem:
    """Return `per-layer` with a prior study of a task where the layers matter by the shares `attn` and `mlp`."""
    prior, now = synthetic.per_layer(attn, mlp), synthetic.per_layer()
    space, rng = now.problem.space, Random("an earlier study")
    trials = []
    for number in range(NUM_PRIOR):
        genes = space.sample(rng)
        measurement = prior.measurement(prior.values(genes), 0, number)
        trials.append(Trial(number=number, role=SEARCH, candidate=space.decode(genes), genes=genes, state="complete",
                            measurement=measurement, violation=-1.0))  # fmt: skip
    return replace(now, problem=replace(now.problem, prior=tuple(trials)))


def related() -> RaceProblem:
    """Return `per-layer` with a prior study of a task where mostly the same layers matter."""

    def mixed(row: Sequence[float]) -> list[float]:
        return [0.7 * here + 0.3 * there for here, there in zip(row, reversed(row), strict=True)]

    problem = _after(mixed(synthetic.ATTN), mixed(synthetic.MLP))
    return replace(problem, name="related", summary="`per-layer` after 60 random trials of a related task")


def misled() -> RaceProblem:
    """Return `per-layer` with a prior study in which the wrong layers matter."""
    problem = _after(synthetic.ATTN[::-1], synthetic.MLP[::-1])
    return replace(problem, name="misled", summary="`per-layer` after 60 random trials of a task of other layers")


PROBLEMS: dict[str, Callable[[], RaceProblem]] = {
    "table": lru_cache(surrogate.tabulated),
    "per-layer": lru_cache(synthetic.per_layer),
    "types": lru_cache(synthetic.types),
    "autopeft": lru_cache(synthetic.autopeft),
    "three": lru_cache(synthetic.three),
    "related": lru_cache(related),
    "misled": lru_cache(misled),
}
#: Raced when no problem is named. The others are for searchers that use a prior study.
BY_DEFAULT = ("table", "per-layer", "types", "autopeft", "three")
