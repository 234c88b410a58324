"""The parts of NSGA-II over encoded rows: rank and crowding, crossover and mutation.

Notation: n points, G genes, m objectives, c children. Losses [n, m] are all minimised. A violation [n] above 0 says how
far a point lies beyond its constraints.

Deb, Pratap, Agarwal and Meyarivan 2002, "A fast and elitist multiobjective genetic algorithm: NSGA-II"; the sections
below are theirs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autopeft.searchers.bo.encoding import Encoding, Rows

Integers = NDArray[np.int_]

#: Children with two parents, half of them as in HAT (Wang et al. 2020); the others have one.
CROSSED = 0.5
#: Mutations of an ordered gene that go to a value nearby; the others draw anew.
STEPPED = 0.5
#: Standard deviation of a step in a range, on the unit interval.
STEP = 0.1


# Selection


def best_first(losses: Rows, violation: Rows) -> Integers:
    """Return the indices [n] of points by rank, and within a rank from the least crowded on (III-C)."""
    rank = ranks(losses, violation)
    return np.lexsort((-crowding(losses, rank), rank))


def ranks(losses: Rows, violation: Rows) -> Integers:
    """Return ranks [n]: 0 for points that none dominates, 1 for those that only these dominate, and so on (III-A).

    Constrained domination (VI-A): points beyond their constraints rank behind all others, by their violation alone.
    """
    rank = np.zeros(len(losses), dtype=int)
    feasible = violation <= 0
    rank[feasible] = _fronts(losses[feasible])
    behind = rank[feasible].max(initial=-1) + 1
    rank[~feasible] = behind + np.unique(violation[~feasible], return_inverse=True)[1]
    return rank


def _fronts(losses: Rows) -> Integers:
    no_worse = np.ones((len(losses), len(losses)), dtype=bool)
    for column in losses.T:
        no_worse &= column[:, None] <= column
    dominates = no_worse & ~no_worse.T
    dominators = dominates.sum(axis=0)
    rank, level = np.zeros(len(losses), dtype=int), 0
    while len(front := np.flatnonzero(dominators == 0)):
        rank[front] = level
        dominators -= dominates[front].sum(axis=0)
        dominators[front] = -1
        level += 1
    return rank


def crowding(losses: Rows, rank: Integers) -> Rows:
    """Return the crowding distance [n]: between the two neighbours within the rank, summed over the objectives (III-B).

    Each objective is in units of the rank's range. The ends of a rank have infinite distance.
    """
    distance = np.zeros(len(losses))
    for column in losses.T:
        order = np.lexsort((column, rank))
        sorted_, rank_ = column[order], rank[order]
        first = np.append(True, rank_[1:] != rank_[:-1])[: len(order)]
        last = np.roll(first, -1)
        ranges = (sorted_[last] - sorted_[first])[np.cumsum(first) - 1]
        gaps = (np.roll(sorted_, -1) - np.roll(sorted_, 1)) / np.where(ranges > 0, ranges, 1.0)
        distance[order] += np.where(first | last, np.inf, gaps)
    return distance


def spread_first(losses: Rows, rank: Integers, taken: NDArray[np.bool_]) -> Integers:
    """Return the indices of points that are not `taken` [n], by rank, and within a rank farthest point first.

    Distances are from all earlier points and the taken ones, in units of the first rank's ranges. The first few points
    in the order of crowding may be neighbours; in this order they are an epsilon-net (Salinas et al. 2021).
    """
    front = losses[rank == 0]
    ranges = np.ptp(front, axis=0) if len(front) else np.zeros(losses.shape[1])
    units = losses / np.where(ranges > 0, ranges, 1.0)
    distance = np.full(len(losses), np.inf)
    for point in units[taken]:
        distance = np.minimum(distance, np.linalg.norm(units - point, axis=1))
    found: list[int] = []
    for level in np.unique(rank[~taken]):
        left = np.flatnonzero(~taken & (rank == level))
        while len(left):
            at = int(distance[left].argmax())
            found.append(int(left[at]))
            distance = np.minimum(distance, np.linalg.norm(units - units[left[at]], axis=1))
            left = np.delete(left, at)
    return np.array(found, dtype=int)


# Variation


def children(encoding: Encoding, parents: Rows, count: int, rng: np.random.Generator) -> Rows:
    """Generate `count` children [c, G] of parents [n, G], best first, by binary tournaments, crossover and mutation."""
    mothers, fathers = parents[rng.integers(len(parents), size=(2, 2, count)).min(axis=0)]
    fathers = np.where(rng.random((count, 1)) < CROSSED, fathers, mothers)
    return mutated(encoding, crossed(encoding, mothers, fathers, rng), rng)


def crossed(encoding: Encoding, mothers: Rows, fathers: Rows, rng: np.random.Generator) -> Rows:
    """Return [c, G]: each gene from either parent, or from the only one in which it is active.

    A gene that is inactive in both is drawn anew, for a gate that mutation may open.
    """
    hers, his = encoding.active(mothers), encoding.active(fathers)
    from_him = his & (~hers | (rng.random(his.shape) < 0.5))
    return np.where(hers | his, np.where(from_him, fathers, mothers), encoding.draw(len(mothers), rng))


def mutated(encoding: Encoding, rows: Rows, rng: np.random.Generator) -> Rows:
    """Return [c, G] with one of the active genes changed on average, and at least one."""
    rows = rows.copy()
    active = encoding.active(rows)
    chance = 1.0 / np.maximum(1, active.sum(axis=1, keepdims=True))
    lots = np.where(active, rng.random(rows.shape), np.inf)
    chosen = (lots < chance) | (active & (lots == lots.min(axis=1, keepdims=True, initial=np.inf)))
    for g, (levels, ordered) in enumerate(zip(encoding.levels, encoding.ordered, strict=True)):
        here = np.flatnonzero(chosen[:, g])
        if levels is None:
            rows[here, g] = _moved(rows[here, g], rng)
        elif len(levels) > 1:
            rows[here, g] = levels[_changed(np.abs(rows[here, g, None] - levels).argmin(1), len(levels), ordered, rng)]
    return encoding.snapped(rows)


def _moved(positions: Rows, rng: np.random.Generator) -> Rows:
    nearby = np.clip(rng.normal(positions, STEP), 0.0, 1.0)
    return np.where(rng.random(len(positions)) < STEPPED, nearby, rng.random(len(positions)))


def _changed(places: Integers, count: int, ordered: bool, rng: np.random.Generator) -> Integers:
    """Return other places among `count`: the next one down or up, or any."""
    other = (places + rng.integers(1, count, size=len(places))) % count
    if not ordered:
        return other
    step = np.where(rng.random(len(places)) < 0.5, -1, 1)
    nearby = np.where((places + step >= 0) & (places + step < count), places + step, places - step)
    return np.where(rng.random(len(places)) < STEPPED, nearby, other)
