"""Batches of rows of similar length."""

from __future__ import annotations

import math
from random import Random

import pytest

from autopeft.evaluators.training.base import SMALL_LENGTHS
from autopeft.evaluators.training.batching import epoch, short_rows


@pytest.mark.parametrize(
    "lengths", [(9, 10), (12, 13), (12, 40), (13, 40), (16, 17), (16, 40), (40, 50), (3, 40), (3, 5)]
)
def test_the_rows_of_a_small_batch_have_different_lengths(lengths: tuple[int, int]) -> None:
    """Else it would not test padding."""
    rows = [lengths[row] for row in short_rows(lengths)]
    assert len({min(row, most) for row, most in zip(rows, SMALL_LENGTHS, strict=True)}) == 2


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
