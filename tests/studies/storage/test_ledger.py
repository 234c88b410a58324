"""The ledger: what is written comes back, and what is wrong with a storage is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from autopeft.search_space import Backbone, Choice, Float, Measurement, Objective, Problem, SearchSpace, Site
from autopeft.search_space.declaration import AdapterChoice
from autopeft.search_space.problem import SEARCH, Role, Trial
from autopeft.studies.errors import ConfigurationError, UnusableEnvironmentError
from autopeft.studies.storage.ledger import Ledger, StudyRecord

OBJECTIVES = (Objective.of("accuracy"), Objective.of("num_params"))


def backbone() -> Backbone:
    sites = tuple(
        Site(
            name=f"layers.{i}.attn.q", layer=i, role="attn.q", module=f"l.{i}.q", input_module=f"l.{i}.q",
            in_features=8, out_features=8, bias=True,
        )
        for i in range(2)
    )  # fmt: skip
    return Backbone(
        id="toy", revision=None, family="toy", sites=sites, hidden_size=8, num_layers=2, num_params=128,
        head_modules=("classifier",), num_head_params=8, causal=False,
    )  # fmt: skip


@pytest.fixture
def problem() -> Problem:
    lora = AdapterChoice(kind="lora", at=("attn.q",), fields={"rank": Choice.of((0, 1, 4))}, vary={"rank": "layer"})
    training = {"learning_rate": Float(low=1e-4, high=1e-2, log=True)}
    space = SearchSpace(backbone=backbone(), adapters={"lora": lora}, training=training, stages=1)
    return Problem(space=space, objectives=OBJECTIVES, num_trials=4)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'ledger.db'}"


def record(**fingerprint: object) -> StudyRecord:
    return StudyRecord(
        objectives=OBJECTIVES,
        backbone=backbone(),
        labels=("a", "b"),
        settings="study: toy\n",
        fingerprint=fingerprint or {"seed": 0},
    )


def begin(ledger: Ledger, problem: Problem, **fields: object) -> Trial:
    genes = problem.space.largest()
    return ledger.begin(problem, SEARCH, problem.space.decode(genes), genes=genes, **fields)


MEASUREMENT = Measurement(
    values={"accuracy": 0.5, "num_params": 64.0},
    std_err={"accuracy": 0.1},
    seed=3,
    losses=(2.0, 1.5),
    rungs=((0.5, {"accuracy": 0.4}),),
    per_example={"accuracy": (1.0, 0.0)},
    test_per_example={"accuracy": (1.0,)},
    test={"accuracy": 1.0},
)


def test_trials_of_an_earlier_study_come_back(problem: Problem, url: str) -> None:
    genes = problem.space.largest()
    small = Measurement(values=MEASUREMENT.values, std_err=MEASUREMENT.std_err)
    trial = Trial(number=7, role=SEARCH, candidate=problem.space.decode(genes), genes=genes, state="complete",
                  measurement=small)  # fmt: skip
    whole = replace(trial, measurement=MEASUREMENT, searcher_state={"x": 1}, seed=3)
    Ledger.create(url, "toy", replace(record(), prior_trials=[whole]))
    assert Ledger.open(url, "toy").prior_trials == (trial,), "no more than a searcher reads"
    Ledger.create(url, "other", record())
    assert Ledger.open(url, "other").prior_trials == ()


def test_a_trial_comes_back_whole(problem: Problem, url: str) -> None:
    ledger = Ledger.create(url, "toy", record())
    trial = begin(ledger, problem, seed=3, searcher_state={"nsga2:generation": 1})
    ended = replace(trial, state="complete", measurement=MEASUREMENT, violation=-0.5)
    ledger.finish([ended], OBJECTIVES)
    again = Ledger.open(url, "toy", {"seed": 0})
    assert again.trials() == [ended]
    assert again.backbone == backbone()
    assert again.labels == ("a", "b")
    assert again.settings == "study: toy\n"
    assert again.study_id == ledger.study_id


def test_domains_are_kept_and_old_ledgers_have_none(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Ledger.create(url, "toy", replace(record(), domains=("2", "10")))
    assert Ledger.open(url, "toy").domains == ("2", "10")
    Ledger.create(url, "without", record())
    assert Ledger.open(url, "without").domains is None
    monkeypatch.setattr("autopeft.studies.storage.ledger.DOMAINS", "what no ledger has")
    assert Ledger.open(url, "toy").domains is None


def test_constant_scores_are_kept_and_old_ledgers_have_none(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Ledger.create(url, "toy", replace(record(), constant={"accuracy": 0.27}))
    assert Ledger.open(url, "toy").constant == {"accuracy": 0.27}
    Ledger.create(url, "without", record())
    assert Ledger.open(url, "without").constant == {}
    monkeypatch.setattr("autopeft.studies.storage.ledger.CONSTANT", "what no ledger has")
    assert Ledger.open(url, "toy").constant == {}


@pytest.mark.parametrize("state", ["failed", "infeasible"])
def test_an_ended_trial_without_values(state: str, problem: Problem, url: str) -> None:
    ledger = Ledger.create(url, "toy", record())
    ended = replace(begin(ledger, problem), state=state, error="why", violation=1.0)
    ledger.finish([ended], OBJECTIVES)
    ledger.finish([ended], OBJECTIVES)  # repeating does no harm
    assert Ledger.open(url, "toy").trials() == [ended]
    assert ledger.unfinished(OBJECTIVES) == []


def test_unfinished_trials_are_found_and_half_closed_ones_closed(problem: Problem, url: str) -> None:
    ledger = Ledger.create(url, "toy", record())
    running, written = begin(ledger, problem), begin(ledger, problem)
    # As a kill between the two steps of `finish` leaves it.
    ended = replace(written, state="complete", measurement=MEASUREMENT, violation=-1.0)
    tell, ledger._study.tell = ledger._study.tell, lambda *args, **kwargs: None
    ledger.finish([ended], OBJECTIVES)
    ledger._study.tell = tell
    again = Ledger.open(url, "toy")
    assert again.unfinished(OBJECTIVES) == [running]
    assert again.trials() == [running, ended]
    assert [t.state.name for t in again._study.trials] == ["RUNNING", "COMPLETE"]


def test_a_study_is_made_once(url: str) -> None:
    Ledger.create(url, "toy", record())
    with pytest.raises(ConfigurationError, match=r"already holds the study 'toy'.*resume"):
        Ledger.create(url, "toy", record())


def test_a_study_killed_while_it_was_made_is_made_anew(url: str) -> None:
    import optuna

    optuna.create_study(storage=url, study_name="toy", directions=["maximize", "minimize"])
    with pytest.raises(ConfigurationError, match="never started"):
        Ledger.open(url, "toy")
    assert Ledger.create(url, "toy", record()).trials() == []


def test_a_study_of_another_program_is_left_alone(problem: Problem, url: str) -> None:
    theirs = optuna.create_study(storage=url, study_name="toy")
    theirs.ask()
    with pytest.raises(ConfigurationError, match=r"'toy' that another program made: choose another name"):
        Ledger.create(url, "toy", record())
    assert len(optuna.load_study(storage=url, study_name="toy").trials) == 1


def test_the_time_and_the_trials_of_the_last_run_are_kept(url: str) -> None:
    ledger = Ledger.create(url, "toy", record())
    assert (ledger.planned, ledger.used_s) == (0, {}), "as in ledgers of earlier versions"
    ledger.planned, ledger.used_s = 12, {"search": 1.5}
    again = Ledger.open(url, "toy")
    assert (again.planned, again.used_s) == (12, {"search": 1.5})


def test_changed_settings_are_named(url: str) -> None:
    Ledger.create(url, "toy", record(seed=0, model={"id": "a"}))
    with pytest.raises(ConfigurationError) as error:
        Ledger.open(url, "toy", {"seed": 1, "model": {"id": "b"}})
    assert "seed: was 0, is 1" in str(error.value)
    assert 'model.id: was "a", is "b"' in str(error.value)


def test_another_study(url: str) -> None:
    Ledger.create(url, "toy", record())
    with pytest.raises(ConfigurationError, match=r"no study 'mine'.*'toy'"):
        Ledger.open(url, "mine")
    assert Ledger.names(url) == ["toy"]


def test_a_corrupt_ledger(tmp_path: Path, url: str) -> None:
    (tmp_path / "ledger.db").write_bytes(b"not a database, " * 100)
    with pytest.raises(UnusableEnvironmentError, match="cannot be used: file is not a database"):
        Ledger.open(url, "toy")


def test_a_storage_that_is_none() -> None:
    with pytest.raises(ConfigurationError, match="storage"):
        Ledger.names("nonsense")
    with pytest.raises(UnusableEnvironmentError, match="unable to open"):
        Ledger.names("sqlite:////no/such/folder/ledger.db")


@pytest.mark.parametrize("text", ["search", "copy", "finalist", "baseline:lora-r8-qv", "control:mean"])
def test_roles_are_written_as_before(text: str) -> None:
    assert str(Role.parse(text)) == text


@pytest.mark.parametrize("text", ["serch", "baseline", "baseline:", "search:x"])
def test_what_is_no_role(text: str) -> None:
    with pytest.raises(ValueError, match="role"):
        Role.parse(text)
