"""Whole studies against each other: what their fronts are worth, and what may be said of it."""

import json
from math import exp
from pathlib import Path
from typing import Any

import pytest

from autopeft.benchmarks import __main__ as cli
from autopeft.benchmarks import contest, proxy_audit
from autopeft.benchmarks.race import table
from autopeft.search_space.problem import Objective
from autopeft.studies.analysis.medians import LEAST_SEEDS
from autopeft.studies.config.loading import load_study
from autopeft.studies.engine.check import check

OVERRIDES = ["objectives=[loss, num_params]"]
OBJECTIVES = (Objective(name="loss", maximise=False), Objective(name="num_params", maximise=False))


def ended(searcher: str, seed: int, *front: tuple[float, float], **fields: Any) -> contest.StudyOutcome:
    values = tuple({"loss": loss, "num_params": size} for loss, size in front)
    fields = {"settings": "", "allowed_s": None, "took_s": 10.0, "trials": 4} | fields
    return contest.StudyOutcome(searcher=searcher, seed=seed, front=values, **fields)


def test_volumes_are_shares_of_what_all_dominate_up_to_one_corner() -> None:
    found = contest.volumes([ended("a", 0, (1.0, 1.0)), ended("b", 0, (0.0, exp(10.0))), ended("c", 0)], OBJECTIVES)
    # Costs count by their logarithm. The corner is (1.1, 11): a has 0.1 x 11, b 1.1 x 1, and 0.1 x 1 is in both.
    assert found == pytest.approx({("a", 0): 1.1 / 2.1, ("b", 0): 1.1 / 2.1, ("c", 0): 0.0})


def test_a_declared_reference_is_the_corner() -> None:
    objectives = (
        Objective(name="loss", maximise=False, reference=2.0),
        Objective(name="num_params", maximise=False, reference=exp(20.0)),
    )
    found = contest.volumes([ended("a", 0, (1.0, exp(10.0))), ended("b", 0, (1.5, exp(15.0)))], objectives)
    assert found == pytest.approx({("a", 0): 1.0, ("b", 0): 0.25})


def test_leads_are_paired_and_few_seeds_give_no_interval() -> None:
    few = {("a", 0): 0.9, ("b", 0): 0.5, ("a", 1): 0.7, ("b", 1): 0.8, ("a", 2): 1.0}
    (lead,) = contest.leads(few, ["a", "b"])
    assert lead.by_seed == pytest.approx({0: 0.4, 1: -0.1})
    assert lead.median.value == pytest.approx(0.15)
    assert lead.median.low is None
    many = {(name, seed): 0.5 + 0.1 * (name == "a") for name in "ab" for seed in range(LEAST_SEEDS)}
    (lead,) = contest.leads(many, ["a", "b"])
    assert lead.median.low == pytest.approx(0.1)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "contest.jsonl"
    key = contest.study_key(load_study(table.STUDY, OVERRIDES))
    entries = [
        ended("random", 3, (0.5, 100), settings=key),
        ended("nsga2", 3, (0.4, 200), (0.6, 50), settings=key, allowed_s=20.0),
        ended("random", 3, (9.0, 9), settings="of another study"),
    ]
    for entry in entries:
        contest.append(path, entry)
    return path


def invoked(*words: object) -> int:
    with pytest.raises(SystemExit) as exited:
        cli.main(["contest", *map(str, words)])
    return int(exited.value.code or 0)


def test_what_is_in_the_file_is_reported_and_not_run_again(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = results.read_text(encoding="utf-8")
    words = ["--searchers", "random, nsga2", "--seeds", "3", "--results", results]
    words += ["--set", *OVERRIDES]
    assert invoked(*words) == 0
    assert "ahead on 1 of 1 seeds. Fewer than 6: no interval." in capsys.readouterr().out
    assert invoked(*words, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert {study["searcher"] for study in data["studies"]} == {"random", "nsga2"}
    assert results.read_text(encoding="utf-8") == before


@pytest.mark.parametrize("seeds", ["", "1,x", "-1", "1.5"])
def test_seeds_that_are_none(seeds: str, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoked("--seeds", seeds, "--results", results) == 2
    assert "must be whole numbers of at least 0" in capsys.readouterr().err


def test_the_shipped_results_are_those_of_the_shipped_study() -> None:
    """So that a reader who repeats the command of docs/proxies.md finds what it says there."""
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    entries = contest.read(results / "contest.jsonl")
    assert {entry.settings for entry in entries} == {contest.study_key(load_study(table.STUDY, ["finalists.seeds=2"]))}
    settings = load_study(table.STUDY)
    space = check(settings)[2]
    found = [each for each in proxy_audit.references(table.read(table.SHIPPED), space.decode) if each.seeds > 1]
    entries = proxy_audit.read(results / "proxies.jsonl")
    assert proxy_audit.matching(entries, settings, found) == entries
