"""What a study knows beforehand: configurations to start with, and the trials of an earlier study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autopeft.search_space import AdapterChoice, Choice, Float, OneOf, SearchSpace, SpaceError
from autopeft.searchers import SEARCHERS
from autopeft.studies.config.fingerprint import fingerprint
from autopeft.studies.config.loading import load_study
from autopeft.studies.config.problem import problem_for
from autopeft.studies.config.source import StudyFileError
from autopeft.studies.config.starting import assignment_of
from autopeft.studies.engine.check import check
from autopeft.studies.engine.scheduled_trials import observed
from autopeft.studies.engine.session import open_ledger, open_study, prior_trials
from autopeft.testing.spaces import SMALL

from ...support.slow import mostly_slow, slow
from ...support.tiny_study import save_study
from .test_study import Quiet, facts, run

RANKS = Choice.of([0, 2, 4])
RATE = Float(low=1e-4, high=1e-2, log=True)


def lora(**fields: Any) -> AdapterChoice:
    place = {key: fields.pop(key) for key in ("at", "placement", "vary") if key in fields}
    return AdapterChoice(kind="lora", fields=fields, **place)


# From values to genes


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    """Two adapters that can be off, one by its size and one by its places, and a group of which one is always on."""
    return SearchSpace(
        backbone=SMALL,
        adapters={
            "attn": lora(at=("attn.q", "attn.v"), rank=RANKS, alpha=16.0, vary={"rank": "layer"}),
            "prefix": AdapterChoice(kind="prefix", placement="layer", fields={"length": Choice.of([1, 5, 9])}),
            "serial": AdapterChoice(kind="bottleneck", at=("mlp",), fields={"size": Choice.of([4, 8])}),
            "mlp": lora(at=("mlp.up",), rank=RANKS),
        },
        one_of=[OneOf(name="type", members=("serial", "mlp"), per="layer")],
        layer_gate=True,
        training={"learning_rate": RATE, "epochs": 2.0},
    )


def shape(space: SearchSpace, given: dict[str, Any]) -> dict[str, list[str]]:
    """Kinds and sizes by site, for short."""
    architecture = space.decode(assignment_of(space, given)).architecture
    return {site: [f"{spec.kind} {spec.size}" for spec in specs] for site, specs in architecture.adapters}


LAYERS = range(3)


def test_a_size_counts_in_every_scope_and_what_is_not_named_is_off(space: SearchSpace) -> None:
    found = shape(space, {"attn.rank": 4})
    assert found == {f"layers.{i}.attn.{role}": ["lora 4"] for i in LAYERS for role in "qv"}
    point = assignment_of(space, {"attn.rank": 4, "type": "mlp", "training.learning_rate": 0.01})
    assert space.contains(point)
    assert point["training.learning_rate"] == 0.01
    assert point["layers.2.on"] is True
    assert point["prefix.on.layers.0"] is False
    assert assignment_of(space, {"attn.rank": 4})["training.learning_rate"] == RATE.from_unit(0.5)


def test_the_longer_key_wins(space: SearchSpace) -> None:
    given = {"attn.rank": 4, "attn.rank.layers.1": 0, "attn.rank.layers.2": 2, "layers.0": False}
    assert shape(space, given) == {f"layers.2.attn.{role}": ["lora 2"] for role in "qv"}
    each = {f"attn.rank.layers.{i}": 2 for i in LAYERS}
    assert shape(space, {"attn.rank": 4, **each}) == shape(space, {"attn.rank": 2})


def test_a_scope_that_is_named_is_the_only_one(space: SearchSpace) -> None:
    only = shape(space, {"attn.rank.layers.1": 4, "prefix.on.layers.2": True})
    assert only.keys() == {"layers.1.attn.q", "layers.1.attn.v", "layers.2.attn"}
    assert only["layers.2.attn"] == ["prefix 5"], "the middle of what is not given"
    but_one = shape(space, {"prefix.length": 9, "prefix.on.layers.2": False})
    assert but_one == {f"layers.{i}.attn": ["prefix 9"] for i in (0, 1)}


def test_the_member_of_a_group_that_is_named_is_taken(space: SearchSpace) -> None:
    assert shape(space, {"mlp.rank": 2}) == {f"layers.{i}.mlp.up": ["lora 2"] for i in LAYERS}
    assert shape(space, {"attn.rank": 2, "mlp.rank": 0}) == shape(space, {"attn.rank": 2}), "the one that can be off"
    assert shape(space, {"type": "mlp"}) == shape(space, {"mlp.rank": 4}), "the middle of what is not given"
    mixed = shape(space, {"type": "serial", "type.layers.1": "mlp", "mlp.rank": 4, "serial.size": 4})
    assert mixed == {f"layers.{i}.mlp": ["bottleneck 4"] for i in (0, 2)} | {"layers.1.mlp.up": ["lora 4"]}


@pytest.mark.parametrize(
    ("given", "key", "problem"),
    [
        ({"atn.rank": 4}, "atn.rank", "unknown gene or setting; did you mean 'attn.rank'?"),
        ({"attn.r": 4}, "attn.r", "unknown gene or setting; did you mean 'attn.rank'?"),
        ({"attn.rank.layer.1": 4}, "attn.rank.layer.1", "did you mean 'attn.rank.layers.1'?"),
        ({"attn.dropout": 0.1}, "attn.dropout", "unknown gene or setting"),
        ({"attn.rank": 3}, "attn.rank", "3 is not in this space; use one of 0, 2, 4"),
        ({"attn.rank": True}, "attn.rank", "True is not in this space"),
        ({"serial.size": 0}, "serial.size", "0 is not in this space; use one of 4, 8"),
        ({"training.learning_rate": 1.0}, "training.learning_rate", "1.0 is not in this space; use 0.0001 to 0.01"),
        ({"attn.rank": 2, "attn.alpha": 8}, "attn.alpha", "has the fixed value 16.0 in this space, got 8"),
        ({"training.epochs": 3}, "training.epochs", "has the fixed value 2.0 in this space, got 3"),
        ({"type": "prefix"}, "type", "'prefix' is not in this space; use one of serial, mlp"),
        ({"type": "mlp", "serial.size": 8}, "serial.size", "has no effect: its adapter is off in this entry"),
    ],
)
def test_what_is_wrong_with_a_value(space: SearchSpace, given: dict[str, Any], key: str, problem: str) -> None:
    with pytest.raises(SpaceError) as caught:
        assignment_of(space, given)
    ((path, what),) = caught.value.problems
    assert path == (key,)
    assert problem in what


def test_fixed_values_may_be_repeated(space: SearchSpace) -> None:
    assert assignment_of(space, {"attn.rank": 4, "attn.alpha": 16}) == assignment_of(space, {"attn.rank": 4})


# In a study

START = ["lora-r8-qv", {"lora.rank": 8, "lora.rank.layers.0": 0, "training.learning_rate": 2e-2}]
SPACE = {"adapters": {"lora": {"at": ["attn.q", "attn.v"], "rank": [0, 1, 2, 8], "vary": {"rank": "layer"}}}}
SHORT: dict[str, Any] = {
    "space": SPACE,
    "training": {"learning_rate": {"low": 1e-3, "high": 1e-1, "log": True}, "epochs": 1, "batch_size": 8},
    "baselines": {"names": ["head"], "learning_rates": [1e-2]},
    "finalists": {"seeds": 1, "most": 1},
}


def search(**changes: Any) -> dict[str, Any]:
    return SHORT | {"search": {"searcher": "tpe", "trials": 5, "batch": 2, "start": START} | changes}


@pytest.mark.parametrize("searcher", mostly_slow(SEARCHERS, "tpe", "bo"))
def test_the_search_begins_with_them(searcher: str, tmp_path: Path) -> None:
    snapshot = run(load_study(save_study(tmp_path, **search(searcher=searcher, trials=4))))
    first, second = [trial for trial in snapshot.search_trials if trial.state == "complete"][:2]
    assert [(t.number, t.searcher_state) for t in (first, second)] == [(1, {}), (2, {})]
    assert {spec.size for _, spec in first.candidate.architecture} == {8}
    assert first.candidate.training["learning_rate"] == pytest.approx(1e-2)
    assert {site.split(".")[1] for site, _ in second.candidate.architecture} == {"1", "2"}
    assert second.candidate.training["learning_rate"] == 2e-2
    assert len([t for t in snapshot.search_trials if t.state == "complete"]) == 4


@pytest.mark.slow
def test_a_study_that_was_interrupted_goes_on_behind_them(tmp_path: Path) -> None:
    changes = search(batch=1)
    whole = run(load_study(save_study(tmp_path / "whole", **changes)))
    settings = load_study(save_study(tmp_path / "stopped", **changes))
    for resume, stop_after in ((False, 1), (True, 1), (True, 1)):
        with pytest.raises(KeyboardInterrupt):
            run(settings, resume=resume, watcher=Quiet(stop_after))
    assert facts(list(run(settings, resume=True).trials)) == facts(list(whole.trials))


def test_one_that_stands_twice_is_evaluated_once(tmp_path: Path) -> None:
    snapshot = run(load_study(save_study(tmp_path, **search(start=[START[0], START[0]], trials=2))))
    assert [t.role.kind for t in snapshot.trials][1:4] == ["search", "copy", "search"]


@pytest.mark.parametrize(("limit", "known"), [(10_000, 1), slow(1_000, 0)])
def test_baselines_that_the_search_could_have_asked_for_are_known_to_it(limit: int, known: int, tmp_path: Path) -> None:
    rates = {"names": ["head", "lora-r8-qv", "ia3"], "learning_rates": [1e-2, 1.0]}  # one of them is in the space
    changes = {"search": {"searcher": "random", "trials": 1, "batch": 1}, "constraints": {"num_params": limit}}
    settings = load_study(save_study(tmp_path, **{**SHORT, **changes, "baselines": rates}))
    run(settings)
    with open_study(settings, check(settings)[0], resume=True) as study:
        found = list(observed(study.plan, study.problem, study.trials.values()))
        told = [(str(trial.role), trial.candidate.training["learning_rate"]) for trial in found]
        assert told == [("baseline:lora-r8-qv", 1e-2)] * known
        assert all(study.problem.space.decode(t.genes).key == t.candidate.key for t in found)


def problems(path: Path) -> list[str]:
    with pytest.raises(StudyFileError) as caught:
        check(load_study(path))
    return [line.replace(f"{path.parent}/", "") for line in caught.value.problems]


def test_problems_have_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    start = [{"lora.rnak": 8}, "houlsby", {"lora.rank": 9, "trainin.epochs": 1}, "head", {"lora.rank": 0}]
    save_study(tmp_path, **search(start=start, trials=6), constraints={"num_params": 3000})
    text = path.read_text().splitlines()

    def line(words: str) -> int:
        return next(i for i, text in enumerate(text, 1) if words in text)

    found = problems(path)
    assert [text.split(" ")[0] for text in found] == [
        f"study.yaml:{line(words)}" for words in ("rnak", "houlsby", "rank: 9", "trainin.", "- head", "rank: 0")
    ]
    assert "search.start.0.lora.rnak: unknown gene or setting; did you mean 'lora.rank'?" in found[0]
    assert "search.start.1: the space does not contain the architecture of the baseline 'houlsby'" in found[1]
    assert "search.start.2.trainin.epochs" in found[3]
    assert "no adapter is on" in found[4]
    assert "no adapter" in found[5]


def test_limits_and_numbers_are_checked_too(tmp_path: Path) -> None:
    path = save_study(tmp_path, **search(), constraints={"num_params": 400})
    (first, _) = problems(path)
    assert first.endswith("search.start.0: num_params 1,536 is above the limit 400")
    with pytest.raises(StudyFileError) as caught:
        load_study(path, ["search.initial=6", "search.start=[ia33, 3, head]", "search.trials=2"])
    assert {text.split(": ", 1)[1] for text in caught.value.problems} == {
        "search.start.1: must be a text",
        "must not be above search.trials, which is 2",
    }
    with pytest.raises(StudyFileError, match="unknown baseline 'ia33'; did you mean 'ia3'"):
        load_study(path, ["search.start=[ia33]"])
    with pytest.raises(StudyFileError, match=r"has more entries than search\.trials, which is 1"):
        load_study(path, ["search.trials=1"])


def test_they_reach_the_problem_and_the_fingerprint(tmp_path: Path) -> None:
    path = save_study(tmp_path, **search(initial=3), constraints={"num_params": 5000})
    settings = load_study(path)
    problem = problem_for(settings, check(settings)[1])
    assert (problem.initial, len(problem.start), dict(problem.limits.maxima)) == (3, 2, {"num_params": 5000})
    assert fingerprint(settings)["search"].keys() >= {"initial", "start"}
    plain = load_study(path, ["search.initial=null", "search.start=[]"])
    assert not fingerprint(plain)["search"].keys() & {"initial", "start", "prior"}, "older studies go on"


# An earlier study


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("earlier")
    run(load_study(save_study(folder / "old", **search(trials=4, start=[]))))
    return folder


def new_study(folder: Path, **changes: Any) -> Path:
    return save_study(folder / "new", **search(prior="../old", start=[], searcher="random", trials=2) | changes)


def test_trials_of_an_earlier_study_become_points_of_this_space(earlier: Path) -> None:
    wide = {"adapters": {"mine": {"kind": "lora", "at": ["attn.q", "attn.v", "mlp.up"], "rank": [0, 1, 2, 8],
                                  "vary": {"rank": "site"}}}}  # fmt: skip
    settings = load_study(new_study(earlier, space=wide))
    problem = problem_for(settings, check(settings)[1])
    trials = prior_trials(settings, problem)
    old = {t.number: t for t in open_ledger(load_study(earlier / "old")).trials()}
    assert {str(t.role) for t in trials} == {"baseline:head", "search"}
    assert len(trials) == 5
    for trial in trials:
        assert problem.space.contains(trial.genes)
        assert trial.candidate.architecture == old[trial.number].candidate.architecture
        assert trial.values["accuracy"] == old[trial.number].values["accuracy"]


def test_their_copy_stays_whatever_becomes_of_the_study(earlier: Path, tmp_path: Path) -> None:
    (earlier / "old").rename(tmp_path / "old")
    settings = load_study(new_study(tmp_path))
    splits, _, _ = check(settings)
    with open_study(settings, splits, resume=False) as study:
        first = study.problem.prior
    (tmp_path / "old").rename(earlier / "old")
    splits, _, _ = check(settings)
    with open_study(settings, splits, resume=True) as study:
        assert study.problem.prior == first
        assert len(first) == 5
        assert all(trial.measurement.std_err["accuracy"] > 0 for trial in first if trial.measurement)
        study.run(Quiet())
    changed = load_study(settings.path, ["search.prior=null"])
    with pytest.raises(Exception, match=r"search\.prior"), open_study(changed, splits, resume=True):
        pass


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (search(prior="../none", start=[]), "no such file"),
        (search(prior="../new", start=[]), "this study was never started"),
        (
            search(prior="../old", start=[]) | {"space": {"adapters": {"ia3": {"placement": "layer"}}},
                                                "training": {"learning_rate": [0.5, 0.6]}},
            "none of its 5 complete trials is in this space",
        ),
    ],
)  # fmt: skip
def test_an_earlier_study_that_is_of_no_use(earlier: Path, changes: dict[str, Any], problem: str) -> None:
    (found,) = problems(new_study(earlier, **changes))
    assert " search.prior: " in found
    assert problem in found
    assert not (earlier / "new" / "runs").exists(), "nothing is written for a file that is wrong"


def test_validate_counts_them(earlier: Path, capsys: pytest.CaptureFixture) -> None:
    from autopeft.studies.cli.app import main

    path = new_study(earlier)
    for option, expected in (([], "prior  5 trials of ../old are in this space"), (["--json"], '"earlier_trials": 5')):
        with pytest.raises(SystemExit):
            main(["validate", str(path), *option])
        assert expected in capsys.readouterr().out
    assert json.loads(json.dumps(fingerprint(load_study(path))))["search"]["prior"] == "../old"
