"""The base class of proxies that train no adapter: an evaluator, a seed and a few minibatches."""

from __future__ import annotations

from itertools import islice

from autopeft.evaluators.proxies.base import Proxy
from autopeft.evaluators.training import batching
from autopeft.evaluators.training.packed import PackedEvaluator

#: Number of training minibatches that a proxy reads, and rows of each.
BATCHES = 4
BATCH_SIZE = 16


class ZeroCost(Proxy):
    """A proxy over the model and the training rows of `evaluator`, both of which it leaves unchanged bit for bit.

    All candidates see the same minibatches (common random numbers): the first ones of a training with `seed`.
    """

    def __init__(self, evaluator: PackedEvaluator, seed: int = 0) -> None:
        self.evaluator = evaluator
        self.seed = seed

    def minibatches(self) -> list[list[int]]:
        """Return the indices of training rows of each minibatch."""
        order = batching.training_batches(self.evaluator.lengths["train"], BATCH_SIZE, self.seed)
        return list(islice(order, BATCHES))
