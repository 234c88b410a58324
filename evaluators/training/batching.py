"""The order in which examples are seen: the same for every candidate of a seed, so that comparisons are paired."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from random import Random

# Examples of similar length share a batch; pooling this many batches keeps the order random enough.
POOLED_BATCHES = 16


def num_steps(num_examples: int, batch_size: int, epochs: float) -> int:
    """Return the number of steps of so many passes over the examples, at least one."""
    return max(1, math.ceil(round(math.ceil(num_examples / batch_size) * epochs, 6)))


def epoch(lengths: Sequence[int], batch_size: int, rng: Random) -> list[list[int]]:
    """Every index once, in shuffled batches of examples of similar length."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    pool = batch_size * POOLED_BATCHES
    batches = []
    for start in range(0, len(order), pool):
        chunk = sorted(order[start : start + pool], key=lambda i: lengths[i])
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    rng.shuffle(batches)
    return batches


def training_batches(lengths: Sequence[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Epoch after epoch without end, from a stream of its own per seed and epoch."""
    number = 0
    while True:
        yield from epoch(lengths, batch_size, Random(f"order/{seed}/{number}"))
        number += 1


def ordered_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """All indices by length: little padding where the order does not matter."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
