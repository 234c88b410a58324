"""Searchers against each other: fronts are what they claim, races repeat themselves, reports claim no more."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import pytest

from autopeft.benchmarks import __main__ as cli
from autopeft.benchmarks.race import clock, collect, models, races, report, surrogate, synthetic, table
from autopeft.benchmarks.race.base import RaceProblem, best_sums, pareto
from autopeft.benchmarks.race.problems import BY_DEFAULT, PROBLEMS
from autopeft.benchmarks.race.races import ARMS, Race, RaceResult
from autopeft.search_space.dominance import non_dominated
from autopeft.search_space.problem import Measurement, declared_costs
from autopeft.searchers import Searcher, Suggestion
from autopeft.searchers.optuna_samplers import Random as RandomSearcher
from autopeft.studies.analysis.pareto import hypervolume, scaled

from ...support.slow import mostly_slow, slow
from ...support.tiny_study import save_study

RATE = "training.learning_rate"

# Fronts

SHRUNKEN: dict[str, Callable[[], RaceProblem]] = {
    "per-layer": lambda: synthetic.per_layer(attn=(0.5, 0.2), mlp=(0.0, 0.3)),
    "types": lambda: synthetic.types(num_layers=2, stage_shares=(0.4, 0.6)),
    "autopeft": lambda: synthetic.autopeft(layer_shares=(-0.1, 0.3, 0.8), hidden_size=16),
    "three": lambda: synthetic.three(num_layers=2, stage_shares=(0.4, 0.6)),
}


def at_the_best_rate(problem: RaceProblem, genes: dict[str, Any]) -> dict[str, float]:
    """The logarithm of the gain is a parabola in that of the rate, with curvature 1: two values give its top."""
    x = [math.log(rate) for rate in (1e-3, 4e-3)]
    gains = [problem.values({**genes, RATE: math.exp(at)})["accuracy"] - synthetic.HEAD for at in x]
    if min(gains) <= 0:
        return dict(problem.values({**genes, RATE: 1e-3}))
    top = (x[0] + x[1]) / 2 + math.log(gains[1] / gains[0]) / (x[1] - x[0])
    assert synthetic.RATES.low <= math.exp(top) <= synthetic.RATES.high
    return dict(problem.values({**genes, RATE: math.exp(top)}))


@pytest.mark.parametrize("name", mostly_slow(SHRUNKEN, "types", "autopeft"))
def test_fronts_are_those_of_all_candidates(name: str) -> None:
    problem = SHRUNKEN[name]()
    space = problem.problem.space
    candidates = [genes for genes in surrogate.settings(space) if space.decode(genes).architecture]
    values = [at_the_best_rate(problem, genes) for genes in candidates]
    found = pareto([problem.losses(point) for point in values])
    np.testing.assert_allclose(rounded(found), rounded(problem.front))
    assert problem.shares(values)[-1] == pytest.approx(1.0, abs=1e-9)


def rounded(front: np.ndarray) -> np.ndarray:
    """Gains that differ in the last bits are equal: the cheapest of them stays."""
    return pareto(np.round(front, 9))


def test_every_problem_is_shrunken_somewhere() -> None:
    assert set(BY_DEFAULT) == {"table", *SHRUNKEN}
    assert set(BY_DEFAULT) < PROBLEMS.keys()


@pytest.mark.parametrize("name", SHRUNKEN)
def test_the_front_is_worth_all_and_random_points_less(name: str) -> None:
    problem = PROBLEMS[name]()
    space, objectives = problem.problem.space, problem.problem.objectives
    front = [{o.name: o.value(loss) for o, loss in zip(objectives, row, strict=True)} for row in problem.front]
    Random(0).shuffle(front)
    shares = problem.shares(front)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    drawn = problem.shares([problem.values(space.sample(Random(seed))) for seed in range(200)])
    assert drawn == sorted(drawn)
    assert 0.1 < drawn[-1] < 0.95
    assert problem.reference.shape == (len(objectives),)
    front_scaled = scaled(problem.front, objectives)
    assert (front_scaled < problem.reference).all()
    assert problem.best == hypervolume(front_scaled, problem.reference)
    # Realistic: the head alone and the best of all, see README.md.
    assert {0.45 <= point["accuracy"] <= 0.6201 for point in front} == {True}


def test_pareto_and_best_sums() -> None:
    rng = np.random.default_rng(0)
    for columns in (1, 2, 3):
        points = rng.integers(6, size=(60, columns)).astype(float)
        np.testing.assert_array_equal(pareto(points), np.unique(points[non_dominated(points)], axis=0))
    tables = [rng.integers(9, size=(4, 2)).astype(float) for _ in range(4)]
    every = [a + b + c + d for a in tables[0] for b in tables[1] for c in tables[2] for d in tables[3]]
    np.testing.assert_array_equal(best_sums(tables), pareto(every))


def test_key_follows_what_is_measured() -> None:
    same, other = synthetic.per_layer(attn=(0.5, 0.2), mlp=(0.0, 0.3)), synthetic.per_layer((0.4, 0.2), (0.0, 0.3))
    assert SHRUNKEN["per-layer"]().key == same.key != other.key


# Noise


def test_noise_follows_from_seed_and_number_alone() -> None:
    problem = SHRUNKEN["types"]()
    genes = problem.problem.space.sample(Random(0))
    truth = problem.values(genes)
    found = [problem.measurement(truth, 3, number) for number in range(400)]
    assert found == [problem.measurement(truth, 3, number) for number in range(400)]
    assert problem.measurement(truth, 4, 0) != found[0]
    errors = [m.values["accuracy"] - truth["accuracy"] for m in found]
    assert abs(fmean(errors)) < 0.002
    assert pstdev(errors) == pytest.approx(synthetic.STD_ERR, rel=0.15)
    assert {m.values["num_params"] for m in found} == {truth["num_params"]}
    assert found[0].std_err == {"accuracy": synthetic.STD_ERR}
    other = problem.measurement({**truth, "accuracy": 0.0}, 3, 7)
    assert other.values["accuracy"] == pytest.approx(errors[7])


# Races


class Spy(RandomSearcher):
    """Random search that records the trials that it was given."""

    seen: list[tuple[int, int, dict[int, float]]]

    def update(self, completed: Any, pending: Any = ()) -> None:
        super().update(completed, pending)
        assert [t.number for t in completed] == sorted(t.number for t in completed)
        assert all(t.measurement is None and t.state == "running" for t in pending)
        known = {t.number: t.measurement.values["accuracy"] for t in completed if t.measurement}
        self.seen.append((len(completed), len(pending), known))


class Stubborn(Searcher):
    """The empty candidate, then two candidates over and over."""

    name = "stubborn"
    summary = ""

    def suggest(self, count: int = 1) -> list[Suggestion]:
        space = self.problem.space
        points = [space.smallest(), space.largest(), space.from_unit([0.5] * len(space.genes))]
        return [Suggestion(genes=points[0 if self.num_suggested == 0 else 1 + self.num_suggested % 2])]


def race(searcher: str = "random", problem: str = "per-layer", seed: int = 0, trials: int = 10, batch: int = 4) -> Race:
    return Race(problem=problem, searcher=searcher, seed=seed, trials=trials, batch=batch)


def test_a_race_asks_as_a_study_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of four, filled one by one; measurements are noisy."""
    monkeypatch.setitem(ARMS, "spy", Spy)
    monkeypatch.setattr(Spy, "seen", [], raising=False)
    problem = SHRUNKEN["types"]()
    ended = races.run(race("spy"), problem)
    assert [(done, waiting) for done, waiting, _ in Spy.seen] == [
        *((0, i) for i in range(4)), *((4, i) for i in range(4)), *((8, i) for i in range(2)),
    ]  # fmt: skip
    running = races.RunningRace(race("random"), problem)
    while batch := running.fill():
        running.measure(batch)
    truth = [values["accuracy"] for values in running.truth]
    measured = [Spy.seen[-1][2][number] for number in range(8)]
    assert not set(measured) & set(truth)
    assert max(abs(a - b) for a, b in zip(measured, truth, strict=False)) < 6 * synthetic.STD_ERR
    assert ended.curve == races.run(race("random"), problem).curve
    assert len(ended.curve) == len(ended.own_s) == 10


def test_what_needs_no_evaluation_costs_none_and_ends_a_race_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARMS, "stubborn", Stubborn)
    ended = races.run(race("stubborn"), SHRUNKEN["per-layer"]())
    assert len(ended.curve) == 2
    # The first batch has both, and copies up to the cap; the second has nothing but copies.
    assert len(ended.own_s) == 3 + 2 * races.MOST_REJECTIONS


@pytest.mark.parametrize("name", ["random", "nsga2", slow("gpsampler")])
def test_races_repeat_themselves(name: str) -> None:
    problem = SHRUNKEN["types"]()
    trials = 13 if name == "gpsampler" else 24
    first, again = (races.run(race(name, trials=trials), problem) for _ in range(2))
    assert first.curve == again.curve
    assert len(first.curve) == trials
    assert RaceResult.from_dict(json.loads(json.dumps(first.to_dict()))) == first
    assert races.run(race(name, trials=trials, seed=1), problem).curve != first.curve


def test_races_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "races.jsonl"
    planned = races.planned(["types"], ["random", "qmc"], seeds=2, trials=6, batch=4)
    assert [(r.seed, r.searcher) for r in planned] == [(0, "random"), (0, "qmc"), (1, "random"), (1, "qmc")]
    races.run_all(planned[:2], path, workers=1)
    # Killed while it wrote the third.
    with path.open("a") as file:
        file.write('{"problem": "ty')
    assert races.missing(planned, races.read(path)) == planned[2:]
    races.run_all(planned[2:], path, workers=1)
    known = races.read(path)
    assert [entry.race for entry in known] == planned
    assert not races.missing(planned, known)
    whole = tmp_path / "whole.jsonl"
    races.run_all(planned, whole, workers=1)
    assert [e.curve for e in races.read(whole)] == [e.curve for e in known]
    # A problem that is another one now is run anew.
    assert races.missing(planned, [replace(entry, problem_key="old") for entry in known]) == planned


def test_the_goal_decides_the_score() -> None:
    """Every point of the front is evaluated, the dearest first: the score is 1 with the cheapest one as good."""
    problem = SHRUNKEN["types"]()
    quality, cost = problem.front[:, 0], problem.front[:, 1]
    names = [objective.name for objective in problem.problem.objectives]
    as_good = quality <= quality.min() + 0.01
    points = [
        {name: o.value(loss) for name, o, loss in zip(names, problem.problem.objectives, row, strict=True)}
        for row in problem.front[np.argsort(-cost)]
    ]
    scores = problem.savings([{**points[-1]}, *points])
    assert scores[0] == 0, "the cheapest of the front is not as good"
    assert scores == sorted(scores)
    assert scores[-1] == 1
    assert scores.index(1) == as_good.sum()
    aimed = races.run(replace(race("bo", trials=12), goal="cheapest_as_good"), problem)
    assert all(0 <= score <= 1 for score in aimed.curve)
    assert races.planned(["types"], ["bo"], 1, 12, 4, "cheapest_as_good")[0].goal == "cheapest_as_good"


# The report


def made_up(
    searcher: str, middle: float, seeds: int = 12, trials: int = 200, problem: str = "types"
) -> list[RaceResult]:
    """Curves that end near `middle`."""
    found = []
    for seed in range(seeds):
        last = middle + 0.02 * Random(f"{searcher}/{seed}").uniform(-1, 1)
        curve = tuple(last * (1 - 0.5 ** (1 + 8 * i / trials)) for i in range(trials))
        found.append(
            RaceResult(race=race(searcher, problem, seed, trials), problem_key="", curve=curve, own_s=(0.1, 0.3))
        )
    return found


def tables_of(*groups: list[RaceResult]) -> list[report.RaceTable]:
    curves = report.curves_of([entry for group in groups for entry in group])
    return [report.table_of(problem, "made up", found) for problem, found in curves.items()]


def test_a_clear_lead() -> None:
    (found,) = tables_of(made_up("nsga2", 0.7), made_up("tpe", 0.9), made_up("random", 0.5))
    assert [line.searcher for line in found.lines] == ["random", "tpe", "nsga2"]
    lead = found.leads[200]
    assert (lead.best, lead.second) == ("tpe", "nsga2")
    assert lead.is_clear
    assert lead.difference.low is not None
    assert 0.1 < lead.difference.low < lead.difference.value < 0.3
    reaches = {line.searcher: line.reaches for line in found.lines}
    assert reaches["random"] is None
    assert reaches["nsga2"] == 200
    assert 20 < (reaches["tpe"] or 0) < 100
    assert found.lines[0].own_s == pytest.approx(0.2)
    assert found.lines[0].seeds == 12
    text = report.to_markdown([found], batch=4)
    assert "After 200 evaluations tpe is ahead of nsga2" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| tpe"))
    assert row.count("**") == 8
    share = found.lines[1].shares[200]
    assert share.low is not None
    assert share.high is not None
    assert share.low < share.value < share.high


def test_no_claim_without_an_interval() -> None:
    (close,) = tables_of(made_up("nsga2", 0.7), made_up("tpe", 0.701))
    assert not close.leads[200].is_clear
    assert "cannot be told apart" in report.to_markdown([close], batch=4)
    (few,) = tables_of(made_up("nsga2", 0.7, seeds=5), made_up("tpe", 0.9, seeds=5))
    assert not few.leads[200].is_clear
    assert "no claim" in report.to_markdown([few], batch=4)
    (alone,) = tables_of(made_up("random", 0.5))
    assert alone.lines[0].reaches is None
    assert "nothing to compare" in report.to_markdown([alone], batch=4)


def test_shorter_and_exhausted_races() -> None:
    short = made_up("gpsampler", 0.9, trials=50)
    ran_out = [replace(entry, curve=entry.curve[:60]) for entry in made_up("qmc", 0.6)]
    (found,) = tables_of(made_up("nsga2", 0.7), short, ran_out)
    lines = {line.searcher: line for line in found.lines}
    assert lines["gpsampler"].shares.keys() == {25, 50}
    assert lines["qmc"].shares[200] == lines["qmc"].shares[100]
    assert found.leads[200].second == "qmc"
    assert found.leads[50].best == "gpsampler (50 trials)"
    assert "| gpsampler (50 trials) |" in report.to_markdown([found], batch=4)


def test_picture(tmp_path: Path) -> None:
    ended = [
        e for n in (4, 12) for s in ("random", "nsga2") for e in made_up(s, 0.5, n, 30, "types" if n == 4 else "three")
    ]
    report.picture(report.curves_of(ended), tmp_path / "searchers.png")
    assert (tmp_path / "searchers.png").read_bytes().startswith(b"\x89PNG")


# The table


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of its space with made-up trainings: ranks help, in the upper layers more."""
    path = tmp_path_factory.mktemp("table") / "table.csv"
    space = surrogate.table_problem().space
    rng, rows = Random(1), []
    for number, (genes, candidate) in enumerate(islice(collect.draws(space, 0), 150)):
        sizes = [(int(name[-1]) + 1) * math.log2(1 + float(v)) for name, v in genes.items() if ".rank.stages" in name]
        far = math.log(float(genes[RATE]) / 8e-3) ** 2
        for seed in (0, 1, 2) if number < 20 else (0,):
            accuracy = 0.48 + 0.006 * sum(sizes) * math.exp(-far) + rng.gauss(0, 0.01)
            values = {"accuracy": accuracy, "loss": 1.0, **declared_costs(candidate.architecture, space.backbone)}
            rungs = tuple((share, {"loss": 1.0}) for share in table.RUNGS)
            measurement = Measurement(
                values=values, std_err={"accuracy": 0.017, "loss": 0.02}, losses=(2.0, 1.0), rungs=rungs
            )
            rows.append(table.TableRow(candidate=candidate.key, seed=seed, genes=genes, measurement=measurement))
    table.append(path, rows)
    return path


@pytest.fixture
def small_forest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surrogate, "TREES", 20)


@pytest.mark.slow
def test_the_table_is_learnt_and_finite(grown: Path, small_forest: None) -> None:
    problem = surrogate.tabulated(grown)
    space = problem.problem.space
    assert "190 trainings of 150 candidates" in problem.summary
    assert "Spearman 0." in problem.summary
    assert problem.std_err["accuracy"] == pytest.approx(0.01, rel=0.35)
    rng = Random(0)
    for _ in range(50):
        genes = space.sample(rng)
        assert problem.values(genes)["num_params"] == space.decode(genes).architecture.num_params(space.backbone)
    # No point of the space is beyond the front.
    drawn = [
        problem.values(genes) for genes in (space.sample(rng) for _ in range(400)) if space.decode(genes).architecture
    ]
    assert problem.shares(drawn)[-1] < 1
    every = scaled([*problem.front, *map(problem.losses, drawn)], problem.problem.objectives)
    assert hypervolume(every, problem.reference) == pytest.approx(problem.best)
    # Rates between two steps are as good as the nearer one.
    genes = space.largest()
    seen = {problem.values({**genes, RATE: 5e-3 * 3 ** (i / 100)})["accuracy"] for i in range(101)}
    assert 2 <= len(seen) <= surrogate.STEPS
    again = surrogate.tabulated(grown)
    assert again.key == problem.key
    assert again.values(genes) == problem.values(genes)


def test_noise_without_repeats_is_that_of_the_examples(grown: Path) -> None:
    rows = table.read(grown)
    assert surrogate.seed_sd([row for row in rows if row.seed == 0]) == pytest.approx(0.017)
    assert surrogate.seed_sd(rows) == pytest.approx(0.01, rel=0.35)


def test_too_few_rows(tmp_path: Path) -> None:
    with pytest.raises(
        surrogate.NoTableError, match=r"has 0 candidates, but a surrogate needs \d+: `python -m .* tabulate`"
    ):
        surrogate.tabulated(tmp_path / "none.csv")


# The commands


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exited:
            cli.main([str(argument) for argument in arguments])
        assert isinstance(exited.value.code, int)
        captured = capsys.readouterr()
        return exited.value.code, captured.out, captured.err

    return run


@pytest.mark.slow
def test_race_command(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    results, picture = tmp_path / "races.jsonl", tmp_path / "races.png"
    asked = ("race", "types", "--searchers", "random", "--seeds", 2, "--trials", 12, "--results", results)
    code, out, err = run(*asked, "--picture", picture)
    assert code == 0
    assert "### types" in out
    assert "| random |" in out
    assert "2 of 2 races" in err
    assert picture.exists()
    assert len(results.read_text().splitlines()) == 2
    before = results.read_bytes()
    code, out, err = run(*asked, "--json")
    assert code == 0
    assert results.read_bytes() == before
    assert "races" not in err
    (found,) = json.loads(out)["tables"]
    assert found["problem"] == "types"
    assert found["lines"][0]["seeds"] == 2
    code, out, _ = run(*asked[:3], "random,qmc", *asked[4:], "--workers", 2)
    assert code == 0
    assert "| qmc |" in out
    assert results.read_bytes().startswith(before)
    assert len(results.read_text().splitlines()) == 4


def test_the_clock_starts_after_different_candidates() -> None:
    problem = PROBLEMS["types"]()
    past = clock._history(problem, 30, seed=1)
    assert [t.number for t in past] == list(range(30))
    assert past == clock._history(problem, 30, seed=1)
    assert len({t.candidate.key for t in past}) == 30
    assert all(t.candidate.architecture for t in past)


@pytest.mark.slow
def test_forecasts(run: Callable[..., tuple[int, str, str]]) -> None:
    asked = ("race", "types", "--outlook", "--seeds", "1", "--trials", "24", "--batch", "4")
    code, out, _ = run(*asked, "--json")
    found = json.loads(out)
    assert code == 0
    assert [one["trials"] for one in found] == list(range(24 - 4 * (len(found) - 1), 25, 4)), "before each later batch"
    assert len(found) >= 2
    assert all(0 <= one["chance"] <= 1 and isinstance(one["held"], bool) for one in found)
    code, out, _ = run(*asked)
    assert out.startswith("| chance | forecasts | mean chance | held (95 %) |")


@pytest.mark.parametrize(
    ("option", "head", "row", "num_rows"),
    [
        ("--clock", "| searcher | trials | s |\n|---|---:|---:|\n", "| `random` | 20 | ", 1),
        slow("--surrogates", "| error | surprise |\n|---:|---|---:|---:|---:|---:|\n", "| 20 | sparse | ", 2),
    ],
)
def test_what_is_measured_instead_of_a_race(
    run: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    head: str,
    row: str,
    num_rows: int,
) -> None:
    monkeypatch.setattr(clock, "REPEATS", 1)
    monkeypatch.setattr(models, "REPEATS", 1)
    asked = ("race", "types", "three", "--searchers", "random", option, "20")
    code, out, err = run(*asked)
    assert code == 0
    assert "types" in err
    assert out.count(head) == out.count(row) == 2
    code, out, _ = run(*asked, "--json")
    assert code == 0
    assert {name: len(rows) for name, rows in json.loads(out).items()} == dict.fromkeys(("types", "three"), num_rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("race", "tipes"), "unknown problem 'tipes'; did you mean 'types'?"),
        (("race", "types", "--searchers", "random,tpee"), "unknown searcher 'tpee'; did you mean 'tpe'?"),
        (("race", "types", "--searchers", ","), "name at least one searcher"),
        (("race", "per-layer", "--searchers", "grid"), "grid on per-layer: the grid has more than"),
    ],
)
def test_bad_names(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = run(*arguments, "--results", tmp_path / "none.jsonl")
    assert code == 2
    assert not out
    assert message in err
    assert not (tmp_path / "none.jsonl").exists()


def test_a_results_file_that_cannot_be_written(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    asked = ("race", "types", "--searchers", "random", "--seeds", 1, "--trials", 1)
    code, _, err = run(*asked, "--results", tmp_path / "no" / "races.jsonl")
    assert code == 4
    assert "no/races.jsonl: No such file or directory" in err


def test_tabulate_command(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    study, path = save_study(tmp_path), tmp_path / "tiny.csv"
    asked = ("tabulate", study, "--output", path, "--repeated", 1)
    code, out, err = run(*asked, "--candidates", 2)
    assert code == 0
    assert "tiny.csv: 4 rows" in out
    assert "4 trainings" in err
    before = path.read_bytes()
    code, out, _ = run(*asked, "--candidates", 3)
    assert code == 0
    assert "tiny.csv: 5 rows" in out
    assert path.read_bytes().startswith(before)
    with path.open(newline="") as file:
        assert {line["seed"] for line in csv.DictReader(file)} == {"0", "1", "2"}
    code, _, err = run(*asked, "--seed", 1)
    assert code == 2
    assert "made with other inputs" in err
