"""Sampling policies: which subnets of a supernet train at a step. Evaluators own the weights and how they are shared.

Notation: B subnets of a step, M banks (sets of weights), G genes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
from typing_extensions import override

from autopeft.search_space.architecture import Architecture
from autopeft.search_space.domains import BOOLEAN
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.searchers.bo.encoding import Encoding, Rows

#: Subnets per step, the same for every policy, so that equal steps cost the same.
SUBNETS = 4
#: Draws from which the distribution of subnet sizes is estimated.
SIZED = 4096
#: Draws that a proxy selects from, and the bands of sizes that it selects in.
POOL, BANDS = 512, 8


class Policy(ABC):
    """Sampler of the subnets of a step, and their banks, from the space, the seed and the step's number alone.

    `pool` [., G]: points to draw from in place of the whole space, such as those of `preferred`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    #: Sets of weights, M.
    num_banks: ClassVar[int] = 1
    #: Whether the first subnet of a step is the largest, which can teach the others.
    has_teacher: ClassVar[bool] = False
    #: Whether subnets are drawn, from a pool if there is one.
    draws: ClassVar[bool] = True

    def __init__(self, space: SearchSpace, seed: int, pool: Rows | None = None) -> None:
        self.space = space
        self.seed = seed
        self.encoding = Encoding(space)
        self.pool = pool
        self.smallest = self.encoding.smallest()
        self.largest = self.encoding.rows([space.largest()])

    def subnets(self, number: int) -> list[Architecture]:
        """Return the subnets of step `number`; an empty one is replaced by a smallest subnet that is not empty."""
        rng = np.random.default_rng([self.seed, number])
        rows = self.rows(number, rng)
        empty = self.encoding.is_empty(rows, self.encoding.active(rows))
        rows[empty] = self.smallest[rng.integers(len(self.smallest), size=empty.sum())]
        return [self.space.decode(self.encoding.assignment(row)).architecture for row in rows]

    def bank_of(self, architecture: Architecture) -> int | None:
        """Return the bank that a subnet reads; None: the one with the lowest loss for it."""
        return 0

    @abstractmethod
    def rows(self, number: int, rng: np.random.Generator) -> Rows:
        """Return the points [B, G] of step `number`."""

    def draw(self, count: int, rng: np.random.Generator) -> Rows:
        """Draw points [count, G], every value of a gene equally likely."""
        if self.pool is not None:
            return self.pool[rng.integers(len(self.pool), size=count)]
        return self.encoding.snapped(rng.random((count, len(self.encoding.genes))))


class Uniform(Policy):
    """Paths drawn uniformly; the paper draws one for each step."""

    name = "uniform"
    summary = "paths drawn uniformly"
    source = "Guo et al. 2020, Single Path One-Shot NAS, section 3.2"

    @override
    def rows(self, number: int, rng: np.random.Generator) -> Rows:
        return self.draw(SUBNETS, rng)


class Sandwich(Policy):
    """The sandwich rule: the largest subnet, a smallest one, and drawn ones in between."""

    name = "sandwich"
    summary = "the largest, a smallest and two drawn ones at each step"
    source = "Yu and Huang 2019, Universally Slimmable Networks, section 3.2"
    has_teacher = True

    @override
    def rows(self, number: int, rng: np.random.Generator) -> Rows:
        smallest = self.smallest[rng.integers(len(self.smallest))]
        return np.vstack([self.largest, smallest, self.draw(SUBNETS - 2, rng)])


class Sorted(Policy):
    """Subnets of one chain, each nested in the next.

    The subnet at share u has its sizes at u of their ranges and the share u of the gates open, in a fixed order. Over
    ranks alone this is DyLoRA (Valipour et al. 2023).
    """

    name = "sorted"
    summary = "subnets that are nested in each other"
    source = "Valipour et al. 2023, SortedNet, section 3"
    has_teacher = True
    draws = False

    def __init__(self, space: SearchSpace, seed: int, pool: Rows | None = None) -> None:
        super().__init__(space, seed, pool)
        gates = [g for g, gene in enumerate(space.genes) if gene.domain == BOOLEAN]
        order = np.random.default_rng(seed).permutation(len(gates))
        #: The share from which on a gate is open.
        self.opens = {g: (1 + place) / (1 + len(gates)) for g, place in zip(gates, order, strict=True)}

    @override
    def rows(self, number: int, rng: np.random.Generator) -> Rows:
        shares = [1.0, *rng.random(SUBNETS - 1)]
        rows = self.largest.repeat(SUBNETS, axis=0)
        for row, share in zip(rows, shares, strict=True):
            for g in np.flatnonzero(self.encoding.shape_genes & self.encoding.ordered):
                row[g] = min(row[g], share)
            for gate, opens in self.opens.items():
                row[gate] = row[gate] if share >= opens else BOOLEAN.to_unit(False)
        return self.encoding.snapped(rows)


class Fair(Policy):
    """Latin hypercube: over the subnets of a step all values of a gene are equally frequent.

    This is exact where B is a multiple of their number.
    """

    name = "fair"
    summary = "every value of a gene equally often at each step"
    source = "Chu, Zhang and Xu 2021, FairNAS, section 3.3 (strict fairness)"

    @override
    def rows(self, number: int, rng: np.random.Generator) -> Rows:
        if self.pool is not None:
            return self.draw(SUBNETS, rng)
        width = len(self.encoding.genes)
        strata = rng.permuted(np.tile(np.arange(SUBNETS)[:, None], (1, width)), axis=0)
        return self.encoding.snapped((strata + rng.random((SUBNETS, width))) / SUBNETS)


class Banded(Policy):
    """One supernet for the smaller half of the subnets and one for the larger, so that they do not interfere.

    Each step trains equally many of each.
    """

    name = "banded"
    summary = "a set of weights for each band of sizes"
    source = "Xu et al. 2022, AutoDistil, section 3.2"
    num_banks = 2

    def __init__(self, space: SearchSpace, seed: int, pool: Rows | None = None) -> None:
        super().__init__(space, seed, pool)
        rows = self.draw(SIZED, np.random.default_rng(seed))
        self.bounds = np.quantile(self._params(rows), np.arange(1, self.num_banks) / self.num_banks)

    def _params(self, rows: Rows) -> Rows:
        return self.encoding.costs(rows, self.encoding.active(rows))["num_params"]

    @override
    def bank_of(self, architecture: Architecture) -> int | None:
        return int(np.searchsorted(self.bounds, architecture.num_params(self.space.backbone)))

    @override
    def rows(self, number: int, rng: np.random.Generator) -> Rows:
        own, rows = SUBNETS // self.num_banks, self.draw(16 * SUBNETS, rng)
        bands = np.searchsorted(self.bounds, self._params(rows))
        chosen = [np.flatnonzero(bands == band)[:own] for band in range(self.num_banks)]
        return rows[np.concatenate(chosen)]


class BalancedMixture(Uniform):
    """Uniform paths; each trains the set of weights with the lowest loss for it, and each set trains equally many."""

    name = "mixture"
    summary = "several sets of weights, each for the subnets that suit it"
    source = "Javan et al. 2023, Balanced Mixture of SuperNets, section 3"
    num_banks = 2

    @override
    def bank_of(self, architecture: Architecture) -> int | None:
        return None


def preferred(space: SearchSpace, seed: int, score: Callable[[Sequence[Architecture]], Sequence[float]]) -> Rows:
    """Return points [., G] that a proxy without training prefers: the best quarter of each band of sizes.

    After PreNAS (Wang et al. 2023), where only such subnets are trained in the supernet.
    """
    encoding = Encoding(space)
    rows = encoding.draw(POOL, np.random.default_rng([seed, 2**31]))
    active = encoding.active(rows)
    rows, active = rows[~encoding.is_empty(rows, active)], active[~encoding.is_empty(rows, active)]
    scores = np.array(score([space.decode(encoding.assignment(row)).architecture for row in rows]))
    by_size = np.argsort(encoding.costs(rows, active)["num_params"], kind="stable")
    best = [
        band[np.argsort(scores[band], kind="stable")][: -(-len(band) // 4)] for band in np.array_split(by_size, BANDS)
    ]
    return rows[np.concatenate(best)]


POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (Fair, Sandwich, Uniform, Sorted, Banded, BalancedMixture)
}
