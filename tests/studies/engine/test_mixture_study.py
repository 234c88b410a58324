"""A study over experts: from the file to a mixture, what it is compared with, and what its routers did."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from peft import PeftModel
from ruamel.yaml import YAML
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from autopeft.search_space import Architecture
from autopeft.search_space.adapters import Bottleneck, Ia3, Lora, Mixture
from autopeft.search_space.spaces.controls import CONTROLS, controls
from autopeft.studies.analysis.mixture_verdicts import verdicts
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.analysis.statistics import SeedSpread
from autopeft.studies.cli.app import main
from autopeft.studies.config.loading import load_study
from autopeft.studies.config.problem import space_for
from autopeft.studies.config.source import StudyFileError
from autopeft.studies.engine.retraining import retrain
from autopeft.studies.errors import ConfigurationError
from autopeft.studies.exporters.native import load
from autopeft.studies.recipes.recipe import Recipe
from autopeft.studies.reports.report import write_report
from autopeft.studies.tracking.mlflow_payload import trial_metrics
from autopeft.testing.spaces import SMALL

from ...support.tiny_study import LABELS, save_study, write_rows
from .test_study import facts, run

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


@pytest.mark.slow
def test_the_spread_between_seeds_is_that_of_all_candidates(finished: tuple[Path, Snapshot]) -> None:
    _, snapshot = finished
    compared = [entry for own in snapshot.matched_baselines().values() for entry in own.values()]
    assert compared
    found = snapshot.spread()
    assert found is not None
    for number, by_name in snapshot.matched_baselines().items():
        own = {t.seed for t in snapshot.trials if t.of == number and t.role.kind == "finalist"}
        assert all({run.seed for run in entry.repeats} == own for entry in by_name.values())
    scores = [entry.scores(snapshot.quality) for entry in [*snapshot.entries(), *compared] if entry.repeats]
    expected = SeedSpread.of(scores)
    assert expected is not None
    assert found.weights == pytest.approx(expected.weights)
    assert found.variances == pytest.approx(expected.variances)


def test_every_finalist_with_mixtures_is_compared(finished: tuple[Path, Snapshot]) -> None:
    _, snapshot = finished
    mixed = {
        trial.of
        for trial in snapshot.trials
        if trial.role.kind == "finalist" and any(isinstance(spec, Mixture) for _, spec in trial.candidate.architecture)
    }
    assert mixed, "no mixture came to the front: take another seed for this test"
    found = {verdict.trial: verdict for verdict in verdicts(snapshot)}
    assert found.keys() == mixed
    for verdict in found.values():
        by_name = {one.control: one for one in verdict.against}
        assert set(by_name) <= set(CONTROLS)
        assert {"average", "total"} <= set(by_name)
        assert verdict.complete
        assert by_name["average"].num_params <= verdict.num_params
        assert by_name["total"].num_params <= verdict.num_params
        if "active" in by_name:
            assert by_name["active"].num_params <= verdict.active_params < verdict.num_params
        assert verdict.averaged is not None
        assert verdict.busiest
        assert all(0.0 < share <= 1.0 for share in verdict.busiest.values())
        for one in verdict.against:
            assert one.difference.low <= one.difference.value <= one.difference.high
            assert one.difference.num_seeds == 2


def test_controls_are_not_on_the_front(finished: tuple[Path, Snapshot]) -> None:
    _, snapshot = finished
    own = {trial.number for trial in snapshot.trials if trial.role.kind == "control"}
    assert own
    assert not own & {row.trial for row in snapshot.rows()}


def test_what_is_printed_and_written(
    finished: tuple[Path, Snapshot], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, snapshot = finished
    with pytest.raises(SystemExit) as exit_:
        main(["pareto", str(path)])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "mixtures against their matched baselines" in out
    assert "against average" in out
    assert "busiest expert" in out
    files = write_report(snapshot, tmp_path).files
    assert tmp_path / "routing.json" in files
    told = json.loads((tmp_path / "routing.json").read_text())
    assert [verdict["trial"] for verdict in told] == [verdict.trial for verdict in verdicts(snapshot)]
    page = (tmp_path / "front.html").read_text()
    assert "Mixtures against their matched baselines" in page
    assert f"trial {told[0]['trial']} against average" in page


@pytest.mark.slow
def test_a_study_that_is_resumed_has_the_same_trials(finished: tuple[Path, Snapshot], tmp_path: Path) -> None:
    _, whole = finished
    path = mixture_study(tmp_path / "parts")
    run(load_study(path, ["search.trials=3"]))
    parts = run(load_study(path), resume=True)
    searched = [facts(list(snapshot.search_trials)) for snapshot in (whole, parts)]
    assert [fact[2:] for fact in searched[0]][:3] == [fact[2:] for fact in searched[1]][:3]
    assert {fact[2] for fact in searched[0]} == {fact[2] for fact in searched[1]}


@pytest.mark.slow
def test_controls_can_be_left_out(tmp_path: Path) -> None:
    snapshot = run(load_study(mixture_study(tmp_path / "study", finalists={"seeds": 1, "most": 1, "controls": False})))
    assert not verdicts(snapshot)


def export(path: Path, number: int, to: str, out: Path, *options: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["export", str(path), "--pick", f"trial:{number}", "--to", to, "--out", str(out), *options])
    return int(exit_.value.code or 0)


def test_a_mixture_is_exported_and_loads(finished: tuple[Path, Snapshot], tmp_path: Path) -> None:
    path, snapshot = finished
    number = verdicts(snapshot)[0].trial
    assert export(path, number, "native", tmp_path / "out") == 0
    model, attachment = load(tmp_path / "out")
    assert attachment.routers
    ids = torch.tensor([[2, 5, 9, 3]])
    with torch.no_grad():
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.isfinite(logits).all()


def test_a_format_that_has_no_mixtures_names_the_price(
    finished: tuple[Path, Snapshot], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, snapshot = finished
    verdict = verdicts(snapshot)[0]
    measured = [run.measurement for run in snapshot.entry(verdict.trial).runs]
    alike, routed = fmean(m.averaged["accuracy"] for m in measured), fmean(m.values["accuracy"] for m in measured)
    assert routed - alike == pytest.approx(verdict.averaged), "the price is what `autopeft pareto` shows"

    for to in ("trl-script", "axolotl"):
        assert export(path, verdict.trial, to, tmp_path / to, "--allow-lossy") != 0
    for to in ("peft", "merged"):
        capsys.readouterr()
        assert export(path, verdict.trial, to, tmp_path / to) != 0
        message = capsys.readouterr().err
        assert "--allow-lossy" in message
        assert f"validation accuracy {alike:.4f} instead of {routed:.4f} (mean of 2 trainings)" in message
        assert not (tmp_path / to).exists()
        assert export(path, verdict.trial, to, tmp_path / to, "--allow-lossy") == 0
    assert Recipe.load(tmp_path / "peft" / "recipe.yaml").averaged["accuracy"].seeds == (1, 2)

    rows = [json.loads(line) for line in (path.parent / "validation.jsonl").read_text().splitlines()]
    targets = torch.tensor([sorted(LABELS).index(row["label"]) for row in rows])
    tokenizer = AutoTokenizer.from_pretrained(path.parent / "model")
    base = AutoModelForSequenceClassification.from_pretrained(path.parent / "model", num_labels=len(LABELS))
    for model in (
        PeftModel.from_pretrained(base, str(tmp_path / "peft")).eval(),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval(),
    ):
        with torch.inference_mode():
            logits = torch.cat([model(**tokenizer(row["text"], return_tensors="pt")).logits for row in rows])
        # The weights are those of the first of the trainings.
        assert (logits.argmax(-1) == targets).float().mean().item() == pytest.approx(measured[0].averaged["accuracy"])
        losses = torch.nn.functional.cross_entropy(logits, targets)
        assert losses.item() == pytest.approx(measured[0].averaged["loss"], abs=1e-4)


@pytest.mark.slow
def test_a_router_by_task_keeps_its_domains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the data to the ledger, the recipe and training again: what the router has learnt of them is by number."""
    by_task = {"at": ["attn.q"], "rank": 2, "experts": 3, "router": "task", "tasks": 2}
    path = mixture_study(
        tmp_path / "study",
        space={"adapters": {"lora": by_task}},
        search={"searcher": "random", "trials": 1},
        finalists={"seeds": 1, "most": 1, "controls": False},
    )
    settings = YAML().load(path)
    settings["data"]["domain"] = "source"
    YAML().dump(settings, path)

    def save_domains(*names: str) -> None:
        for split in ("train", "validation", "test"):
            file = path.parent / f"{split}.jsonl"
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            write_rows(file, [row | {"source": names[i % 2]} for i, row in enumerate(rows)])

    save_domains("mail", "news")
    snapshot = run(load_study(path))
    trial = next(trial for trial in snapshot.trials if trial.role.kind == "search")
    assert export(path, trial.number, "native", tmp_path / "out") == 0
    recipe = Recipe.load(tmp_path / "out" / "recipe.yaml")
    assert recipe.domains == ("mail", "news")

    model, attachment = load(tmp_path / "out")
    ids = torch.tensor([[2, 5, 9, 3]])
    found = []
    for name in recipe.domains:
        attachment.routers.tokens.domains = torch.tensor([recipe.domains.index(name)])
        with torch.no_grad():
            found.append(model(ids, attention_mask=torch.ones_like(ids)).logits)
    assert not torch.equal(*found)

    assert retrain(recipe, [1])[0].test.keys() == {"loss", "accuracy"}
    for names in (("news", "blogs"), ("mail", "mail")):  # "news" would have the other number
        save_domains(*names)
        with pytest.raises(
            ConfigurationError,
            match=r"the data does not fit the recipe: it has the domains .*, the recipe has \('mail', 'news'\)",
        ):
            retrain(recipe, [1])
        # Recipes from before domains and contents were kept.
        assert retrain(recipe.model_copy(update={"domains": None, "contents": None}), [1])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"router": "dice"}, "router must be one of"),
        ({"experts": [0]}, "0 is the only size"),
        ({"router": "task"}, "tasks"),
        ({"experts": "four"}, "must be a whole number"),
        ({"vary": {"rank": "expert"}, "router": ["token", "poly"], "tasks": 2}, "needs experts of equal rank"),
    ],
)
def test_bad_mixtures_in_a_study_file(tmp_path: Path, change, problem: str) -> None:
    path = mixture_study(tmp_path / "study", space={"adapters": {"lora": {**LORA, **change}}})
    with pytest.raises((StudyFileError, ValueError), match=problem):
        space_for(load_study(path), SMALL)


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
    assert plain["active"].size is not None
    assert plain["active"].size >= 3 * 4
    assert all(dict(a.adapters)["layers.0.mlp"] == (other,) for a in found.values())


def test_controls_of_given_experts_have_their_parameters_too() -> None:
    """Which are not trained, and at work all the same."""
    site = SMALL.site("layers.0.attn.q")
    for router in ("token", "arrow"):
        given = Mixture(expert=Lora(rank=3, alpha=3.0), experts=4, given=tuple("abcd"), router=router, top_k=1)
        found = controls(Architecture.of({site.name: [given]}), SMALL)
        plain = {name: dict(a.adapters)[site.name][0] for name, a in found.items()}
        assert given.num_params(site) < given.active_params(site) < given.total_params(site)
        assert given.total_params(site) == given.stored_bits(site) // 32
        for name, budget in (("active", given.active_params(site)), ("total", given.total_params(site))):
            spec = plain[name]
            assert isinstance(spec, Lora)
            assert spec.num_params(site) <= budget < replace(spec, rank=spec.rank + 1).num_params(site)


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
    plain = next(t for t in snapshot.trials if str(t.role) == "baseline:head" and t.measurement is not None)
    assert not any(metric.key.startswith("routing/") for metric in trial_metrics(plain, snapshot, 0))


def test_where_every_token_meets_all_experts_there_is_one_plain_control() -> None:
    everything = Mixture(expert=Lora(rank=2), experts=2, top_k=2)
    assert list(controls(Architecture.of({"layers.0.attn.q": [everything]}), SMALL)) == ["average", "total"]


@pytest.mark.parametrize(
    ("data", "tasks", "problem"),
    [
        ({}, 3, "needs the column with the domain of each row"),
        ({"domain": "label"}, 2, "must be 3, the number of domains"),
    ],
)
def test_routers_by_task_need_the_domains_of_the_data(tmp_path: Path, data, tasks: int, problem: str) -> None:
    path = mixture_study(
        tmp_path / "study", space={"adapters": {"lora": {**LORA, "router": ["token", "task"], "tasks": tasks}}}
    )
    changes = [f"data.{key}={value}" for key, value in data.items()]
    with pytest.raises(StudyFileError, match=problem):
        run(load_study(path, changes))


def test_a_study_with_a_router_by_task(tmp_path: Path) -> None:
    path = mixture_study(
        tmp_path / "study",
        space={"adapters": {"lora": {**LORA, "experts": [2, 3], "router": ["task", "poly"], "tasks": 3}}},
        finalists={"seeds": 1, "most": 1},
    )
    snapshot = run(load_study(path, ["data.domain=label"]))
    assert all(trial.state == "complete" for trial in snapshot.search_trials)


@pytest.mark.slow
def test_a_study_with_one_router_for_a_layer_or_none(tmp_path: Path) -> None:
    own = {
        **LORA,
        "experts": [2, 3],
        "router": ["token", "uniform"],
        "router_per": "layer",
        "vary": {"router": "layer"},
    }
    path = mixture_study(tmp_path / "study", space={"adapters": {"lora": own}}, finalists={"seeds": 1, "most": 1})
    snapshot = run(load_study(path))
    assert all(trial.state == "complete" for trial in snapshot.search_trials)
    routers = {spec.to_dict()["router"] for trial in snapshot.search_trials for _, spec in trial.candidate.architecture}
    assert routers == {"token", "follow", "uniform"}


@pytest.mark.slow
def test_a_study_with_a_rank_for_each_expert(tmp_path: Path) -> None:
    own = {**LORA, "experts": [0, 3], "shared_experts": 1, "rank": [1, 2, 4], "vary": {"rank": "expert"}}
    start = [{"lora.experts": 3, "lora.rank": 2, "lora.rank.experts.0": 4}]
    path = mixture_study(
        tmp_path / "study",
        space={"adapters": {"lora": own}},
        search={"searcher": "bo", "trials": 6, "batch": 2, "start": start},
        finalists={"seeds": 1, "most": 1},
    )
    snapshot = run(load_study(path))
    assert all(trial.state == "complete" for trial in snapshot.search_trials)
    first = snapshot.search_trials[0]
    assert all(spec.to_dict()["ranks"] == [4, 2, 2, 2] for _, spec in first.candidate.architecture)
    assert any(trial.role.kind == "finalist" for trial in snapshot.trials)
