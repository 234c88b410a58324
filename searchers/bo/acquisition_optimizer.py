"""Search for the best point over mixed genes: draws, mutants and local moves, for whatever judges them.

Notation: n points, G genes, b points to judge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from autopeft.searchers.bo.encoding import Encoding, Mask, Rows

#: Worth [b] of points [b, G] and their active genes; -inf for a point that may not be proposed.
Judge = Callable[[Rows, Mask], Rows]

#: Points that are judged first, of which the best are improved.
SCREENED = 512
IMPROVED = 4
#: Rounds of local search at most.
ROUNDS = 8
#: Steps of a real gene that a local search tries, on the unit interval.
STEPS = (0.02, 0.08, 0.25)
#: Proposals whose logarithms of worth differ by less are equally good: Monte Carlo cannot tell them apart.
TIE = 0.02


def propose(encoding: Encoding, judge: Judge, starts: Rows, rng: np.random.Generator) -> Rows | None:
    """The point [G] that `judge` finds best, or with the fewest parameters of those that it cannot tell from the best;
    None if it forbids all that were met.

    `judge`: worth [b] of points and their active genes, -inf for one that may not be proposed. Local search over mixed
    genes from the best of draws from the whole space and mutants of `starts`: each round tries every change of one
    active gene of the best points, and some exchanges of two.
    """
    half = SCREENED // 2
    rows = [encoding.draw(SCREENED - half if len(starts) else SCREENED, rng)]
    if len(starts):
        rows += [starts, mutants(encoding, starts[rng.integers(len(starts), size=half)], rng)]
    seen = Judged(encoding, judge)
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


class Judged:
    """Points that were judged, none of them twice."""

    def __init__(self, encoding: Encoding, judge: Judge) -> None:
        self.encoding = encoding
        self.judge = judge
        self.known: set[bytes] = set()
        self.rows = np.zeros((0, len(encoding.genes)))
        self.worth = np.zeros(0)

    def add(self, rows: Rows) -> None:
        active = self.encoding.active(rows)
        new = unknown(keys_of(rows, active), self.known)
        if new:
            self.rows = np.vstack([self.rows, rows[new]])
            self.worth = np.concatenate([self.worth, self.judge(rows[new], active[new])])

    def best(self) -> float:
        return float(self.worth.max())

    def top(self, count: int) -> Rows:
        return self.rows[np.argsort(-self.worth, kind="stable")[:count]]

    def simplest(self) -> Rows:
        ties = self.rows[self.worth >= self.best() - TIE]
        params = self.encoding.costs(ties, self.encoding.active(ties))["num_params"]
        return ties[int(params.argmin())]


def keys_of(rows: Rows, active: Mask) -> list[bytes]:
    """Equal for points that differ in inactive genes alone."""
    return [row.tobytes() for row in np.where(active, rows, -1.0)]


def unknown(keys: Iterable[bytes], known: set[bytes]) -> list[int]:
    """The places of keys that are not `known`, each key once; all are known from then on."""
    places = []
    for i, key in enumerate(keys):
        if key not in known:
            known.add(key)
            places.append(i)
    return places


def mutants(encoding: Encoding, rows: Rows, rng: np.random.Generator) -> Rows:
    """[n, G]: each row with one to four of its genes drawn anew; active ones first of all."""
    rows = rows.copy()
    drawn = encoding.draw(len(rows), rng)
    wanted = rng.integers(1, 5, size=len(rows))
    order = rng.random(rows.shape) + encoding.active(rows)
    chosen = np.argsort(np.argsort(-order, axis=1), axis=1) < wanted[:, None]
    return np.where(chosen, drawn, rows)


def neighbours(encoding: Encoding, row: Rows, rng: np.random.Generator) -> Rows:
    """Every change of one active gene [., G]: the next values of an ordered one, all values of another, steps of a
    range. Besides, as many exchanges of two genes of equal domain, which keep the size and move it elsewhere.
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
