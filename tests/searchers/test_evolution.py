"""Evolution over encoded rows: its operators against obvious references, and the searchers that are made of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from random import Random
from statistics import median
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopeft.benchmarks.race.base import RaceProblem
from autopeft.benchmarks.race.problems import PROBLEMS
from autopeft.benchmarks.race.races import Race
from autopeft.benchmarks.race.races import run as run_race
from autopeft.search_space import (
    AdapterChoice,
    Choice,
    Float,
    Measurement,
    Objective,
    Problem,
    SearchSpace,
    Trial,
)
from autopeft.search_space.limits import Limits
from autopeft.search_space.problem import declared_costs
from autopeft.searchers import SEARCHERS, Searcher
from autopeft.searchers.bo.acquisition_optimizer import keys_of
from autopeft.searchers.bo.encoding import Encoding
from autopeft.searchers.bo.feasibility import feasible
from autopeft.searchers.genetic import best_first, children, crossed, crowding, mutated, ranks, spread_first
from autopeft.searchers.predictor import Predictor
from autopeft.testing.searchers import ended, exact, problem_of, run
from autopeft.testing.spaces import SMALL, mixed_space

from ..support.slow import mostly_slow, slow
from ..support.spaces import spaces

NAMES = ["evolution", "linas"]
both = pytest.mark.parametrize("name", NAMES)
#: What they share, with the quicker one.
either = pytest.mark.parametrize("name", mostly_slow(NAMES, "evolution"))

# Rank and crowding

#: Few values, so that there are equal losses and equal points.
losses = st.integers(1, 4).flatmap(
    lambda m: st.lists(st.lists(st.integers(0, 5), min_size=m, max_size=m), max_size=24).map(
        lambda points: np.array(points, dtype=float).reshape(-1, m)
    )
)


def ranks_reference(losses: np.ndarray, violation: np.ndarray) -> list[int]:
    """Front after front is taken off."""

    def dominates(i: int, j: int) -> bool:
        if violation[i] > 0 or violation[j] > 0:
            return max(violation[i], 0) < max(violation[j], 0)
        return all(losses[i] <= losses[j]) and any(losses[i] < losses[j])

    rank, left, level = [0] * len(losses), set(range(len(losses))), 0
    while left:
        front = {j for j in left if not any(dominates(i, j) for i in left)}
        for j in front:
            rank[j] = level
        left, level = left - front, level + 1
    return rank


@given(losses, st.randoms(use_true_random=False))
def test_ranks_are_fronts_taken_off_one_after_the_other(table: np.ndarray, random: Random) -> None:
    violation = np.array([random.choice([-1.0, 0.0, 0.5, 2.0]) for _ in table])
    for beyond in (np.zeros(len(table)), violation):
        assert ranks(table, beyond).tolist() == ranks_reference(table, beyond)


def crowding_reference(losses: np.ndarray, rank: np.ndarray) -> list[float]:
    """Crowding-distance-assignment, Deb et al. 2002, section III-B."""
    distance = [0.0] * len(losses)
    for level in set(rank.tolist()):
        front = [i for i in range(len(losses)) if rank[i] == level]
        for m in range(losses.shape[1]):
            front.sort(key=lambda i: (losses[i, m], i))
            distance[front[0]] = distance[front[-1]] = float("inf")
            spread = losses[front[-1], m] - losses[front[0], m]
            for before, here, after in zip(front, front[1:], front[2:], strict=False):
                distance[here] += (losses[after, m] - losses[before, m]) / (spread or 1.0)
    return distance


@given(losses)
def test_crowding_is_that_of_the_paper(table: np.ndarray) -> None:
    rank = ranks(table, np.zeros(len(table)))
    np.testing.assert_allclose(crowding(table, rank), crowding_reference(table, rank))


def test_the_best_come_first() -> None:
    """The ends of the front, then its lonely member, then the crowded ones; the dominated, and those out of bounds."""
    table = np.array([[9, 9], [0, 10], [10, 0], [5, 5], [1, 9], [0, 0], [2, 8], [0, 0]], dtype=float)
    violation = np.array([-1, -1, -1, 0, -1, 2, -1, 1], dtype=float)
    assert best_first(table, violation).tolist() == [1, 2, 3, 6, 4, 0, 7, 5]
    single = np.array([[3.0], [1.0], [2.0]])
    assert best_first(single, np.zeros(3)).tolist() == [1, 2, 0]


@given(losses, st.randoms(use_true_random=False))
def test_spreading_takes_the_farthest_of_each_rank(table: np.ndarray, random: Random) -> None:
    rank = ranks(table, np.zeros(len(table)))
    taken = np.array([random.random() < 0.3 for _ in table], dtype=bool)
    order = spread_first(table, rank, taken).tolist()
    assert sorted(order) == np.flatnonzero(~taken).tolist()
    assert rank[order].tolist() == sorted(rank[order])
    spans = np.ptp(table[rank == 0], axis=0) if len(table) else np.ones(1)
    units = table / np.where(spans > 0, spans, 1.0)
    for k, i in enumerate(order):
        before = [*np.flatnonzero(taken), *order[:k]]
        others = [j for j in order[k:] if rank[j] == rank[i]]
        apart = [min((float(np.linalg.norm(units[j] - units[b])) for b in before), default=0.0) for j in others]
        assert apart[others.index(i)] == pytest.approx(max(apart))


# Crossover and mutation


@settings(max_examples=50, deadline=None)
@given(spaces(), st.integers(0, 99))
def test_children_are_points_of_the_space(space: SearchSpace, seed: int) -> None:
    encoding, rng = Encoding(space), np.random.default_rng(seed)
    found = children(encoding, encoding.draw(7, rng), 20, rng)
    assert found.shape == (20, len(space.genes))
    for row in found:
        genes = encoding.assignment(row)
        assert space.contains(genes)
        np.testing.assert_array_equal(encoding.snapped(row[None])[0], row)


@settings(max_examples=50, deadline=None)
@given(spaces(), st.integers(0, 99))
def test_a_gene_comes_from_a_parent_in_which_it_is_active(space: SearchSpace, seed: int) -> None:
    encoding, rng = Encoding(space), np.random.default_rng(seed)
    mothers, fathers = encoding.draw(30, rng), encoding.draw(30, rng)
    hers, his = encoding.active(mothers), encoding.active(fathers)
    child = crossed(encoding, mothers, fathers, rng)
    assert ((child == mothers) & hers | (child == fathers) & his)[hers | his].all()
    alone = crossed(encoding, mothers, mothers, rng)
    assert keys_of(alone, encoding.active(alone)) == keys_of(mothers, hers)


@settings(max_examples=50, deadline=None)
@given(spaces(), st.integers(0, 99))
def test_a_mutant_differs_in_an_active_gene(space: SearchSpace, seed: int) -> None:
    encoding, rng = Encoding(space), np.random.default_rng(seed)
    rows = encoding.draw(40, rng)
    active = encoding.active(rows)
    changed = (mutated(encoding, rows, rng) != rows) & active
    can = np.array([levels is None or len(levels) > 1 for levels in encoding.levels], dtype=bool)
    if can.all() and len(can):
        # A step in a range of real numbers may be too short for the digits that are stored.
        real = any(levels is None for levels in encoding.levels)
        assert changed.any(axis=1).mean() >= (0.8 if real else 1.0)
        assert changed.sum() < 3 * len(rows)
    assert not (mutated(encoding, rows, rng) != rows)[~active].any()


# What may be proposed


@settings(max_examples=50, deadline=None)
@given(spaces(), st.integers(0, 99))
def test_admission_is_what_a_study_checks(space: SearchSpace, seed: int) -> None:
    encoding, rng = Encoding(space), np.random.default_rng(seed)
    rows = encoding.draw(30, rng)
    objectives = (Objective.of("accuracy", bound=0.5), Objective.of("flops_per_token", bound=400.0))
    problem = Problem(space=space, objectives=objectives, num_trials=8, limits=Limits({"num_params": 300.0}))
    found = feasible(problem, encoding, rows, encoding.active(rows))
    for row, may in zip(rows, found, strict=True):
        architecture = space.decode(encoding.assignment(row)).architecture
        costs = declared_costs(architecture, space.backbone)
        within = costs["num_params"] <= 300 and costs["flops_per_token"] <= 400
        assert may == (bool(architecture) and within)


# The searchers


def in_batches(searcher: Searcher, num_trials: int, batch: int = 8, **fields: Any) -> list[Trial]:
    """The last batch stays under way while the next one is asked for."""
    trials: list[Trial] = []
    waiting: list[Trial] = []
    while len(trials) + len(waiting) < num_trials:
        searcher.update(trials, waiting)
        suggestions = searcher.suggest(batch)
        if not suggestions and not waiting:
            break
        start = len(trials) + len(waiting)
        trials += [ended(searcher.problem, t.number, t.genes, t.searcher_state, **fields) for t in waiting]
        waiting = [
            replace(ended(searcher.problem, start + i, s.genes, s.state), state="running", measurement=None)
            for i, s in enumerate(suggestions)
        ]
    return [*trials, *waiting]


@both
@pytest.mark.parametrize("num_objectives", mostly_slow((1, 2, 3), 2))
def test_no_point_twice_and_none_beyond_a_limit(name: str, num_objectives: int) -> None:
    problem = replace(problem_of(mixed_space(), num_objectives), limits=Limits({"num_params": 900.0}))
    trials = in_batches(SEARCHERS[name](problem, 2), 64, batch=16)
    assert len(trials) == 64
    assert len(set(exact(trials))) == 64
    for trial in trials:
        assert 0 < trial.candidate.architecture.num_params(SMALL) <= 900


@both
def test_a_bound_on_what_is_declared_is_kept(name: str) -> None:
    objectives = (Objective.of("accuracy"), Objective.of("num_params", bound=400.0))
    problem = Problem(space=mixed_space(), objectives=objectives, num_trials=40)
    trials = in_batches(SEARCHERS[name](problem, 2), 40)
    assert max(trial.candidate.architecture.num_params(SMALL) for trial in trials) <= 400


@both
def test_a_limit_that_only_the_smallest_keep(name: str) -> None:
    """No draw keeps it."""
    lora = AdapterChoice(kind="lora", at=("attn.q", "attn.v"), fields={"rank": Choice.of([0, 1, 2, 4, 8])},
                         vary={"rank": "site"})  # fmt: skip
    space = SearchSpace(backbone=SMALL, adapters={"lora": lora})
    problem = replace(problem_of(space), limits=Limits({"num_params": 32.0}))
    trials = in_batches(SEARCHERS[name](problem, 0), 40)
    assert len(set(exact(trials))) == len(trials) == 6


@either
@pytest.mark.parametrize("batch", [1, 5])
def test_a_finite_space_is_exhausted(name: str, batch: int) -> None:
    lora = AdapterChoice(kind="lora", placement="layer", fields={"rank": Choice.of([1, 2, 4])})
    space = SearchSpace(backbone=SMALL, adapters={"lora": lora})
    problem = problem_of(space)
    searcher = SEARCHERS[name](problem, 1)
    trials: list[Trial] = []
    while True:
        searcher.update(trials)
        suggestions = searcher.suggest(batch)
        if not suggestions:
            break
        trials += [ended(problem, len(trials) + i, s.genes, s.state) for i, s in enumerate(suggestions)]
    assert len(set(exact(trials))) == len(trials) == (2**3 - 1) * 3


@either
def test_trials_without_values_are_known_and_nothing_more(name: str) -> None:
    problem = problem_of(mixed_space())
    searcher = SEARCHERS[name](problem, 0)
    good = run(searcher, 24)
    bad: list[dict[str, Any]] = [
        {"state": "failed", "measurement": None},
        {"state": "infeasible", "measurement": None, "violation": 1.0},
        {"measurement": Measurement(values={"accuracy": float("nan"), "num_params": 1.0})},
        {"measurement": Measurement(values={"accuracy": float("inf"), "num_params": 1.0})},
    ]
    points = [s.genes for s in islice(searcher.suggest(8), 8)]
    more = [ended(problem, 24 + i, genes, **bad[i % 4]) for i, genes in enumerate(points)]
    searcher.update([*good, *more])
    assert isinstance(searcher, SEARCHERS["evolution"])
    parents = {row.tobytes() for row in searcher.fittest(100)}
    assert parents == {row.tobytes() for row in Encoding(problem.space).rows([t.genes for t in good])}
    assert not set(exact(searcher.suggest(64))) & set(exact([*good, *more]))


@both
def test_those_beyond_a_bound_are_parents_only_while_there_is_nothing_else(name: str) -> None:
    problem = problem_of(mixed_space())
    trials = [
        ended(problem, n, problem.space.sample(Random(n)), violation=0.1 * n if n % 2 else -1.0) for n in range(20)
    ]
    searcher = SEARCHERS[name](problem, 0)
    searcher.update(trials)
    rows = Encoding(problem.space).rows([t.genes for t in trials])
    places = [int(np.flatnonzero((rows == row).all(axis=1))[0]) for row in searcher.fittest(20)]
    assert places[10:] == list(range(1, 20, 2))


@either
def test_what_a_measurement_would_forbid_is_left(name: str) -> None:
    """Candidates of more than 1,000 parameters fail, which no declared limit tells."""
    problem = problem_of(mixed_space(), num_trials=96)
    searcher, trials = SEARCHERS[name](problem, 0), list[Trial]()
    while len(trials) < 96:
        searcher.update(trials)
        for suggestion in searcher.suggest(8):
            trial = ended(problem, len(trials), suggestion.genes, suggestion.state)
            fails = trial.values["num_params"] > 1000
            trials.append(replace(trial, state="failed", measurement=None) if fails else trial)
    failed = [trial.state == "failed" for trial in trials]
    assert sum(failed[-32:]) < 0.5 * sum(failed[:20]) * 32 / 20


@either
def test_kept_rows_are_those_of_the_trials(name: str) -> None:
    """A searcher that is told of other trials under the same numbers forgets what it knew."""
    problem = problem_of(mixed_space())
    first, second = ([ended(problem, n, problem.space.sample(Random(f"{k}/{n}"))) for n in range(30)] for k in "ab")
    used = SEARCHERS[name](problem, 0)
    used.update(first)
    used.suggest(2)
    used.update(second[:20], second[20:])
    fresh = SEARCHERS[name](problem, 0)
    fresh.update(second[:20], second[20:])
    assert exact(used.suggest(8)) == exact(fresh.suggest(8))


def test_the_first_generation_has_the_ends_of_the_space() -> None:
    problem = problem_of(mixed_space())
    first = [s.genes for s in SEARCHERS["evolution"](problem, 0).suggest(10)]
    assert first[0] == problem.space.largest()
    assert {s.state["diagnostics"]["phase"] for s in SEARCHERS["evolution"](problem, 0).suggest(10)} == {"initial"}
    few = replace(problem, initial=3)
    trials = run(SEARCHERS["linas"](few, 0), 8)
    assert [t.searcher_state["diagnostics"]["phase"] for t in trials] == ["initial"] * 3 + ["evolution"] + ["model"] * 4


@pytest.mark.parametrize(("name", "num_trials"), [("evolution", 1024), slow("linas", 256)])
def test_one_objective_under_a_limit_is_the_search_of_hat(name: str, num_trials: int) -> None:
    """What it finds is nearer to the best there is than as many draws are that keep the limit."""
    lora = AdapterChoice(kind="lora", fields={"rank": Choice.of([0, 1, 2, 4, 8])}, vary={"rank": "site"})
    space = SearchSpace(backbone=SMALL, adapters={"lora": lora},
                        training={"learning_rate": Float(low=1e-4, high=1e-1, log=True)})  # fmt: skip
    problem = Problem(space=space, objectives=(Objective.of("accuracy"),), num_trials=num_trials,
                      limits=Limits({"num_params": 1200.0}))  # fmt: skip
    trials = in_batches(SEARCHERS[name](problem, 0), num_trials, batch=32)
    assert max(t.candidate.architecture.num_params(SMALL) for t in trials) <= 1200
    encoding = Encoding(space)
    rows = encoding.draw(8 * num_trials, np.random.default_rng(0))
    rows = rows[feasible(problem, encoding, rows, encoding.active(rows))][:num_trials]
    assert len(rows) == num_trials
    by_chance = max(ended(problem, 0, encoding.assignment(row)).values["accuracy"] for row in rows)
    assert 1 - max(t.values["accuracy"] for t in trials if t.state == "complete") < 0.8 * (1 - by_chance)


SEEDS = range(3)


def race(problem: RaceProblem, name: str, trials: int) -> float:
    """Share of the true front's hypervolume."""
    races = [Race(problem=problem.name, searcher=name, seed=seed, trials=trials, batch=32) for seed in SEEDS]
    return median(run_race(race, problem).curve[-1] for race in races)


def by_chance(problem: RaceProblem, trials: int) -> float:
    space = problem.problem.space
    drawn = [[space.sample(Random(f"{seed}/{number}")) for number in range(trials)] for seed in SEEDS]
    return median(problem.shares(map(problem.values, points))[-1] for points in drawn)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["three", "per-layer"])
def test_better_than_random(name: str) -> None:
    """With noise, in batches of 32. Evolution needs some hundred trials for it."""
    problem = PROBLEMS[name]()
    assert 1 - race(problem, "evolution", 512) < 0.75 * (1 - by_chance(problem, 512))
    assert 1 - race(problem, "linas", 128) < 0.75 * (1 - by_chance(problem, 128))


def test_a_predictor_without_features() -> None:
    """Of a space of one point."""
    predictor = Predictor.fit(np.zeros((5, 0)), np.arange(5.0), seed=0)
    assert np.isfinite(predictor.optimistic(np.zeros((2, 0)))).all()
