"""Maximise an acquisition function over mixed genes: draws, mutants and local search.

Notation: n points, G genes, b points to score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from autopeft.searchers.bo.encoding import Encoding, Mask, Rows

#: Logarithm of the acquisition value [b] of points [b, G] and their active genes; -inf for an infeasible point.
Acquisition = Callable[[Rows, Mask], Rows]

#: Points that are scored first, of which the best are improved.
SCREENED = 512
IMPROVED = 4
#: Rounds of local search at most.
ROUNDS = 8
#: Steps of a real gene that a local search tries, on the unit interval.
STEPS = (0.02, 0.08, 0.25)
#: Proposals whose logarithmic acquisition values differ by less are ties: below the Monte Carlo error.
TIE = 0.02


def propose(encoding: Encoding, acquisition: Acquisition, starts: Rows, rng: np.random.Generator) -> Rows | None:
    """Return the point [G] with the largest acquisition value, among ties the one with the fewest parameters.

    Returns None if all points met are infeasible. Local search over mixed genes starts from the best of draws from the
    whole space and mutants of `starts`: each round tries every change of one active gene of the best points, and some
    exchanges of two.
    """
    half = SCREENED // 2
    rows = [encoding.draw(SCREENED - half if len(starts) else SCREENED, rng)]
    if len(starts):
        rows += [starts, mutants(encoding, starts[rng.integers(len(starts), size=half)], rng)]
    seen = ScoredPoints(encoding, acquisition)
    seen.add(np.vstack(rows))
    if seen.best() == -np.inf:
        seen.add(encoding.smallest())
    best = seen.best()
    if best == -np.inf:
        return None
    for _ in range(ROUNDS):
        around = [neighbours(encoding, row, rng) for row in seen.top(IMPROVED)]
        seen.add(np.vstack(around))
        if seen.best() < best + TIE / 4:
            break
        best = seen.best()
    return seen.simplest()


class ScoredPoints:
    """Points and their values, none of them twice."""

    def __init__(self, encoding: Encoding, acquisition: Acquisition) -> None:
        self.encoding = encoding
        self.acquisition = acquisition
        self.seen: set[bytes] = set()
        self.rows = np.zeros((0, len(encoding.genes)))
        self.values = np.zeros(0)

    def add(self, rows: Rows) -> None:
        """Score the points [n, G] that are new."""
        active = self.encoding.active(rows)
        new = unseen(keys_of(rows, active), self.seen)
        if new:
            self.rows = np.vstack([self.rows, rows[new]])
            self.values = np.concatenate([self.values, self.acquisition(rows[new], active[new])])

    def best(self) -> float:
        """Return the largest value."""
        return float(self.values.max())

    def top(self, count: int) -> Rows:
        """Return the `count` points with the largest values, best first."""
        return self.rows[np.argsort(-self.values, kind="stable")[:count]]

    def simplest(self) -> Rows:
        """Return the point [G] with the fewest parameters among those that tie with the best."""
        ties = self.rows[self.values >= self.best() - TIE]
        params = self.encoding.costs(ties, self.encoding.active(ties))["num_params"]
        point: Rows = ties[int(params.argmin())]
        return point


def keys_of(rows: Rows, active: Mask) -> list[bytes]:
    """Return keys that are equal for points that differ in inactive genes alone."""
    return [row.tobytes() for row in np.where(active, rows, -1.0)]


def unseen(keys: Iterable[bytes], seen: set[bytes]) -> list[int]:
    """Return the indices of keys that are not in `seen`, each key once, and add them to it."""
    places = []
    for i, key in enumerate(keys):
        if key not in seen:
            seen.add(key)
            places.append(i)
    return places


def mutants(encoding: Encoding, rows: Rows, rng: np.random.Generator) -> Rows:
    """Return [n, G]: each row with one to four of its genes drawn anew, active ones first."""
    rows = rows.copy()
    drawn = encoding.draw(len(rows), rng)
    wanted = rng.integers(1, 5, size=len(rows))
    order = rng.random(rows.shape) + encoding.active(rows)
    chosen = np.argsort(np.argsort(-order, axis=1), axis=1) < wanted[:, None]
    return np.where(chosen, drawn, rows)


def neighbours(encoding: Encoding, row: Rows, rng: np.random.Generator) -> Rows:
    """Return the neighbours [., G] of a point: every change of one active gene, and as many exchanges of two.

    Changes are the next values of an ordered gene, all values of an unordered one, and steps in a range. Exchanges are
    between two genes of equal domain: they move a size to another place.
    """
    active = np.flatnonzero(encoding.active(row[None])[0])
    found = []
    for g in active:
        levels = encoding.levels[g]
        if levels is None:
            steps = np.array(STEPS) * rng.uniform(0.5, 1.5, size=len(STEPS))
            moves = np.clip(np.concatenate([row[g] - steps, row[g] + steps]), 0.0, 1.0)
        elif encoding.ordered[g]:
            here = int(np.abs(levels - row[g]).argmin())
            moves = levels[[i for i in (here - 1, here + 1) if 0 <= i < len(levels)]]
        else:
            moves = levels[np.abs(levels - row[g]) > 1e-9]
        for move in moves:
            changed = row.copy()
            changed[g] = move
            found.append(changed)
    for _ in range(len(active)):
        a = rng.choice(active)
        alike = encoding.alike[a]
        if len(alike):
            b = rng.choice(alike)
            changed = row.copy()
            changed[[a, b]] = row[[b, a]]
            found.append(changed)
    return encoding.snapped(np.array(found)) if found else row[None]
