"""Domains: the way to the unit interval and back."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autopeft.search_space.domains import BOOLEAN, Choice, Domain, Float, Int, without_zero

bounds = st.floats(-1e9, 1e9) | st.sampled_from((0.0, 0.1 * 3, 1e-12, 1e15, -1.0))


@st.composite
def floats(draw: st.DrawFn) -> Float:
    if draw(st.booleans()):
        low = draw(st.floats(1e-12, 1e6))
        return Float(low=low, high=low * draw(st.floats(1.0000001, 1e9)), log=True)
    low, high = sorted((draw(bounds), draw(bounds)))
    assume(low < high)
    return Float(low=low, high=high)


@st.composite
def ints(draw: st.DrawFn) -> Int:
    if draw(st.booleans()):
        low = draw(st.integers(1, 100))
        return Int(low=low, high=low + draw(st.integers(0, 100_000)), log=True)
    low, step = draw(st.integers(-100, 100)), draw(st.integers(1, 9))
    return Int(low=low, high=low + step * draw(st.integers(0, 1000)), step=step)


words = st.text("abc", min_size=1, max_size=3)
lists = st.one_of(
    st.lists(words | st.booleans(), min_size=1, max_size=9, unique_by=lambda v: (type(v), v)),
    st.lists(st.integers(-9, 99) | st.floats(0.0, 1.0), min_size=1, max_size=9, unique=True),
)
domains = floats() | ints() | st.builds(Choice.of, lists)
units = st.floats(0.0, 1.0)


@given(domains, units)
def test_values_survive_the_unit_interval_to_the_bit(domain: Domain, unit: float) -> None:
    value = domain.from_unit(unit)
    assert domain.contains(value)
    there = domain.to_unit(value)
    assert 0.0 <= there <= 1.0
    back = domain.from_unit(there)
    assert (type(back), repr(back)) == (type(value), repr(value))


@given(domains, st.integers(0, 99))
def test_samples_are_contained_and_follow_the_seed(domain: Domain, seed: int) -> None:
    value = domain.sample(Random(seed))
    assert domain.contains(value)
    assert domain.sample(Random(seed)) == value
    assert domain.from_unit(domain.to_unit(value)) == value


@given(domains, units)
def test_neighbours_are_contained_differ_and_exist(domain: Domain, unit: float) -> None:
    value = domain.from_unit(unit)
    neighbours = list(domain.neighbours(value))
    assert all(domain.contains(other) and other != value for other in neighbours)
    assert len(set(neighbours)) == len(neighbours)
    narrow = isinstance(domain, Float) and domain.log and domain.high / domain.low < 1.001
    assert narrow or bool(neighbours) == (domain.cardinality != 1)


@given(ints() | st.builds(Choice.of, lists))
def test_every_countable_value_can_be_reached(domain: Int | Choice) -> None:
    values = domain.choices if isinstance(domain, Choice) else range(domain.low, domain.high + 1, domain.step)
    assert len(values) == domain.cardinality
    step = max(1, len(values) // 50)
    for value in list(values)[::step]:
        assert domain.from_unit(domain.to_unit(value)) == value


@given(floats(), units, units)
def test_order_is_kept(domain: Float, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert domain.from_unit(low) <= domain.from_unit(high)
    assert (domain.from_unit(0.0), domain.from_unit(1.0)) == (domain.low, domain.high)
    assert (domain.from_unit(-1.0), domain.from_unit(2.0)) == (domain.low, domain.high)


def test_floats_have_few_digits() -> None:
    assert Float(low=1e-4, high=1e-2, log=True).from_unit(0.3333) == 0.000464088
    assert Float(low=0, high=0.3).from_unit(1 / 3) == 0.1
    # On a linear scale what counts is the range, not the size of the value.
    assert Float(low=-1, high=1).from_unit(0.5 + 1e-12) == 0.0
    assert Float(low=1e6, high=1e6 + 1).from_unit(0.25) == 1_000_000.25


def test_ends_of_a_float_are_floats() -> None:
    domain = Float(low=1_234_567, high=2_000_000)
    assert {type(domain.from_unit(u)) for u in (0.0, 0.3, 1.0)} == {float}


def test_log_range_of_whole_numbers_is_even_on_its_scale() -> None:
    domain = Int(low=1, high=64, log=True)
    rng = Random(0)
    drawn = [domain.sample(rng) for _ in range(4000)]
    assert set(drawn) >= {1, 2, 3, 4, 5, 6, 7, 8, 64}
    below = sum(value <= 5 for value in drawn) / len(drawn)
    assert below == pytest.approx(math.log(5.5 / 0.5) / math.log(64.5 / 0.5), abs=0.03)


@pytest.mark.parametrize(
    ("domain", "value"),
    [
        (Float(low=0, high=1), True),
        (Float(low=0, high=1), "0.5"),
        (Float(low=0, high=1), math.nan),
        (Int(low=0, high=8, step=4), 2),
        (Int(low=0, high=8), True),
        (Int(low=0, high=8), 2.0),
        (Choice(choices=(0, 1)), True),
        (BOOLEAN, 1),
        (Choice(choices=("a",)), None),
        (Choice(choices=(1,)), [1]),
    ],
)
def test_what_is_not_contained(domain: Domain, value: object) -> None:
    assert not domain.contains(value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Float(low=1, high=1), "low must be below high"),
        (lambda: Float(low=0, high=math.inf), "both finite"),
        (lambda: Float(low=math.nan, high=1), "low must be below high"),
        (lambda: Float(low=0, high=1, log=True), "a log range needs low > 0"),
        (lambda: Int(low=2, high=1), "low must not be above high"),
        (lambda: Int(low=0, high=5, step=2), "step must be positive and divide high - low, got low=0, high=5, step=2"),
        (lambda: Int(low=0, high=5, step=0), "step must be positive"),
        (lambda: Int(low=0, high=5, log=True), "needs low >= 1"),
        (lambda: Int(low=1, high=2.5), "must be whole numbers"),
        (lambda: Choice(choices=()), "at least one value"),
        (lambda: Choice(choices=(8, 16, 8)), "duplicate value"),
        (lambda: Choice(choices=(16, 16.0)), "duplicate value"),
    ],
)
def test_what_is_no_domain(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_choices_of_a_file() -> None:
    assert Choice.of([8, 0, 2]) == Choice(choices=(0, 2, 8), ordered=True)
    assert Choice.of(["b", "a"]) == Choice(choices=("b", "a"))
    assert Choice.of([True, False]) == Choice(choices=(True, False))
    assert Choice(choices=(True, 1)).index(1) == 1
    assert list(Choice.of([0, 2, 8]).neighbours(0)) == [2]
    assert list(Choice.of(["b", "a", "c"]).neighbours("a")) == ["b", "c"]


def test_sizes_without_zero() -> None:
    assert without_zero(Choice.of([0, 4, 8])) == Choice.of([4, 8])
    assert without_zero(Int(low=0, high=8, step=4)) == Int(low=4, high=8, step=4)
    assert without_zero(Int(low=1, high=8)) == Int(low=1, high=8)
    for nothing in (Choice.of([0]), Int(low=0, high=0)):
        with pytest.raises(ValueError, match="0 is the only size"):
            without_zero(nothing)
