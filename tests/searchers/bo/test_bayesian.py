"""The searcher `bo`: what it makes of trials, where it starts, what it never proposes, and what it is worth."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from random import Random
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch

from autopeft.search_space import (
    BASELINES,
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
from autopeft.search_space.problem import SEARCH, Role, declared_costs
from autopeft.search_space.spaces.genes import Assignment
from autopeft.searchers import SEARCHERS
from autopeft.searchers.bo.bayesian import Bayesian
from autopeft.searchers.bo.encoding import Encoding
from autopeft.searchers.bo.initial import num_initial
from autopeft.searchers.bo.observations import Data, Observations
from autopeft.searchers.courses import LEAST_COURSES
from autopeft.testing.searchers import exact, run, stored
from autopeft.testing.spaces import SMALL, encoder

from ...support.slow import slow
from ..test_searchers import deep_space, front_of, hypervolume, plausible

RATE = Float(low=1e-4, high=1e-1, log=True)
ACCURACY, PARAMS = Objective.of("accuracy"), Objective.of("num_params")


def layered_space(training: Mapping[str, Any] | None = None) -> SearchSpace:
    """A rank of its own in each of three layers, and the learning rate."""
    lora = AdapterChoice(kind="lora", fields={"rank": Choice.of([0, 1, 2, 4, 8])}, vary={"rank": "layer"})
    return SearchSpace(
        backbone=SMALL, adapters={"lora": lora}, training={"learning_rate": RATE} if training is None else training
    )


def problem_of(space: SearchSpace, *objectives: Objective, **fields: Any) -> Problem:
    return Problem(space=space, objectives=objectives or (ACCURACY, PARAMS), num_trials=24, **fields)


def quality(genes: Assignment) -> float:
    """Ranks help with diminishing returns, and so does a learning rate near 0.01."""
    ranks = sum(1 - 0.6 ** float(value) for name, value in genes.items() if ".rank.layers" in name)
    return 0.5 + 0.1 * ranks - 0.1 * abs(np.log10(float(genes.get("training.learning_rate", 0.01))) + 2)


def ended(problem: Problem, number: int, genes: Assignment, suggested: Any = None, **fields: Any) -> Trial:
    """Complete unless told otherwise; `values` in place of those that follow from the genes."""
    candidate = problem.space.decode(genes)
    accuracy = quality(genes)
    values = {"accuracy": accuracy, "loss": 1 - accuracy, "latency_s": 0.01 * len(genes), "step_s": 1.0}
    values |= declared_costs(candidate.architecture, problem.space.backbone) | fields.pop("values", {})
    measurement = Measurement(values=values, **fields.pop("measured", {}))
    fields = {"state": "complete", "measurement": measurement, "violation": -1.0} | fields
    if fields["state"] in ("failed", "infeasible", "running"):
        fields |= {"measurement": None}
    return Trial(number=number, role=SEARCH, candidate=candidate, genes=genes, searcher_state=suggested or {},
                 **fields)  # fmt: skip


def drawn(problem: Problem, count: int, seed: int = 0) -> list[Assignment]:
    """Points with at least one adapter."""
    points = (problem.space.sample(Random(f"{seed}/{i}")) for i in range(10 * count))
    return [genes for genes in points if problem.space.decode(genes).architecture][:count]


def known(problem: Problem, count: int, seed: int = 0) -> list[Trial]:
    return [ended(problem, number, genes) for number, genes in enumerate(drawn(problem, count, seed))]


def asked(problem: Problem, trials: Sequence[Trial], seed: int = 0, count: int = 1) -> list[Any]:
    searcher = Bayesian(problem, seed)
    searcher.update(trials)
    return searcher.suggest(count)


def told(suggestion: Any) -> Mapping[str, Any]:
    return suggestion.state["diagnostics"]


def params(problem: Problem, genes: Assignment) -> int:
    return problem.space.decode(genes).architecture.num_params(problem.space.backbone)


def seen(problem: Problem, trials: Sequence[Trial]) -> Data:
    searcher = Bayesian(problem, 0)
    data = Observations(problem, Encoding(problem.space)).of(trials, searcher.losses)
    assert data is not None
    return data


def believed(problem: Problem, trials: Sequence[Trial], points: Sequence[Assignment]) -> np.ndarray:
    """The loss of the first objective that is expected of points."""
    searcher = Bayesian(problem, 0)
    searcher.update(trials)
    posterior = searcher._fit()
    assert posterior is not None
    rows = searcher.encoding.rows(points)
    with torch.no_grad():
        mean = posterior.processes[0].model.posterior(posterior.inputs(rows, searcher.encoding.active(rows))).mean[:, 0]
    return mean.numpy() * posterior.scale[0] + posterior.centre[0]


# Observations


def test_candidates_beyond_a_bound_of_what_is_reported_have_failed() -> None:
    space = layered_space()
    plain = problem_of(space)
    trials = known(plain, 10)
    middle = sorted(trial.values["accuracy"] for trial in trials)[5]
    bound = Objective.of("loss", bound=1 - middle)
    data = seen(problem_of(space, reported=(bound,)), trials)
    assert (len(data.rows), int(data.failed.sum()), len(data.tried)) == (5, 5, 10)
    assert (-data.losses[:, 0] >= middle).all()
    for reported in ((), (Objective.of("loss"),), (Objective.of("brier", bound=0.1),)):
        data = seen(problem_of(space, reported=reported), trials)
        assert (len(data.rows), int(data.failed.sum())) == (10, 0), "no bound, or no value of it"


def course(problem: Problem, number: int, genes: Assignment, at_rung: float, accuracy: float, **fields: Any) -> Trial:
    """A trial that had the loss `at_rung` after half of the steps."""
    measured = {"rungs": ((0.25, {"loss": 9.0}), (0.5, {"loss": at_rung})), **fields.pop("measured", {})}
    return ended(problem, number, genes, values={"accuracy": accuracy}, measured=measured, **fields)


pruned = {"state": "pruned", "measured": {"share": 0.5}}


@pytest.mark.parametrize("num_complete", [LEAST_COURSES - 1, LEAST_COURSES, 9])
def test_pruned_trials_are_taken_to_their_end(num_complete: int) -> None:
    """By the line through the complete ones, and as uncertain as that is; as they stand where there are too few."""
    problem = problem_of(layered_space())
    points = drawn(problem, num_complete + 1)
    rng = np.random.default_rng(0)
    losses = rng.uniform(0.2, 1.0, size=num_complete)
    finals = 0.95 - 0.3 * losses + 0.01 * rng.normal(size=num_complete)
    trials = [course(problem, i, points[i], losses[i], finals[i]) for i in range(num_complete)]
    trials.append(course(problem, num_complete, points[-1], 1.2, 0.31, **pruned))
    data = seen(problem, trials)
    assert data.complete.tolist() == [True] * num_complete + [False]
    assert np.allclose(data.losses[:-1, 0], -finals)
    assert np.isnan(data.noise[:-1, 0]).all()
    if num_complete < LEAST_COURSES:
        assert data.losses[-1, 0] == -0.31
        assert data.noise[-1, 0] == pytest.approx(np.var(finals))
    else:
        slope, start = np.polyfit(losses, finals, 1)
        residuals = finals - slope * losses - start
        assert data.losses[-1, 0] == pytest.approx(-(start + slope * 1.2))
        assert data.noise[-1, 0] == pytest.approx(residuals @ residuals / (num_complete - 2), rel=1e-6)
    assert data.losses[-1, 1] == np.log(params(problem, points[-1])), "costs do not grow with the training"


def test_a_better_rung_never_speaks_against_a_trial() -> None:
    problem = problem_of(layered_space())
    points = drawn(problem, 7)
    finals = [0.5 + 0.05 * i for i in range(6)]
    trials = [course(problem, i, points[i], 0.3 + 0.1 * i, finals[i]) for i in range(6)]
    for at_rung in (0.1, 2.0):
        data = seen(problem, [*trials, course(problem, 6, points[6], at_rung, 0.2, **pruned)])
        assert data.losses[-1, 0] == pytest.approx(-np.mean(finals))


def test_complete_trials_that_passed_another_rung_tell_nothing() -> None:
    problem = problem_of(layered_space())
    points = drawn(problem, 9)
    trials = [course(problem, i, points[i], 0.3 + 0.1 * i, 0.9 - 0.1 * i) for i in range(8)]
    last = course(problem, 8, points[8], 0.5, 0.4, state="pruned", measured={"share": 0.125, "rungs": ()})
    data = seen(problem, [*trials, last])
    assert data.losses[-1, 0] == -0.4
    assert data.noise[-1, 0] == pytest.approx(np.var([t.values["accuracy"] for t in trials]))


def test_pruned_trials_inform_the_model() -> None:
    """High ranks were pruned for a high loss: the posterior is worse there than at trials that continued."""
    problem = problem_of(layered_space())
    points = sorted(drawn(problem, 24), key=lambda genes: params(problem, genes))
    good = [
        course(problem, i, genes, 0.3 + 0.01 * (i % 5), 0.86 - 0.005 * (i % 5)) for i, genes in enumerate(points[:16])
    ]
    bad = [course(problem, 16 + i, genes, 0.9, 0.3, **pruned) for i, genes in enumerate(points[16:])]
    without = believed(problem, good, points)
    found = believed(problem, [*good, *bad], points)
    assert found[16:].min() > found[:16].max()
    assert (found[16:] - without[16:]).min() > 0.02
    assert exact(asked(problem, [*good, *bad])) != exact(asked(problem, good))


def test_duplicates_count_once() -> None:
    problem = problem_of(layered_space())
    trials = known(problem, 10)
    copies = [replace(trials[3], number=10 + i) for i in range(8)]
    data, alone = seen(problem, [*trials, *copies]), seen(problem, trials)
    assert np.array_equal(data.rows, alone.rows)
    assert np.array_equal(data.losses, alone.losses)
    assert np.array_equal(data.tried, alone.tried)


def test_what_failed_and_what_was_ruled_out() -> None:
    """What declared costs explain is nothing that a model has to learn."""
    problem = problem_of(layered_space(), limits=Limits({"num_params": 800, "peak_memory_bytes": 1e6}))
    points = drawn(problem, 40)
    small = [genes for genes in points if params(problem, genes) <= 800]
    large = [genes for genes in points if params(problem, genes) > 800]
    assert len(small) >= 8
    assert len(large) >= 2
    empty = {"lora.rank.on.layers.0": False, "lora.rank.on.layers.1": False, "lora.rank.on.layers.2": False,
             "training.learning_rate": 0.01}  # fmt: skip
    trials = [ended(problem, i, genes) for i, genes in enumerate(small[:4])]
    trials += [ended(problem, 4, small[4], state="failed"), ended(problem, 5, small[5], state="infeasible"),
               ended(problem, 6, large[0], state="infeasible"), ended(problem, 7, empty, state="infeasible"),
               ended(problem, 8, large[1], state="failed"),
               ended(problem, 9, small[6], values={"accuracy": np.nan})]  # fmt: skip
    data = seen(problem, trials)
    assert len(data.rows) == 4
    expected = [(genes, False) for genes in small[:4]] + [(small[4], True), (small[5], True), (large[1], True)]
    assert data.failed.tolist() == [failed for _, failed in expected]
    assert np.array_equal(data.tried, Encoding(problem.space).rows([genes for genes, _ in expected]))


def test_errors_are_variances_and_a_diverged_training_is_not_endless() -> None:
    problem = problem_of(layered_space(), Objective.of("loss"), PARAMS)
    trials = known(problem, 11)
    errors = {"std_err": {"loss": 0.02}}
    trials[0] = ended(problem, 0, trials[0].genes, values={"loss": 1e9}, measured=errors)
    data = seen(problem, trials)
    assert data.noise[0, 0] == pytest.approx(0.0004)
    assert np.isnan(data.noise[1:]).all()
    others = data.losses[1:, 0]
    assert others.max() < data.losses[0, 0] < others.max() + 10 * np.ptp(others)


def test_nothing_to_see() -> None:
    problem = problem_of(layered_space())
    observations = Observations(problem, Encoding(problem.space))
    losses = Bayesian(problem, 0).losses
    (trial,) = known(problem, 1)
    for trials in ([], [trial], [trial, replace(trial, number=1)]):
        assert observations.of(trials, losses) is None


# The first points


def per_layer() -> SearchSpace:
    """The most copied set-up, rank 8 on query and value, lies in it."""
    backbone = encoder(num_layers=4, hidden_size=64, inner_size=128)
    fields = {"rank": Choice.of([0, 2, 8, 16]), "alpha": 16.0}
    adapters = {
        "queries": AdapterChoice(kind="lora", at=("attn.q", "attn.v"), fields=fields, vary={"rank": "layer"}),
        "wide": AdapterChoice(kind="lora", at=("mlp.up",), fields=fields, vary={"rank": "layer"}),
    }
    return SearchSpace(backbone=backbone, adapters=adapters, training={"learning_rate": RATE})


def first_points(problem: Problem, seed: int = 0) -> list[Assignment]:
    """The design: what is proposed as long as nothing has ended."""
    return [suggestion.genes for suggestion in Bayesian(problem, seed).suggest(num_initial(problem))]


@pytest.mark.parametrize("seed", range(3))
def test_the_design_has_the_ends_and_what_people_copy(seed: int) -> None:
    problem = problem_of(per_layer(), initial=12)
    points = first_points(problem, seed)
    sizes = [params(problem, genes) for genes in points]
    assert len(points) == len(set(exact_points(points))) == 12
    assert max(sizes) == params(problem, problem.space.largest())
    # A single adapter of the lowest rank, where the matrices are the smallest.
    assert min(sizes) == sizes[0] == 2 * (64 + 128)
    baseline = problem.space.decode(points[2]).architecture
    assert baseline == BASELINES["lora-r8-qv"](problem.space.backbone)
    assert len({sum(size > limit for limit in np.quantile(sizes, [0.25, 0.5, 0.75])) for size in sizes}) == 4
    rates = sorted(RATE.to_unit(genes["training.learning_rate"]) for genes in points)
    assert rates[0] < 0.3
    assert rates[-1] > 0.7
    assert first_points(problem, seed + 1)[3:] != points[3:]


def exact_points(points: Sequence[Assignment]) -> list[str]:
    return [json.dumps(genes) for genes in points]


@pytest.mark.parametrize(("initial", "expected"), [(None, 6), (9, 9), slow(0, 0)])
def test_the_length_of_the_design(initial: int | None, expected: int) -> None:
    problem = problem_of(layered_space(), initial=initial)
    assert num_initial(problem) == expected
    phases = [t.searcher_state["diagnostics"]["phase"] for t in run(Bayesian(problem, 0), 11, ended)]
    # Two points at least, so that there is something to model.
    assert phases == ["initial"] * max(2, expected) + ["model"] * (11 - max(2, expected))


def test_points_that_it_did_not_propose_count() -> None:
    """Those that a study starts with: the design is shorter by them, and none of them comes again."""
    problem = problem_of(layered_space(), initial=8)
    design = first_points(problem)
    start = [ended(problem, 0, design[1]), ended(problem, 1, drawn(problem, 1)[0])]
    trials = run(Bayesian(problem, 0), 12, ended, start)
    phases = [t.searcher_state["diagnostics"]["phase"] for t in trials[2:]]
    assert phases == ["initial"] * 6 + ["model"] * 4
    assert len(set(exact(trials))) == 12


@pytest.mark.parametrize("count", [5, 12])
def test_an_earlier_study_has_a_quarter_of_the_design_at_most(count: int) -> None:
    problem = problem_of(layered_space())
    earlier = known(problem, 30, seed=5)
    problem = replace(problem, prior=tuple(earlier), initial=count)
    points = first_points(problem)
    best = sorted(earlier, key=lambda t: -t.values["accuracy"])[0]
    assert points[0] == best.genes, "the best of its front first"
    shared = [genes for genes in points if genes in [t.genes for t in earlier]]
    assert 1 <= len(shared) <= count // 4
    beaten = [t for t in earlier if any(dominates(other, t) for other in earlier)]
    assert beaten
    assert not any(genes in [t.genes for t in beaten] for genes in points)


def dominates(a: Trial, b: Trial) -> bool:
    x, y = ((t.values["accuracy"], -t.values["num_params"]) for t in (a, b))
    return x != y and all(i >= j for i, j in zip(x, y, strict=True))


def test_an_earlier_study_need_not_have_measured_the_same() -> None:
    problem = problem_of(layered_space(), ACCURACY, Objective.of("latency_s"))
    earlier = known(problem, 8, seed=5)
    bare = [replace(t, measurement=Measurement(values={"accuracy": t.values["accuracy"]})) for t in earlier]
    problem = replace(problem, prior=tuple(bare))
    assert len(run(Bayesian(problem, 0), 8, ended)) == 8


@pytest.mark.slow
def test_an_earlier_study_tells_where_to_go() -> None:
    """Of few trials the model knows more, if the other task is like this one."""
    problem = problem_of(layered_space())
    others = drawn(problem, 60, seed=3)
    truth = [-quality(genes) for genes in others]
    related = replace(problem, prior=tuple(known(problem, 25, seed=9)))
    # Of several draws, because seven trials may happen to tell much.
    alone, helped = (
        np.mean([np.abs(believed(which, known(problem, 7, seed), others) - truth).mean() for seed in (1, 2, 3)])
        for which in (problem, related)
    )
    assert helped < 0.8 * alone


# Replay and batches: test_searchers.py has more


def test_another_object_says_the_same() -> None:
    problem = problem_of(layered_space())
    searcher = Bayesian(problem, 3)
    trials = run(searcher, 10, ended)
    searcher.update(trials)
    expected = searcher.suggest(4)
    assert len({json.dumps(s.genes) for s in expected}) == 4
    fresh = asked(problem, stored(trials), seed=3, count=4)
    assert exact(fresh) == exact(expected)
    assert [dict(a.state) for a in fresh] == [dict(b.state) for b in expected]
    assert json.loads(json.dumps([s.state for s in fresh])) == [s.state for s in fresh]
    assert exact(asked(problem, trials, seed=4, count=4)) != exact(expected)


def test_it_forgets_what_it_is_not_told_again() -> None:
    """An object that has seen other trials of the same numbers says what a new one says."""
    problem = problem_of(layered_space())
    searcher = Bayesian(problem, 0)
    trials = known(problem, 8)
    searcher.update([ended(problem, t.number, t.genes, values={"accuracy": 1 - t.values["accuracy"]}) for t in trials])
    before = searcher.suggest()
    searcher.update(trials)
    assert exact(searcher.suggest()) == exact(asked(problem, trials)) != exact(before)


def test_points_of_a_batch_are_not_nearly_the_same() -> None:
    """Another learning rate by a hair would be another point: what is under way counts as measured."""
    problem = problem_of(layered_space())
    encoding = Encoding(problem.space)
    nearest = []
    for seed in range(3):
        batch = [s.genes for s in asked(problem, known(problem, 14, seed), seed, count=4)]
        rows = encoding.rows(batch)
        features = encoding.features(rows, encoding.active(rows))
        distance = np.linalg.norm(features[:, None] - features, axis=-1)
        nearest.append(distance[np.triu_indices(4, 1)].min())
    assert min(nearest) > 0.05


# What is not proposed


def fails_above(limit: float, problem: Problem, number: int, genes: Assignment, suggested: Any = None) -> Trial:
    """Training diverges at high learning rates, and the nearer to that, the better it is."""
    unit = RATE.to_unit(genes["training.learning_rate"])
    if unit > limit:
        return ended(problem, number, genes, suggested, state="failed", error="the loss became nan")
    return ended(problem, number, genes, suggested, values={"accuracy": quality({**genes, **FIXED}) + 0.2 * unit})


FIXED = {"training.learning_rate": 0.01}


@pytest.mark.slow
def test_regions_where_training_fails_are_avoided() -> None:
    """Two fifths of the space fail, and the nearer to them, the better. Without a process for what fails, nearly all
    proposals are in vain.
    """
    problem = problem_of(layered_space())
    rates: list[float] = []
    for seed in range(4):
        trials = [fails_above(0.6, problem, i, genes) for i, genes in enumerate(drawn(problem, 16, seed))]
        assert 4 <= sum(t.state == "failed" for t in trials) <= 12
        trials = run(Bayesian(problem, seed), 26, partial(fails_above, 0.6), trials)
        rates += [RATE.to_unit(t.genes["training.learning_rate"]) for t in trials[16:]]
    assert sum(rate > 0.6 for rate in rates) <= 0.33 * len(rates)
    assert sum(rate > 0.7 for rate in rates) <= 0.15 * len(rates)
    assert sum(0.4 < rate <= 0.6 for rate in rates) >= 0.4 * len(rates), "and the good region beside it is not"


def noisy(problem: Problem, number: int, genes: Assignment, suggested: Any = None) -> Trial:
    return ended(problem, number, genes, suggested, values={"accuracy": Random(f"noise/{number}").random()})


@pytest.mark.parametrize("end", [ended, slow(noisy)], ids=["a model proposes", "evolution proposes"])
@pytest.mark.parametrize(("name", "most", "bound"), [("stored_bytes", 1800, None), slow("flops_per_token", None, 900)])
def test_limits_hold(end: Any, name: str, most: float | None, bound: float | None) -> None:
    """Those on what is declared; a bound on an objective is one. In the design and after trials beyond them."""
    problem = problem_of(layered_space(), ACCURACY, Objective.of("flops_per_token", bound=bound),
                         limits=Limits({} if most is None else {name: most}))  # fmt: skip
    start = [end(problem, i, genes) for i, genes in enumerate(drawn(problem, 22))]
    beyond = (most or 0) + (bound or 0)
    assert sum(t.values[name] > beyond for t in start) > 5
    for trials in (run(Bayesian(problem, 0), 9, end), run(Bayesian(problem, 1), 26, end, start)[22:]):
        assert all(0 < t.values[name] <= beyond for t in trials)


@pytest.mark.slow
def test_a_bound_on_what_is_measured() -> None:
    """Only accuracies above 0.7 count: nothing small is tried that is far below."""
    free, bound = (problem_of(layered_space(), Objective.of("accuracy", bound=b), PARAMS) for b in (None, 0.7))
    start = known(free, 14)
    found = [run(Bayesian(problem, 0), 22, ended, start)[14:] for problem in (free, bound)]
    below = [sum(t.values["accuracy"] < 0.66 for t in trials) for trials in found]
    assert below[1] <= 1 < below[0]


def test_a_reference_is_a_corner() -> None:
    """What is larger than the corner adds nothing."""
    objectives = (ACCURACY, Objective.of("num_params", reference=400))
    trials = run(
        Bayesian(problem_of(layered_space(), *objectives), 0), 20, ended, known(problem_of(layered_space()), 14)
    )
    assert sum(t.values["num_params"] >= 400 for t in trials[14:]) <= 1


def test_a_small_space_ends() -> None:
    """Two ranks in two layers: eight points that train something."""
    lora = AdapterChoice(kind="lora", layers=(0, 1), fields={"rank": Choice.of([0, 1, 2])}, vary={"rank": "layer"})
    problem = problem_of(SearchSpace(backbone=SMALL, adapters={"lora": lora}))
    searcher = Bayesian(problem, 0)
    trials: list[Trial] = []
    while suggestions := searcher.suggest(3):
        trials += [ended(problem, len(trials) + i, s.genes, s.state) for i, s in enumerate(suggestions)]
        searcher.update(trials)
        assert len(trials) <= 8
    assert len(set(exact(trials))) == 8
    searcher.update(trials[:6], [replace(t, state="running", measurement=None) for t in trials[6:]])
    assert searcher.suggest(2) == []
    failed = [ended(problem, t.number, t.genes, state="failed") for t in trials]
    searcher.update(failed)
    assert searcher.suggest(2) == []


# Objectives and spaces


@pytest.mark.parametrize(
    "objectives",
    [("accuracy",), ("num_params",), ("num_params", "flops_per_token"),
     slow(("accuracy", "num_params", "flops_per_token")), slow(("accuracy", "loss", "latency_s")),
     slow(("num_params", "accuracy", "step_s", "loss"))],
    ids="-".join,
)  # fmt: skip
def test_objectives(objectives: Sequence[str]) -> None:
    """One to four, measured or known, in any order; `step_s` is constant."""
    problem = problem_of(layered_space(), *map(Objective.of, objectives))
    trials = run(Bayesian(problem, 0), 10, ended)
    assert len(set(exact(trials))) == 10
    phase = told(asked(problem, trials)[0])["phase"]
    measured = set(objectives) - {"num_params", "flops_per_token"}
    assert phase == ("model" if measured else "evolution")


@pytest.mark.slow
def test_one_objective_is_optimised() -> None:
    """The largest ranks and a learning rate near 0.01 are the best."""
    problem = problem_of(layered_space(), ACCURACY)
    trials = run(Bayesian(problem, 0), 20, ended)
    best = max(trials, key=lambda t: t.values["accuracy"])
    assert best.values["accuracy"] > 0.5 + 0.3 * (1 - 0.6**8) - 0.05


@pytest.mark.parametrize("training", [{}, {"learning_rate": RATE, "schedule": Choice.of(("linear", "cosine"))}])
def test_spaces_without_a_choice_of_architecture(training: Mapping[str, Any]) -> None:
    space = SearchSpace(backbone=SMALL, adapters={"norm": AdapterChoice(kind="norm")}, training=training)
    problem = problem_of(space)
    searcher = Bayesian(problem, 0)
    trials: list[Trial] = []
    for _ in range(9):
        searcher.update(trials)
        trials += [ended(problem, len(trials), s.genes, s.state) for s in searcher.suggest()]
    assert len(trials) == (9 if training else 1)


# When a model is no use


@pytest.mark.slow
def test_noise_is_left_to_evolution() -> None:
    """As long as the surrogate ranks no better than chance; its word is taken again when it does."""
    problem = problem_of(layered_space())
    points = drawn(problem, 34)
    phases = []
    for seed in range(8):
        values = [{"accuracy": Random(f"{seed}/{i}").random()} for i in range(34)]
        trials = [ended(problem, i, genes, values=values[i]) for i, genes in enumerate(points)]
        (suggestion,) = asked(problem, trials)
        state = told(suggestion)
        phases.append(state["phase"])
        if state["phase"] == "evolution":
            assert "NSGA-II" in state["note"]
            assert "no better than chance" in state["note"]
            assert state["rank_correlation"]["accuracy"] < 0.4
            assert state["relevance"]
            assert len(suggestion.state) == 2, "a generation goes on: its number comes with the trial"
        # The same trials, had there been something to learn.
        trials.append(noisy(problem, 34, suggestion.genes, suggestion.state))
        better = [ended(problem, t.number, t.genes, t.searcher_state) for t in stored(trials)]
        state = told(asked(problem, better)[0])
        assert state["phase"] == "model"
        assert "note" not in state
    assert phases.count("evolution") >= 4


def test_a_few_trials_are_not_doubted() -> None:
    problem = problem_of(layered_space())
    trials = [noisy(problem, i, genes) for i, genes in enumerate(drawn(problem, 12))]
    assert told(asked(problem, trials)[0])["phase"] == "model"


def test_diagnostics() -> None:
    problem = problem_of(layered_space(), ACCURACY, Objective.of("latency_s"), PARAMS)
    state = told(asked(problem, known(problem, 24))[0])
    assert json.loads(json.dumps(state)) == state
    assert state.keys() == {"phase", "rank_correlation", "relevance"}
    assert state["rank_correlation"].keys() == state["relevance"].keys() == {"accuracy", "latency_s"}
    assert state["rank_correlation"]["accuracy"] > 0.7
    genes = {gene.name for gene in problem.space.genes}
    for shares in state["relevance"].values():
        assert shares.keys() <= genes
        assert 0.9 < sum(shares.values()) <= 1.001
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
    gates = {name: share for name, share in state["relevance"]["latency_s"].items() if ".on." in name}
    assert max(gates.values()) > state["relevance"]["latency_s"].get("training.learning_rate", 0.0)


# Worth its time


@pytest.mark.slow
def test_it_finds_in_twenty_trials_what_random_search_does_not_find_in_forty() -> None:
    problem = replace(problem_of(deep_space()), num_trials=40)
    found = [hypervolume(run(Bayesian(problem, seed), 20, plausible)) for seed in range(3)]
    by_chance = [front_of(SEARCHERS["random"](problem, seed), 40) for seed in range(3)]
    assert median(found) > 1.1 * median(by_chance)
    assert min(found) > max(by_chance)


@pytest.mark.slow
def test_batches_of_four_are_nearly_as_good() -> None:
    """Points under way keep each other apart."""
    problem = replace(problem_of(deep_space()), num_trials=40)
    searcher = Bayesian(problem, 0)
    trials: list[Trial] = []
    while len(trials) < 28:
        searcher.update(trials)
        trials += [plausible(problem, len(trials) + i, s.genes, s.state) for i, s in enumerate(searcher.suggest(4))]
    assert len({t.candidate.key for t in trials}) == 28
    assert hypervolume(trials) > 1.1 * front_of(SEARCHERS["random"](problem, 0), 40)


# Imports


def test_nothing_heavy_is_loaded_before_there_is_something_to_model() -> None:
    code = (
        "import sys\n"
        "from autopeft.searchers import SEARCHERS\n"
        "heavy = {'torch', 'botorch', 'gpytorch'} & set(sys.modules)\n"
        "assert not heavy, sorted(heavy)\n"
        "assert 'bo' in SEARCHERS\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_is_known_beside_the_search_is_modelled_and_not_asked_for() -> None:
    space = layered_space()
    problem = Problem(space=space, objectives=(Objective.of("accuracy"), Objective.of("num_params")), num_trials=12)
    rng, known = Random(1), []
    for number in range(10):
        genes = space.sample(rng)
        candidate = space.decode(genes)
        values = {"accuracy": quality(genes), **declared_costs(candidate.architecture, space.backbone)}
        measurement = Measurement(values=values)
        known.append(
            Trial(number=number, role=Role("baseline", "x"), candidate=candidate, genes=genes, state="complete",
                  measurement=measurement)
        )  # fmt: skip
    alone, told = (Bayesian(replace(problem, observed=trials), 0) for trials in ((), tuple(known)))
    for searcher in (alone, told):
        searcher.update([replace(trial, role=SEARCH) for trial in known[:4]])
    assert alone._fit().data.rows.shape[0] == 4  # type: ignore[union-attr]
    assert told._fit().data.rows.shape[0] == 10  # type: ignore[union-attr]
    keys = {trial.candidate.key for trial in known}
    assert all(space.decode(s.genes).key not in keys for s in told.suggest(3))


@pytest.mark.slow
def test_the_goal_finds_what_is_cheap_and_as_good() -> None:
    """After twenty trials, it has a better best and a cheaper one that is as good than with the goal "front"."""
    space = deep_space()
    found: dict[str, tuple[float, float]] = {}
    for goal in ("front", "cheapest_as_good"):
        problem = Problem(space=space, objectives=(ACCURACY, PARAMS), num_trials=20, goal=goal)
        bests, costs = [], []
        for seed in range(3):
            trials = run(Bayesian(problem, seed), 20, plausible)
            values = [trial.values for trial in trials if trial.state == "complete"]
            best = max(each["accuracy"] for each in values)
            bests.append(best)
            costs.append(min(each["num_params"] for each in values if each["accuracy"] >= best - 0.01))
        found[goal] = median(bests), median(costs)
    assert found["cheapest_as_good"][0] >= found["front"][0]


@pytest.mark.parametrize(
    "objectives",
    [(ACCURACY,), (PARAMS, Objective.of("stored_bytes")), (ACCURACY, Objective.of("num_params", maximise=True))],
)
def test_the_goal_needs_a_quality_and_a_cost(objectives: tuple[Objective, ...]) -> None:
    with pytest.raises(ValueError, match="a quality and a cost to minimise"):
        Problem(space=layered_space(), objectives=objectives, num_trials=4, goal="cheapest_as_good")


@pytest.mark.parametrize("cost", ["num_params", slow("latency_s")])
def test_a_goal_with_a_declared_and_with_a_measured_cost(cost: str) -> None:
    problem = problem_of(layered_space(), ACCURACY, Objective.of(cost), goal="cheapest_as_good", within=0.02)
    trials = known(problem, 12)
    (suggestion,) = asked(problem, trials)
    assert told(suggestion)["phase"] == "model"
    best = max(trial.values["accuracy"] for trial in trials)
    cheapest = min(t.values["num_params"] for t in trials if t.values["accuracy"] >= best - 0.02)
    cheaper = params(problem, suggestion.genes) < cheapest
    better = believed(problem, trials, [suggestion.genes]).min() < -best + 0.02
    assert cheaper or better


@pytest.mark.parametrize("cost", ["num_params", slow("latency_s")])
def test_the_chance_of_something_cheaper_is_that_of_the_model(cost: str) -> None:
    problem = problem_of(layered_space(), ACCURACY, Objective.of(cost), goal="cheapest_as_good", within=0.02)
    trials = known(problem, 12)
    searcher = Bayesian(problem, 0)
    searcher.update(trials)
    costs = sorted(trial.values[cost] for trial in trials)
    found = [searcher.chance_of_cheaper(4, below) for below in (0.0, costs[4], 10 * costs[-1])]
    assert [count for count, _ in found] == [4, 4, 4]
    chances = [chance for _, chance in found]
    assert chances == sorted(chances)
    assert chances[0] == 0
    # In the obvious way: draw from BoTorch's joint posterior, and look.
    posterior = searcher._fit()
    assert posterior is not None
    proposed = searcher.encoding.rows([suggestion.genes for suggestion in searcher.suggest(4)])
    points = np.vstack([posterior.data.rows, proposed])
    active = searcher.encoding.active(points)
    inputs = posterior.inputs(points, active)
    with torch.no_grad():
        torch.manual_seed(0)
        losses = posterior.processes[0].model.posterior(inputs).rsample(torch.Size([4000]))[..., 0].numpy()
        losses = losses * posterior.scale[0] + posterior.centre[0]
        cheaper = posterior._log_costs(inputs, points, active).numpy()[12:] < np.log(costs[4]) - 1e-9
    found = (losses[:, 12:] <= losses.min(1, keepdims=True) + 0.02) & cheaper
    assert chances[1] == pytest.approx(found.any(1).mean(), abs=0.05)


def test_no_chance_is_named_without_a_model() -> None:
    problem = problem_of(layered_space())
    searcher = Bayesian(problem, 0)
    assert searcher.chance_of_cheaper(4, 1e9) is None
    costly = problem_of(layered_space(), ACCURACY, Objective.of("num_params", maximise=True))
    searcher = Bayesian(costly, 0)
    searcher.update(known(costly, 12))
    assert searcher.chance_of_cheaper(4, 1e9) is None, "there is no cost to minimise"
