"""What every searcher must do: one row per searcher; and what each claims beyond that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from statistics import median
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopeft.search_space import (
    AdapterChoice,
    Choice,
    Float,
    Int,
    Measurement,
    OneOf,
    Problem,
    SearchSpace,
    Trial,
)
from autopeft.search_space.domains import Domain
from autopeft.search_space.spaces.genes import Assignment
from autopeft.searchers import SEARCHERS, Searcher
from autopeft.searchers.enumerated import LARGEST_GRID, grid_values
from autopeft.searchers.optuna_samplers import from_optuna, to_optuna
from autopeft.testing.searchers import (
    CHECKS,
    SearcherCheck,
    a_study_without_any_value,
    directions_can_be_mixed,
    ended,
    exact,
    no_warnings_and_no_output,
    problem_of,
    run,
    trials_and_seed_alone_decide,
    trials_are_taken_in_the_order_of_their_numbers,
)
from autopeft.testing.spaces import RANKS, RATE, SMALL, encoder, mixed_space

from ..support.slow import slow
from ..support.spaces import spaces


def short_space() -> SearchSpace:
    lora = AdapterChoice(kind="lora", fields={"rank": Choice.of([0, 2, 4]), "alpha": Choice.of([8.0, 16.0])})
    beside = AdapterChoice(kind="bottleneck", placement="layer", fields={"size": 2})
    return SearchSpace(backbone=SMALL, adapters={"lora": lora, "beside": beside}, training={"learning_rate": RATE})


@dataclass(frozen=True)
class Row:
    space: Callable[[], SearchSpace]
    #: Whether it goes on for ever; another ends where there is no point left.
    endless: bool = True
    #: How long its studies are here: one that fits a model takes a while.
    num_trials: int = 24


ROWS = {
    "random": Row(mixed_space),
    "qmc": Row(mixed_space),
    "tpe": Row(mixed_space),
    "nsga2": Row(mixed_space),
    "evolution": Row(mixed_space, endless=False),
    "linas": Row(mixed_space, endless=False, num_trials=12),
    "bo": Row(mixed_space, endless=False, num_trials=12),
    "proxy": Row(mixed_space, endless=False, num_trials=6),  # without scores: with some, in test_proxied.py
    "gates": Row(mixed_space, endless=False, num_trials=6),  # without proposals: with some, in test_gated.py
    "shrink": Row(mixed_space, endless=False, num_trials=6),  # without scores: with some, in test_shrunk.py
    "grid": Row(short_space, endless=False),
}
#: Of searchers that fit a model, the checks that are no slow tests; proxy, gates and shrink are `bo` here.
QUICK: dict[str, tuple[SearcherCheck, ...]] = {
    "linas": (
        trials_are_taken_in_the_order_of_their_numbers,
        a_study_without_any_value,
        no_warnings_and_no_output,
    ),
    "bo": (
        trials_and_seed_alone_decide,
        a_study_without_any_value,
        no_warnings_and_no_output,
    ),
    **dict.fromkeys(("proxy", "gates", "shrink"), (a_study_without_any_value, directions_can_be_mixed)),
}
every_searcher = pytest.mark.parametrize("name", ROWS)


def test_every_searcher_has_a_row() -> None:
    assert ROWS.keys() == SEARCHERS.keys()
    for name, searcher in SEARCHERS.items():
        assert searcher.name == name
        assert searcher.summary


# Conformance


@pytest.mark.parametrize(
    ("name", "check"),
    [
        pytest.param(
            name,
            check,
            id=f"{check.__name__}-{name}",
            marks=[pytest.mark.slow] * (check not in QUICK.get(name, CHECKS)),
        )
        for name in ROWS
        for check in CHECKS
    ],
)
def test_it_passes_the_checks_of_plug_ins(check: SearcherCheck, name: str) -> None:
    check(SEARCHERS[name], ROWS[name].space(), ROWS[name].num_trials)


@every_searcher
def test_a_space_with_one_point(name: str) -> None:
    space = SearchSpace(backbone=SMALL, adapters={"lora": AdapterChoice(kind="lora", fields={"rank": 2})})
    searcher = SEARCHERS[name](problem_of(space), 0)
    for number in range(14):
        suggestions = searcher.suggest()
        if not ROWS[name].endless and number:
            assert suggestions == []
            break
        assert [s.genes for s in suggestions] == [{}]
        searcher.update([*searcher.completed, ended(searcher.problem, number, {}, suggestions[0].state)])


@every_searcher
def test_genes_with_one_value(name: str) -> None:
    lora = AdapterChoice(kind="lora", fields={"rank": Choice.of([0, 4]), "alpha": Choice.of([8.0]),
                                              "scaling": Choice(choices=("rslora",))})  # fmt: skip
    adapters = {"lora": lora, "norm": AdapterChoice(kind="norm")}
    space = SearchSpace(backbone=SMALL, adapters=adapters, one_of=[OneOf(name="type", members=("lora",))])
    problem = problem_of(space)
    searcher = SEARCHERS[name](problem, 0)
    trials: list[Trial] = []
    for number in range(16):
        searcher.update(trials)
        for suggestion in searcher.suggest():
            assert space.contains(suggestion.genes)
            trials.append(ended(problem, number, suggestion.genes, suggestion.state))
    assert {t.genes["lora.rank.on"] for t in trials} == {True, False}


@pytest.mark.slow
def test_suggestions_do_not_depend_on_the_process() -> None:
    """Hashes of strings differ between processes, and so may the order of sets."""
    code = (
        "import json\n"
        "from tests.searchers.test_searchers import ROWS, SEARCHERS, exact, problem_of, run\n"
        "print(json.dumps({name: exact(run(SEARCHERS[name](problem_of(row.space()), 1), row.num_trials - 4))"
        " for name, row in ROWS.items()}))\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    found = []
    for seed in ("1", "2"):
        done = subprocess.run([sys.executable, "-c", code], cwd=root, env=os.environ | {"PYTHONHASHSEED": seed},
                              capture_output=True, text=True, timeout=300)  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]


@settings(max_examples=25, deadline=None)
@given(spaces(), st.sampled_from(sorted(ROWS.keys() - {"grid"})), st.integers(0, 99))
def test_any_space_can_be_searched(space: SearchSpace, name: str, seed: int) -> None:
    problem = problem_of(space, num_trials=16)
    trials = [ended(problem, number, space.sample(Random(number))) for number in range(12)]
    searcher = SEARCHERS[name](problem, seed)
    searcher.update(trials)
    for suggestion in searcher.suggest(2):
        assert space.contains(suggestion.genes)
        assert space.contains(space.from_unit(space.encode(suggestion.genes)[0]))
        assert exact([suggestion]) == [json.dumps(space.from_unit(space.encode(suggestion.genes)[0]))]


# Each on its own


def test_the_sequence_covers_conditional_genes_evenly() -> None:
    """Of 64 points, a gate has 32 on each side, and the gene behind it has each of its four values eight times."""
    fields = {"rank": Choice.of([1, 2, 4, 8])}
    lora = AdapterChoice(kind="lora", placement="model", fields=fields)
    space = SearchSpace(backbone=SMALL, adapters={"lora": lora})
    searcher = SEARCHERS["qmc"](problem_of(space), 5)
    points = [suggestion.genes for suggestion in searcher.suggest(64)]
    assert sum(point["lora.on"] is True for point in points) == 32
    ranks = [point.get("lora.rank") for point in points]
    assert [ranks.count(rank) for rank in (1, 2, 4, 8)] == [8, 8, 8, 8]


def test_the_grid_has_every_point_once() -> None:
    space = short_space()
    problem = problem_of(space)
    trials = run_out(SEARCHERS["grid"](problem, 0), count=7)
    rates = [RATE.from_unit(u) for u in (0, 0.25, 0.5, 0.75, 1)]
    assert len(trials) == len(set(exact(trials))) == 2**3 * (1 + 2 * 2) * len(rates)
    assert {t.genes["training.learning_rate"] for t in trials} == set(rates)
    assert set(exact(trials)) == set(exact(run_out(SEARCHERS["grid"](problem, 1), count=200)))
    assert len({t.candidate.key for t in trials}) == len(trials)


def run_out(searcher: Searcher, count: int) -> list[Trial]:
    trials: list[Trial] = []
    while True:
        searcher.update(trials)
        suggestions = searcher.suggest(count)
        if not suggestions:
            return trials
        trials += [ended(searcher.problem, len(trials) + i, s.genes) for i, s in enumerate(suggestions)]


@pytest.mark.parametrize(
    ("domain", "values"),
    [
        (Choice(choices=("a", "b")), ["a", "b"]),
        (Int(low=0, high=8, step=2), [0, 2, 4, 6, 8]),
        (Int(low=1, high=100), [1, 26, 51, 75, 100]),
        (Int(low=1, high=16, log=True), [1, 2, 4, 8, 16]),
        (Float(low=0, high=1), [0, 0.25, 0.5, 0.75, 1]),
        (Float(low=1e-4, high=1, log=True), [1e-4, 1e-3, 1e-2, 1e-1, 1]),
    ],
)
def test_values_of_the_grid(domain: Domain, values: list[Any]) -> None:
    found = grid_values(domain)
    assert found == values
    assert all(domain.contains(value) for value in found)


def test_a_grid_that_is_too_large_is_refused() -> None:
    deep = encoder(num_layers=8, hidden_size=8, inner_size=8)
    lora = AdapterChoice(kind="lora", fields={"rank": RANKS}, vary={"rank": "site"})
    space = SearchSpace(backbone=deep, adapters={"lora": lora})
    assert len(space.genes) == 32
    with pytest.raises(ValueError, match=f"more than {LARGEST_GRID:,} points: use another searcher"):
        SEARCHERS["grid"](problem_of(space), 0)


def test_nsga2_evolves() -> None:
    problem = problem_of(mixed_space(), num_trials=36)
    trials = run(SEARCHERS["nsga2"](problem, 0), 48)
    generations = [generation for t in trials for generation in t.searcher_state.values()]
    assert generations == sorted(generations)
    assert [generations.count(g) for g in range(4)] == [12, 12, 12, 12]
    # A child's genes are its parents', but for a few mutations; those of the first generation are drawn.
    past = [{name: t.genes[name] for name in t.genes} for t in trials[:36]]
    inherited = [
        any(other.get(name) == value for other in past) for t in trials[36:] for name, value in t.genes.items()
    ]
    assert sum(inherited) / len(inherited) > 0.85


def test_nsga2_passes_on_conditional_genes() -> None:
    """A real number that only some trials have would be new in every trial, were it drawn each time."""
    alpha = Float(low=1.0, high=64.0, log=True)
    lora = AdapterChoice(kind="lora", fields={"rank": Choice.of([0, 2, 4, 8]), "alpha": alpha})
    space = SearchSpace(backbone=SMALL, adapters={"lora": lora}, training={"learning_rate": RATE})
    trials = run(SEARCHERS["nsga2"](problem_of(space, num_trials=36), 1), 48)
    children = [t.genes["lora.alpha"] for t in trials[36:] if "lora.alpha" in t.genes]
    parents = {t.genes.get("lora.alpha") for t in trials[:36]}
    assert len(children) >= 4
    assert sum(value in parents for value in children) / len(children) >= 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tpe", slow("nsga2")])
def test_infeasible_regions_are_left(name: str) -> None:
    """Ranks above 2 are beyond a limit: their share falls."""

    def end(problem: Problem, number: int, genes: Assignment, suggested: Any) -> Trial:
        ranks = [value for gene, value in genes.items() if ".rank.layers" in gene]
        if any(rank > 2 for rank in ranks):
            fields = {"state": "infeasible", "measurement": None, "violation": 1.0 * sum(r > 2 for r in ranks)}
            return ended(problem, number, genes, suggested, **fields)
        return ended(problem, number, genes, suggested)

    lora = AdapterChoice(kind="lora", fields={"rank": RANKS}, vary={"rank": "layer"})
    space = SearchSpace(backbone=SMALL, adapters={"lora": lora})
    shares = []
    for seed in range(4):
        trials = run(SEARCHERS[name](problem_of(space, num_trials=64), seed), 64, end)
        shares.append([sum(t.state == "infeasible" for t in part) / 16 for part in (trials[:16], trials[48:])])
    first, last = (sum(column) / len(column) for column in zip(*shares, strict=True))
    assert last < 0.6 * first


# Better than random


def deep_space() -> SearchSpace:
    lora = AdapterChoice(kind="lora", at=("attn.q", "attn.v", "mlp.up"), fields={"rank": RANKS},
                         vary={"rank": "layer"})  # fmt: skip
    return SearchSpace(backbone=SMALL, adapters={"lora": lora}, training={"learning_rate": RATE})


def plausible(problem: Problem, number: int, genes: Assignment, suggested: Any) -> Trial:
    """The upper layers matter more, ranks have diminishing returns, and the learning rate has an optimum."""
    ranks = {layer: genes.get(f"lora.rank.layers.{layer}", 0) for layer in range(3)}
    gain = sum((layer + 1) / 6 * (1 - 0.6 ** float(rank)) for layer, rank in ranks.items())
    rate = problem.space.encode(genes)[0][-1]
    accuracy = 0.5 + 0.4 * gain * max(0.0, 1 - 4 * (rate - 0.6) ** 2)
    values = {"accuracy": accuracy, "num_params": problem.space.decode(genes).architecture.num_params(SMALL)}
    return ended(problem, number, genes, suggested, measurement=Measurement(values=values))


def hypervolume(trials: Sequence[Trial]) -> float:
    """Of accuracy above 0.5 and of the logarithm of the parameters below those of the largest network."""
    most = 3 * 8 * (32 + 32 + 40)
    area, best = 0.0, 0.5

    def steps() -> Iterator[tuple[float, float]]:
        for trial in trials:
            assert trial.measurement is not None
            values = trial.measurement.values
            yield values["num_params"] / most, values["accuracy"]

    for cost, accuracy in sorted(steps()):
        if accuracy > best:
            area += (1 - cost) * (accuracy - best)
            best = accuracy
    return area


def front_of(searcher: Searcher, num_trials: int) -> float:
    """Hypervolume after so many evaluations; as in a study, a network that was measured already costs nothing."""
    trials: list[Trial] = []
    while len({t.candidate.key for t in trials}) < num_trials:
        trials = run(searcher, len(trials) + 1, plausible, trials)
    return hypervolume(trials)


@pytest.mark.slow
def test_model_based_search_and_evolution_beat_random_search() -> None:
    found = {}
    for name in ("random", "tpe", "nsga2"):
        searchers = [SEARCHERS[name](problem_of(deep_space(), num_trials=72), seed) for seed in range(8)]
        found[name] = median(front_of(searcher, 72) for searcher in searchers)
    assert found["tpe"] > found["random"]
    assert found["nsga2"] > found["random"]


# Optuna's side


@settings(max_examples=50, deadline=None)
@given(spaces(), st.integers(0, 99))
def test_values_survive_optuna(space: SearchSpace, seed: int) -> None:
    domains = {gene.name: gene.domain for gene in space.genes}
    for name, value in space.sample(Random(seed)).items():
        assert from_optuna(domains[name], to_optuna(domains[name], value)) == value
