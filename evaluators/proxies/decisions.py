"""Trainable distributions over the values of genes: nested gates for sizes, a softmax for types.

Notation: V values of a gene.

A gene has weights w: [V], one for the value that it takes and zero for the others:

- on or off, and a size l_1 < ... < l_V, by nested gates: gate h_j is 1 or 0, z_j = h_2 ... h_j (and z_1 = 1) includes
  size l_j only if it includes all smaller ones, w_j = z_j - z_(j+1);
- a type, and an unordered field, by the largest of V logits.

In the backward pass, h has the derivative of the sigmoid of its logit, and a type that of the softmax
(straight-through).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from autopeft.search_space.adapters import ADAPTERS
from autopeft.search_space.domains import BOOLEAN, Choice, Domain, Float, Value
from autopeft.search_space.spaces.genes import TRAINING
from autopeft.search_space.spaces.space import SearchSpace

#: Maximum number of gated sizes of a range of whole numbers: a step computes each of them.
MAX_LEVELS = 8
#: Initial logit of a gate, and of the type in the largest architecture; other types start at 0.
INITIAL_LOGIT = 2.0


def nested(opens: Tensor) -> Tensor:
    """Return the weights [V] of nested values from the gates [V - 1] of all but the first."""
    included = torch.cat([opens.new_ones(1), opens]).cumprod(0)
    return included - torch.cat([included[1:], included.new_zeros(1)])


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Return `hard`, with the derivative of `soft` (Bengio et al. 2013, Estimating or Propagating Gradients)."""
    return hard + (soft - soft.detach())


class Decision:
    """A distribution over the `values` of a gene: logits [V - 1] of nested gates if `ordered`, else softmax [V]."""

    def __init__(self, values: Sequence[Value], ordered: bool, start: Value, device: torch.device) -> None:
        self.values = tuple(values)
        self.ordered = ordered
        logits = (
            [INITIAL_LOGIT] * (len(self.values) - 1)
            if ordered
            else [INITIAL_LOGIT * (value == start) for value in self.values]
        )
        self.logits = nn.Parameter(torch.tensor(logits, device=device))

    def index(self, value: Value) -> int:
        """Return the index of a value; for a size between two gated sizes, that of the larger one."""
        if self.ordered:
            return min(bisect_left(self.values, value), len(self.values) - 1)
        return self.values.index(value)

    def probabilities(self) -> Tensor:
        """Return the probabilities [V] of the values."""
        return nested(self.logits.sigmoid()) if self.ordered else self.logits.softmax(0)

    def weights(self, noise: Generator | None = None) -> Tensor:
        """Return one-hot weights [V]: sampled with `noise`, else at the thresholded gates or the likeliest type."""
        logits = self.logits.detach()
        if self.ordered:
            level = 0.5 if noise is None else torch.rand(len(logits), generator=noise).to(logits)
            return nested(straight_through((logits.sigmoid() > level).to(logits), self.logits.sigmoid()))
        if noise is not None:
            logits = logits - torch.empty(len(logits)).exponential_(generator=noise).log().to(logits)
        return straight_through(F.one_hot(logits.argmax(), len(logits)).to(logits), self.logits.softmax(0))

    @torch.no_grad()
    def value(self) -> Value:
        """Return the value at the thresholded gates, or the likeliest type."""
        return self.values[int(self.weights().argmax())]


def decisions_of(space: SearchSpace, device: torch.device) -> Iterator[tuple[str, Decision]]:
    """Yield a decision for every gene of the architecture, initialised at the largest architecture."""
    sizes = {place.genes.get(ADAPTERS[place.kind].size_field or "") for place in space.placements}
    largest = space.largest()
    for gene in space.genes:
        if not gene.name.startswith(TRAINING):
            values, ordered = _levels(gene.domain, gene.name in sizes)
            start = largest.get(gene.name, gene.domain.from_unit(1.0))
            yield gene.name, Decision(values, ordered, start, device)


def _levels(domain: Domain, is_size: bool) -> tuple[Sequence[Value], bool]:
    """Return the values of a gene that have weights, and whether they are nested."""
    if isinstance(domain, Float):
        return [domain.from_unit(0.5)], True
    if isinstance(domain, Choice):
        return (sorted(domain.choices), True) if is_size else (domain.choices, domain == BOOLEAN)
    levels = (domain.from_unit(i / (MAX_LEVELS - 1)) for i in range(MAX_LEVELS))
    values = sorted({domain.low, domain.high, *levels})
    return values, is_size
