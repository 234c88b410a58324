"""Non-dominated points and hypervolume against definitions that are slow and plain."""

from __future__ import annotations

import math
from itertools import combinations
from math import nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.dominance import from_coordinate, non_dominated
from autopeft.search_space.problem import SEARCH, Measurement, Objective, Trial
from autopeft.studies.analysis.pareto import hypervolume, hypervolume_by_trial, losses, reference_point, scaled

# Few values, so that ties and duplicates are common.
tables = arrays(
    float,
    array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=4).map(lambda shape: (shape[0] + 2, shape[1])),
    elements=st.integers(0, 5).map(float),
)
ACCURACY, PARAMS = Objective.of("accuracy"), Objective.of("num_params")


def dominates(a, b):
    pairs = list(zip(a, b, strict=True))
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)


def inclusion_exclusion(points, reference):
    """Volume of the union of the boxes between each point and the reference."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for subset in combinations(points, size):
            sides = np.maximum(0.0, reference - np.max(subset, axis=0))
            total += (-1) ** (size + 1) * float(np.prod(sides))
    return total


@given(tables)
def test_non_dominated_is_its_definition(points):
    expected = [not any(dominates(other, point) for other in points) for point in points]
    assert non_dominated(points).tolist() == expected


def test_non_dominated_keeps_equal_points_and_leaves_out_nan():
    points = [[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [nan, 0.0], [-1.0, nan]]
    assert non_dominated(points).tolist() == [True, True, True, False, False, False]
    assert non_dominated(np.empty((0, 2))).tolist() == []


@given(tables, st.integers(3, 6))
def test_hypervolume_is_the_volume_of_the_union(points, corner):
    reference = np.full(points.shape[1], float(corner))
    assert hypervolume(points, reference) == pytest.approx(inclusion_exclusion(points, reference))


@pytest.mark.parametrize("num_objectives", [2, 3, 4])
def test_hypervolume_agrees_with_monte_carlo(num_objectives):
    rng = np.random.default_rng(num_objectives)
    points = rng.random((12, num_objectives))
    darts = rng.random((20_000, num_objectives))
    hit = (points[None] <= darts[:, None]).all(axis=2).any(axis=1)
    error = hit.std() / len(darts) ** 0.5
    assert hypervolume(points, np.ones(num_objectives)) == pytest.approx(hit.mean(), abs=4 * error)


@given(tables, st.data())
def test_hypervolume_never_falls_when_a_point_is_added(points, data):
    point = data.draw(arrays(float, points.shape[1], elements=st.integers(-2, 8).map(float)))
    reference = np.full(points.shape[1], 5.0)
    before, after = hypervolume(points, reference), hypervolume(np.vstack([points, point]), reference)
    assert after >= before - 1e-9
    if dominates(point, points.min(axis=0)) and (points.min(axis=0) < reference).all():
        assert after > before


def test_hypervolume_of_points_that_add_nothing():
    assert hypervolume([], [1.0, 1.0]) == 0.0
    assert hypervolume([[0.0, 2.0], [nan, 0.0]], [1.0, 1.0]) == 0.0
    assert hypervolume([[0.5, 0.5], [0.0, 2.0]], [1.0, 1.0]) == 0.25


def trial(number, accuracy, num_params, state="complete", violation=-1.0):
    return Trial(
        number=number,
        role=SEARCH,
        candidate=Candidate(architecture=Architecture()),
        state=state,
        measurement=Measurement(values={"accuracy": accuracy, "num_params": num_params}),
        violation=violation,
    )


TRIALS = [
    trial(0, 0.5, 100),
    trial(1, 0.9, 10, state="failed"),
    trial(2, 0.7, 300),
    trial(3, 0.9, 5, violation=0.1),
    trial(4, 0.6, 50),
]


def test_losses_turn_directions_and_blank_what_does_not_count():
    table = losses(TRIALS, [ACCURACY, PARAMS])
    assert table[0].tolist() == [-0.5, 100]
    assert np.isnan(table[[1, 3]]).all()
    assert non_dominated(table).tolist() == [False, False, True, False, True]


def test_reference_point_is_declared_or_a_tenth_beyond_the_worst():
    declared = Objective.of("accuracy", reference=0.4)
    # Costs count by their logarithm: the range is from 50 to 300.
    end = math.log(300 * 6**0.1)
    assert reference_point(TRIALS, [declared, PARAMS]) == pytest.approx([-0.4, end])
    assert reference_point(TRIALS, [ACCURACY, PARAMS]) == pytest.approx([-0.5 + 0.02, end])
    assert reference_point(TRIALS[:1], [ACCURACY, PARAMS]) == pytest.approx([-0.5 + 0.05, math.log(110)])


def test_reference_point_without_trials_must_be_declared():
    declared = [Objective.of("accuracy", reference=0.4), Objective.of("num_params", reference=1e6)]
    assert reference_point([], declared).tolist() == [-0.4, math.log(1e6)]
    with pytest.raises(ValueError, match="num_params"):
        reference_point(TRIALS[1:2], [declared[0], PARAMS])


def test_a_hypervolume_counts_ratios_of_costs() -> None:
    """Half of the cost at any size is worth the same; the front itself is that of the costs."""
    sizes = np.array([[-0.5, 0], [-0.5, 1], [-0.5, 1000], [-0.5, 2000], [-0.5, 1e6], [-0.5, 2e6]])
    found = scaled(sizes, [ACCURACY, PARAMS])
    assert found[:, 0].tolist() == [-0.5] * 6
    assert np.diff(found[:, 1])[[0, 2, 4]] == pytest.approx([0, math.log(2), math.log(2)])
    assert [from_coordinate(end, PARAMS) for end in found[2:, 1]] == pytest.approx(sizes[2:, 1])
    assert from_coordinate(-0.5, ACCURACY) == -0.5
    seconds = scaled([[-0.5, 0.0], [-0.5, 1e-3]], [ACCURACY, Objective.of("latency_s")])
    assert seconds[:, 1] == pytest.approx([math.log(1e-9), math.log(1e-3)])
    most = Objective.of("num_params", maximise=True)
    assert scaled([[-7.0]], [most]).tolist() == [[-7.0]], "no cost to minimise"


def test_hypervolume_by_trial_is_that_of_each_beginning():
    objectives = [ACCURACY, PARAMS]
    reference = reference_point(TRIALS, objectives)
    curve = hypervolume_by_trial(TRIALS, objectives, reference)
    table = scaled(losses(TRIALS, objectives), objectives)
    assert curve == pytest.approx([hypervolume(table[: i + 1], reference) for i in range(len(table))])
    assert (np.diff(curve) >= 0).all()
    assert curve[1] == curve[0]
    assert curve[3] == curve[2]
