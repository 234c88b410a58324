"""Successive halving with several objectives."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from autopeft.searchers.halving import survivors

LOSSES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12)


@given(LOSSES, st.floats(0.01, 1.0))
def test_ranks_are_kept_from_the_first_on(losses: list[tuple[int, int]], keep: float) -> None:
    kept = survivors(losses, keep)
    assert len(kept) == math.ceil(round(keep * len(losses), 6))
    assert kept == sorted(set(kept))
    for i in set(range(len(losses))) - set(kept):
        for j in kept:
            better = all(a <= b for a, b in zip(losses[i], losses[j], strict=True)) and losses[i] != losses[j]
            assert not better, "nobody goes on who is dominated by one that does not"


@given(LOSSES)
def test_the_best_of_the_first_objective_goes_on(losses: list[tuple[int, int]]) -> None:
    if losses:
        assert min(x for x, _ in losses) in {losses[i][0] for i in survivors(losses, 0.01)}


def test_one_objective_is_plain_halving() -> None:
    assert survivors([[3.0], [1.0], [2.0], [4.0]], 0.5) == [1, 2]


def test_a_loss_that_is_no_number_comes_last() -> None:
    assert survivors([[math.nan, 1.0], [5.0, 1.0], [math.inf, 1.0]], 0.3) == [1]


def test_a_rank_that_does_not_fit_is_thinned_over_its_length() -> None:
    """Five on one front, three go on: both ends and the middle."""
    front = [[float(i), float(4 - i)] for i in range(5)]
    assert survivors(front, 0.6) == [0, 2, 4]


def test_nobody() -> None:
    assert survivors([], 0.5) == []
