"""Batches of rows of similar length."""

from __future__ import annotations

import math
from random import Random

import pytest

from autopeft.evaluators.training.batching import epoch


def padding(batches: list[list[int]], lengths: list[int]) -> float:
    """Share of padding among the tokens of the batches."""
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths) / padded


@pytest.mark.parametrize("batch_size", [4, 8])
@pytest.mark.parametrize(
    ("median", "sigma", "cut"),
    [(250, 0.8, 1024), (250, 0.8, 2048), (400, 1.0, 2048), (120, 1.0, 1024), (700, 1.2, 4096)],
)
def test_rows_as_long_as_those_of_chats_leave_little_padding(
    median: int, sigma: float, cut: int, batch_size: int
) -> None:
    """Log-normal lengths; docs/llm.md quotes the range."""
    draw = Random(0)
    lengths = [min(cut, max(8, int(median * math.e ** draw.gauss(0, sigma)))) for _ in range(5000)]
    shuffled = [list(range(i, min(i + batch_size, 5000))) for i in range(0, 5000, batch_size)]
    assert 0.06 < padding(epoch(lengths, batch_size, Random(2)), lengths) < 0.145
    assert 0.45 < padding(shuffled, lengths) < 0.67
