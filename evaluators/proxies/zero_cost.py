"""What the proxies have in common that train no adapter: an evaluator, a seed and a few minibatches."""

from __future__ import annotations

from itertools import islice

from autopeft.evaluators.proxies.base import Proxy
from autopeft.evaluators.training import batching
from autopeft.evaluators.training.packed import PackedEvaluator

#: Training minibatches that a proxy looks at, and their rows.
BATCHES = 4
BATCH_SIZE = 16


class ZeroCost(Proxy):
    """A proxy over the model and the training rows of `evaluator`, which it leaves bit for bit as they were.

    All candidates see the same minibatches (common random numbers): the first ones of a training with `seed`.
    """

    def __init__(self, evaluator: PackedEvaluator, seed: int = 0) -> None:
        self.evaluator = evaluator
        self.seed = seed

    def minibatches(self) -> list[list[int]]:
        """Rows of the training split, for each minibatch."""
        order = batching.training_batches(self.evaluator.lengths["train"], BATCH_SIZE, self.seed)
        return list(islice(order, BATCHES))
