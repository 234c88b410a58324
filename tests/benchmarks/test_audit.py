"""Rankings and their audit: the statistics, and the command over a small table of real trainings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from autopeft.benchmarks import proxy_audit
from autopeft.benchmarks.race.table import TableRow
from autopeft.evaluators.proxies import PROXIES
from autopeft.search_space import AdapterChoice, Candidate, Choice, Float, SearchSpace
from autopeft.search_space.problem import Measurement
from autopeft.searchers.scored.policies import POLICIES
from autopeft.searchers.scored.ranking import rank_correlation, strata
from autopeft.studies.config.loading import load_study
from autopeft.studies.engine.proxy_scores import score_key
from autopeft.testing.spaces import SMALL

from ..support.tiny_study import save_study
from .race.test_race import run  # noqa: F401  (a fixture)

FINITE = st.floats(-10, 10, allow_nan=False)


@given(st.lists(FINITE, min_size=4, max_size=30, unique=True))
def test_a_perfect_score(losses: list[float]) -> None:
    found = rank_correlation(losses, losses)
    assert found.tau == pytest.approx(1.0)
    assert found.top_tau == pytest.approx(1.0)
    assert set(found.regret.values()) == {0.0}
    low, high = found.tau_interval
    assert -1.0 <= low <= high <= 1.0


@given(st.lists(FINITE, min_size=4, max_size=30, unique=True))
def test_a_reversed_score(losses: list[float]) -> None:
    found = rank_correlation([-loss for loss in losses], losses)
    assert found.tau == pytest.approx(-1.0)
    assert found.regret[1] == pytest.approx(max(losses) - min(losses))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=20))
def test_tau_is_scipys(pairs: list[tuple[int, int]]) -> None:
    scores, losses = zip(*pairs, strict=True)
    expected = kendalltau(scores, losses).statistic
    assert rank_correlation(scores, losses).tau == pytest.approx(0.0 if np.isnan(expected) else expected)


def test_candidates_without_a_score_come_last() -> None:
    found = rank_correlation([1.0, 2.0, np.nan, 3.0], [1.0, 2.0, 0.5, 3.0])
    assert found.regret == {1: 0.5, 3: 0.5}
    assert found.tau == pytest.approx(0.0)


def test_a_constant_score_ranks_nothing() -> None:
    assert rank_correlation([1.0] * 5, range(5)).tau == 0.0


def test_the_interval_narrows_with_the_number_of_candidates() -> None:
    rng = np.random.default_rng(0)

    def width(n: int) -> float:
        losses = rng.normal(size=n)
        low, high = rank_correlation(losses + rng.normal(size=n), losses).tau_interval
        return high - low

    assert width(200) < 0.5 * width(20)


def test_strata_take_one_of_each_group() -> None:
    scores = [*range(20), np.nan]
    chosen = strata(scores, 5, np.random.default_rng(0))
    assert [place // 4 for place in chosen] == [0, 1, 2, 3, 4]
    assert strata([], 5, np.random.default_rng(0)) == []


# Against a table

SPACE = SearchSpace(
    backbone=SMALL,
    adapters={"lora": AdapterChoice(kind="lora", fields={"rank": Choice.of([1, 2, 4, 8])}, vary={"rank": "layer"})},
    training={"learning_rate": Float(low=1e-4, high=1e-1, log=True)},
)


def made_up(count: int, seeds: int, rate_matters: float) -> list[TableRow]:
    """Losses that fall with the first rank and, on request, with the learning rate; noise between seeds."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        genes = {gene.name: gene.domain.from_unit(rng.random()) for gene in SPACE.genes}
        candidate = SPACE.decode(genes)
        own = [value for name, value in genes.items() if "rank" in name]
        for seed in range(seeds):
            loss = -np.log(own[0]) - rate_matters * np.log(genes["training.learning_rate"]) + 0.05 * rng.normal()
            values = {"loss": float(loss), "accuracy": float(-loss)}
            rows.append(
                TableRow(
                    candidate=candidate.key,
                    seed=seed,
                    genes=genes,
                    measurement=Measurement(values=values, std_err={"loss": 0.1, "accuracy": 0.1}),
                )
            )
    return rows


def arm_scores(rows: list[TableRow], score: Any, **fields: Any) -> proxy_audit.ArmScores:
    architectures = {SPACE.decode(row.genes).architecture.key: score(row.genes) for row in rows}
    fields = {"prepare_s": 1.0, "score_s": 2.0, "reference_s": 10.0} | fields
    fields = {"arm": "snip", "settings": "", "epochs": 0.0, "seed": 0} | fields
    return proxy_audit.ArmScores(**fields, scores=architectures)


def first_rank(genes: Any) -> float:
    return -float(genes["lora.rank.layers.0"])


def test_what_the_learning_rate_explains_does_not_count() -> None:
    rows = made_up(60, 3, rate_matters=1.0)
    found = proxy_audit.references(rows, SPACE.decode)
    assert [reference.seeds for reference in found] == [3] * len(found)
    raw = rank_correlation([first_rank(row.genes) for row in rows[::3]], [r.values["loss"] for r in found])
    loss = next(
        report for report in proxy_audit.reports([arm_scores(rows, first_rank)], rows, found) if report.metric == "loss"
    )
    (line,) = loss.lines
    assert line.tau > raw.tau + 0.2
    assert loss.ceiling is not None
    assert loss.ceiling.tau > 0.8


def test_regret_and_cost() -> None:
    rows = made_up(40, 2, rate_matters=0.0)
    found = proxy_audit.references(rows, SPACE.decode)
    good, bad = arm_scores(rows, first_rank), arm_scores(rows, lambda genes: -first_rank(genes), arm="grad_norm")
    loss = next(report for report in proxy_audit.reports([good, bad], rows, found) if report.metric == "loss")
    by_arm = {line.arm: line for line in loss.lines}
    assert by_arm["snip"].regret[3] < 3
    assert by_arm["grad_norm"].regret[1] > 10
    scored = len(good.scores)
    assert by_arm["snip"].cost_share == pytest.approx((1.0 + 2.0 * len(found) / scored) / (10.0 * len(found)))


def test_every_proxy_and_policy_is_an_arm() -> None:
    assert {*PROXIES, *POLICIES, "gates"} <= proxy_audit.ARMS.keys()


@pytest.mark.slow
def test_the_command(run: Any, tmp_path: Path) -> None:  # noqa: F811
    study = save_study(
        tmp_path / "study",
        space={"adapters": {"lora": {"rank": [0, 1, 2, 4], "vary": {"rank": "layer"}}}},
        training={"learning_rate": {"low": 1.0e-3, "high": 1.0e-1, "log": True}, "epochs": 1, "batch_size": 8},
    )
    table, results = tmp_path / "table.csv", tmp_path / "proxies.jsonl"
    assert run("tabulate", study, "--output", table, "--candidates", 6, "--repeated", 4)[0] == 0
    asked = ("audit", "num_params", "snip", "sandwich", "gates", "--study", study, "--table", table)
    asked = (*asked, "--results", results, "--seeds", 2, "--epochs", 1)
    code, out, err = run(*asked)
    assert code == 0, err
    assert "**accuracy**, 4 candidates" in out
    assert "| sandwich, 1 epochs |" in out
    assert "another training" in out
    assert len(results.read_text().splitlines()) == 8
    before = results.read_bytes()
    code, out, _ = run(*asked, "--json")
    assert code == 0
    assert results.read_bytes() == before
    assert [line["seeds"] for line in json.loads(out)[0]["lines"]] == [2] * 4
    code, out, _ = run(*asked, "--json", "--set", "data.max_length=8", "--seeds", 1)
    assert code == 0
    assert [line["seeds"] for line in json.loads(out)[0]["lines"]] == [1] * 4, "asked of other data"
    assert len(results.read_text().splitlines()) == 12
    code, _, err = run("audit", "snipp")
    assert code == 2
    assert "unknown arm 'snipp'; did you mean 'snip'?" in err


def test_a_candidate_is_its_architecture_and_its_training() -> None:
    rows = made_up(5, 1, rate_matters=0.0)
    assert all(isinstance(reference.candidate, Candidate) for reference in proxy_audit.references(rows, SPACE.decode))


def test_what_was_said_of_other_candidates_does_not_count(tmp_path: Path) -> None:
    settings = load_study(save_study(tmp_path))
    rows = made_up(8, 1, rate_matters=0.0)
    found = proxy_audit.references(rows, SPACE.decode)
    key = score_key(proxy_audit.settings_of(settings, "snip", 0.0, 0))
    good = arm_scores(rows, first_rank, settings=key)
    few, stale = arm_scores(rows[:4], first_rank, settings=key), arm_scores(rows, first_rank, settings="another")
    assert proxy_audit.matching([few, good, stale], settings, found) == [good]


def test_an_arm_that_cannot_have_scores_leaves_the_others_theirs(run: Any, tmp_path: Path) -> None:  # noqa: F811
    study = save_study(
        tmp_path / "study",
        space={"adapters": {"prefix": {"kind": "prefix", "length": [1, 2], "vary": {"length": "layer"}}}},
        training={"learning_rate": 1.0e-2, "epochs": 1, "batch_size": 8},
    )
    table = tmp_path / "table.csv"
    assert run("tabulate", study, "--output", table, "--candidates", 4, "--repeated", 0)[0] == 0
    words = ("audit", "gates", "num_params", "--study", study, "--table", table, "--seeds", 1, "--json")
    code, out, err = run(*words, "--results", tmp_path / "proxies.jsonl")
    assert code == 0, err
    assert "gates has no scores: " in err
    assert [line["arm"] for line in json.loads(out)[0]["lines"]] == ["num_params"]
