"""The initial design: the points that are evaluated before a model is used."""

from __future__ import annotations

import numpy as np

from autopeft.search_space.architecture import Candidate
from autopeft.search_space.problem import Problem
from autopeft.search_space.spaces.location import locate
from autopeft.search_space.spaces.presets import BASELINES
from autopeft.searchers.bo.acquisition_optimizer import Acquisition, ScoredPoints, keys_of, neighbours, unseen
from autopeft.searchers.bo.encoding import Encoding, Mask, Rows

#: Draws among which space-filling points are picked.
POOL = 1024
#: Points beyond the design: for trials that fail, and while none has ended.
SPARE = 16
#: Largest share of the design for points of a prior study: it bounds what a misleading one can cost.
PRIOR_SHARE = 0.25


def num_initial(problem: Problem) -> int:
    """Return the size of the initial design: what the study asks for, else a few more than a quarter of the genes."""
    if problem.initial is not None:
        return problem.initial
    return max(4, min(problem.num_trials // 4, 6 + len(problem.space.genes) // 4))


def design(
    problem: Problem, encoding: Encoding, allowed: Acquisition, best_prior: Rows, rng: np.random.Generator
) -> Rows:
    """Return the points to start with [num_initial + SPARE, G], in this order.

    The best of a prior study; the smallest and the largest architecture that are allowed; the fixed baselines that lie
    in the space; then draws over the active subspaces. The draws are spread over strata of the declared size, and
    within a stratum the next one is the farthest from all before it (Johnson, Moore and Ylvisaker 1990, maximin).

    `allowed`: 0 for a point that may be proposed, -inf for another.
    """
    count = num_initial(problem)
    pool = np.vstack([encoding.draw(POOL, rng), encoding.smallest()])
    pool = pool[np.isfinite(allowed(pool, encoding.active(pool)))]
    if not len(pool):
        return pool
    fixed = [
        best_prior[: int(count * PRIOR_SHARE)],
        _extreme(encoding, allowed, pool, -1.0, rng)[None],
        _extreme(encoding, allowed, pool, +1.0, rng)[None],
        _baselines(problem, encoding, allowed),
    ]
    rows = np.vstack(fixed)
    chosen = rows[unseen(keys_of(rows, encoding.active(rows)), set())][:count]
    for more in (count - len(chosen), SPARE):
        chosen = np.vstack([chosen, _filling(encoding, pool, chosen, more, rng)])
    return chosen


def _baselines(problem: Problem, encoding: Encoding, allowed: Acquisition) -> Rows:
    space = problem.space
    found = []
    for architecture in (make(space.backbone) for make in BASELINES.values()):
        genes = locate(space, Candidate(architecture=architecture))
        if genes is not None:
            found.append(genes)
    rows = encoding.rows(found)
    return rows[np.isfinite(allowed(rows, encoding.active(rows)))] if len(rows) else rows


def _extreme(encoding: Encoding, allowed: Acquisition, pool: Rows, sign: float, rng: np.random.Generator) -> Rows:
    """Find the largest (sign +1) or smallest allowed point by parameters, by hill climbing gene by gene."""

    def size(rows: Rows, active: Mask) -> Rows:
        return sign * encoding.costs(rows, active)["num_params"] + allowed(rows, active)

    pool = np.where(encoding.shape_genes, pool, encoding.middle)
    climb = ScoredPoints(encoding, size)
    climb.add(pool)
    best = -np.inf
    while climb.best() > best:
        best = climb.best()
        climb.add(neighbours(encoding, climb.top(1)[0], rng))
    point: Rows = climb.top(1)[0]
    return point


def _filling(encoding: Encoding, pool: Rows, chosen: Rows, count: int, rng: np.random.Generator) -> Rows:
    if count <= 0:
        return pool[:0]
    sizes = encoding.costs(pool, encoding.active(pool))["num_params"]
    features = encoding.features(pool, encoding.active(pool))
    distance = np.full(len(pool), np.inf)
    for row in chosen:
        distance = np.minimum(distance, _distances(features, encoding.features(row[None], encoding.active(row[None]))))
    stratum = np.argsort(np.argsort(sizes, kind="stable")) * count // len(pool)
    picked: list[int] = []
    for wanted in rng.permutation(count):
        here = np.flatnonzero((stratum == wanted) & (distance > 0))
        here = here if len(here) else np.flatnonzero(distance > 0)
        if not len(here):
            break
        picked.append(int(here[distance[here].argmax()]))
        distance = np.minimum(distance, _distances(features, features[picked[-1:]]))
    return pool[picked]


def _distances(features: Rows, one: Rows) -> Rows:
    return np.asarray(np.linalg.norm(features - one, axis=1))
