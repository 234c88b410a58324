"""The order of training examples: the same for all candidates with one seed, so that comparisons are paired."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from random import Random

# Examples of similar length share a batch; sorting within pools of this many batches keeps the order random enough.
POOLED_BATCHES = 16
#: Approximate number of validation examples that are scored at a rung.
RUNG_EXAMPLES = 256


def num_steps(num_examples: int, batch_size: int, epochs: float) -> int:
    """Return the number of steps of `epochs` passes over the examples, at least 1."""
    return max(1, math.ceil(round(math.ceil(num_examples / batch_size) * epochs, 6)))


def epoch(lengths: Sequence[int], batch_size: int, rng: Random) -> list[list[int]]:
    """Return every index once, in shuffled batches of examples of similar length."""
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
    """Yield the batches of epoch after epoch without end; each epoch has its own random stream per seed."""
    number = 0
    while True:
        yield from epoch(lengths, batch_size, Random(f"order/{seed}/{number}"))
        number += 1


def ordered_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return all indices in batches sorted by length, with little padding, for uses where the order does not matter."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def short_rows(lengths: Sequence[int], least: int = 8) -> list[int]:
    """Return the indices of two short examples of at least `least` tokens, of different lengths if there are any.

    Without examples of that length, they are the longest ones.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    fit = [i for i in order if lengths[i] >= min(least, max(lengths))]
    longer = [i for i in fit if lengths[i] > lengths[fit[0]]]
    shorter = [i for i in reversed(order) if lengths[i] < lengths[fit[0]]]
    return [fit[0], *(longer or shorter or fit[1:])[:1]]


def rung_examples(count: int) -> range:
    """Return the positions of the examples of `count` that are scored at a rung.

    They are evenly spread, whatever the order: enough to rank by the loss, few enough to be cheap.
    """
    return range(count)[:: max(1, count // RUNG_EXAMPLES)]


def rung_examples_of_domains(domains: Sequence[int]) -> list[int]:
    """Return about as many positions of examples, evenly spread over each domain, so that a rung has all of them.

    `domains`: the domain of each example.
    """
    rows: dict[int, list[int]] = {}
    for row, domain in enumerate(domains):
        rows.setdefault(domain, []).append(row)
    step = rung_examples(len(domains)).step
    return sorted(row for of_domain in rows.values() for row in of_domain[::step])
