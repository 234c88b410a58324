"""A study over experts: from the file to a mixture, what it is compared with, and what its routers did."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autopeft.search_space import Architecture
from autopeft.search_space.adapters import Bottleneck, Ia3, Lora, Mixture
from autopeft.search_space.controls import CONTROLS, controls
from autopeft.studies.cli.app import main
from autopeft.studies.exporters.native import load
from autopeft.studies.routing import verdicts
from autopeft.studies.snapshot import Snapshot
from autopeft.studies.study_file import StudyFileError, load_study
from autopeft.studies.tracked import trial_metrics

from .spaces import SMALL
from .test_study import facts, run
from .tiny_study import save_study

torch.set_num_threads(1)

LORA = {
    "at": ["attn.q", "attn.v"],
    "rank": [1, 2],
    "experts": [0, 2, 4],
    "top_k": [1, 2],
    "router": ["token", "sigmoid", "sequence"],
    "vary": {"experts": "layer"},
}


def mixture_study(folder: Path, **changes) -> Path:
    own = {"space": {"adapters": {"lora": LORA}}, "baselines": {"names": ["head"], "learning_rates": [1e-2]}}
    return save_study(folder, **{**own, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Snapshot]:
    path = mixture_study(tmp_path_factory.mktemp("experts") / "study")
    return path, run(load_study(path))


def test_every_finalist_with_mixtures_is_compared(finished: tuple[Path, Snapshot]) -> None:
    _, snapshot = finished
    mixed = {
        trial.of
        for trial in snapshot.trials
        if trial.role == "finalist" and any(isinstance(spec, Mixture) for _, spec in trial.candidate.architecture)
    }
    assert mixed, "no mixture came to the front: take another seed for this test"
    found = {verdict.trial: verdict for verdict in verdicts(snapshot)}
    assert found.keys() == mixed
    for verdict in found.values():
        assert [one.control for one in verdict.against] == list(CONTROLS)
        by_name = {one.control: one for one in verdict.against}
        assert by_name["average"].num_params <= verdict.num_params
        assert by_name["active"].num_params <= verdict.active_params
        assert by_name["active"].num_params <= by_name["total"].num_params <= verdict.num_params
        assert verdict.averaged is not None
        assert verdict.busiest
        assert all(0.0 < share <= 1.0 for share in verdict.busiest.values())
        for one in verdict.against:
            assert one.difference.low <= one.difference.value <= one.difference.high
            assert one.difference.num_seeds == 2


def test_controls_are_not_on_the_front(finished: tuple[Path, Snapshot]) -> None:
    _, snapshot = finished
    own = {trial.number for trial in snapshot.trials if trial.role.startswith("control:")}
    assert own
    assert not own & {row.trial for row in snapshot.rows()}


def test_what_is_printed_and_written(finished: tuple[Path, Snapshot], capsys: pytest.CaptureFixture[str]) -> None:
    path, snapshot = finished
    with pytest.raises(SystemExit) as exit_:
        main(["pareto", str(path)])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "mixtures against what they are compared with" in out
    assert "than average" in out
    assert "busiest expert" in out
    assert json.dumps([verdict.to_dict() for verdict in verdicts(snapshot)])


def test_a_study_that_is_resumed_has_the_same_trials(finished: tuple[Path, Snapshot], tmp_path: Path) -> None:
    _, whole = finished
    path = mixture_study(tmp_path / "parts")
    run(load_study(path, ["search.trials=3"]))
    parts = run(load_study(path), resume=True)
    searched = [facts(list(snapshot.search_trials)) for snapshot in (whole, parts)]
    assert [fact[2:] for fact in searched[0]][:3] == [fact[2:] for fact in searched[1]][:3]
    assert {fact[2] for fact in searched[0]} == {fact[2] for fact in searched[1]}


def test_controls_can_be_left_out(tmp_path: Path) -> None:
    snapshot = run(load_study(mixture_study(tmp_path / "study", finalists={"seeds": 1, "most": 1, "controls": False})))
    assert not verdicts(snapshot)


def test_a_mixture_is_exported_and_loads(finished: tuple[Path, Snapshot], tmp_path: Path) -> None:
    path, snapshot = finished
    number = verdicts(snapshot)[0].trial
    with pytest.raises(SystemExit) as exit_:
        main(["export", str(path), "--pick", f"trial:{number}", "--to", "native", "--out", str(tmp_path / "out")])
    assert exit_.value.code == 0
    model, attachment = load(tmp_path / "out")
    assert attachment.mixtures
    ids = torch.tensor([[2, 5, 9, 3]])
    with torch.no_grad():
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.isfinite(logits).all()


def test_a_format_that_has_no_mixtures_says_so(
    finished: tuple[Path, Snapshot], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, snapshot = finished
    number = verdicts(snapshot)[0].trial
    with pytest.raises(SystemExit) as exit_:
        main(["export", str(path), "--pick", f"trial:{number}", "--to", "peft", "--out", str(tmp_path / "out")])
    assert exit_.value.code != 0
    assert "mixture" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"router": "dice"}, "router must be one of"),
        ({"experts": [0]}, "0 is the only size"),
        ({"router": "task"}, "tasks"),
        ({"experts": "four"}, "must be a whole number"),
    ],
)
def test_bad_mixtures_in_a_study_file(tmp_path: Path, change, problem: str) -> None:
    path = mixture_study(tmp_path / "study", space={"adapters": {"lora": {**LORA, **change}}})
    with pytest.raises((StudyFileError, ValueError), match=problem):
        load_study(path).space_for(SMALL)


# Controls


def test_controls_have_the_parameters_that_they_claim() -> None:
    lora = Mixture(expert=Lora(rank=4), experts=6, top_k=2, shared_experts=1)
    other = Bottleneck(size=3)
    architecture = Architecture.of({"layers.0.attn.q": [lora], "layers.0.mlp": [other]})
    site = SMALL.site("layers.0.attn.q")
    found = controls(architecture, SMALL)
    assert list(found) == list(CONTROLS)
    plain = {name: dict(a.adapters)["layers.0.attn.q"][0] for name, a in found.items()}
    assert plain["average"] == replace(lora, router="uniform").canonical()
    for name, budget in (("active", lora.active_params(site)), ("total", lora.num_params(site))):
        spec = plain[name]
        assert isinstance(spec, Lora)
        assert spec.num_params(site) <= budget < replace(spec, rank=spec.rank + 1).num_params(site)
    assert plain["active"].size is not None and plain["active"].size >= 3 * 4
    assert all(dict(a.adapters)["layers.0.mlp"] == (other,) for a in found.values())


def test_what_has_no_size_has_its_average_alone() -> None:
    ia3 = Mixture(expert=Ia3(), experts=3)
    assert list(controls(Architecture.of({"layers.0.attn.v": [ia3]}), SMALL)) == ["average"]
    assert controls(Architecture.of({"layers.0.attn.v": [Ia3()]}), SMALL) == {}


def test_what_the_routers_did_is_tracked(finished: tuple[Path, Snapshot]) -> None:
    _, snapshot = finished
    mixed = [t for t in snapshot.trials if t.measurement is not None and t.measurement.routes]
    assert mixed
    for trial in mixed:
        metrics = {metric.key: metric.value for metric in trial_metrics(trial, snapshot, 0)}
        assert 0.0 < metrics["routing/busiest_expert_share"] <= 1.0
        assert 0.0 <= metrics["routing/entropy"] <= 1.0
        assert metrics["routing/experts_per_token"] in (1.0, 2.0)
    plain = next(t for t in snapshot.trials if t.role == "baseline:head" and t.measurement is not None)
    assert not any(metric.key.startswith("routing/") for metric in trial_metrics(plain, snapshot, 0))
