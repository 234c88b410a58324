"""LoRAs that were trained elsewhere as the experts of a mixture: read as peft reads them, and never trained."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.backbones import load_backbone
from autopeft.evaluators.base import Request
from autopeft.evaluators.data.splits import Splits
from autopeft.evaluators.proxies import PROXIES
from autopeft.evaluators.training.activations import ActivationCache
from autopeft.evaluators.training.optimizer import PackedAdamW
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.evaluators.training.train import TrainEvaluator
from autopeft.search_space import Architecture
from autopeft.search_space.adapters import Lora, Mixture, spec_from_dict
from autopeft.search_space.adapters.given import CONFIG, GivenError, read, sites_of
from autopeft.search_space.architecture import Candidate
from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.problem import METRICS, Fidelity
from autopeft.search_space.routers.arrow import arrows
from autopeft.search_space.training import Training
from autopeft.studies.analysis.mixture_verdicts import verdicts
from autopeft.studies.cli.app import main
from autopeft.studies.config.loading import load_study
from autopeft.studies.config.problem import space_for
from autopeft.studies.config.source import StudyFileError
from autopeft.studies.exporters.native import load
from autopeft.testing.models import tiny, tokens

from ...evaluators.tasks.test_causal_lm import rows
from ...studies.engine.test_study import run
from ...support.slow import slow
from ...support.tiny_models import byte_tokenizer, save, seeded
from ...support.tiny_study import LABELS, save_study, write_rows

torch.set_num_threads(1)


def lora_in(folder: Path, model: nn.Module, seed: int, modules: list[str] | str, **settings: Any) -> Tensor:
    """A LoRA of `model` saved by peft, and what it makes of some tokens."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(**{"target_modules": modules, "init_lora_weights": False, **settings})
    adapted = get_peft_model(model, config).eval()  # type: ignore[arg-type]
    adapted.save_pretrained(str(folder))
    with torch.no_grad():
        logits = adapted(input_ids=tokens() % model.get_input_embeddings().num_embeddings).logits  # type: ignore[operator]
    adapted.unload()
    return logits


def mixture_of(folders: list[Path], **fields: Any) -> Mixture:
    rank = max(read(str(folder)).rank for folder in folders)
    return Mixture(
        expert=Lora(rank=rank, alpha=float(rank)), experts=len(folders), given=tuple(map(str, folders)), **fields
    )


def placed(backbone: Backbone, spec: Mixture, roles: tuple[str, ...]) -> Architecture:
    return Architecture.of({site.name: [spec] for site in backbone.sites if site.role in roles})


@pytest.mark.parametrize("router", ["arrow", "token", "sequence"])
@pytest.mark.parametrize(
    "settings",
    [
        {"r": 3, "lora_alpha": 5},
        {"r": 2, "lora_alpha": 5, "use_rslora": True},
        {"r": 2, "rank_pattern": {"layer.1.attention.self.value": 4}, "alpha_pattern": {"query": 9}},
    ],
)
def test_one_given_lora_is_what_peft_has(tmp_path: Path, router: str, settings: dict[str, Any]) -> None:
    model, backbone = tiny("bert")
    expected = lora_in(tmp_path / "a", model, 1, ["query", "value"], **settings)
    model, backbone = tiny("bert")
    spec = mixture_of([tmp_path / "a"], router=router, top_k=1)
    with Attachment(
        model, backbone, [placed(backbone, spec, ("attn.q", "attn.v"))], [0], pretrained_head=True
    ) as found:
        found.eval()
        torch.testing.assert_close(model(input_ids=tokens()).logits, expected)


def test_arrows_are_the_first_singular_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 4, 7, generator=generator), torch.randn(2, 3, 5, 4, generator=generator)
    b[1, 2] = 0.0
    found = arrows(a, b)
    for k in range(2):
        for e in range(3):
            if (k, e) == (1, 2):
                assert not found[k, e].any()
                continue
            _, _, right = torch.linalg.svd(b[k, e] @ a[k, e])
            torch.testing.assert_close(found[k, e].abs(), right[0].abs(), atol=1e-5, rtol=1e-4)


def test_arrow_sends_a_token_where_it_points(tmp_path: Path) -> None:
    model, backbone = tiny("bert")
    for name, seed, rank in (("a", 1, 2), ("b", 2, 3)):
        lora_in(tmp_path / name, model, seed, ["query"], r=rank, lora_alpha=4)
    model, backbone = tiny("bert")
    spec = mixture_of([tmp_path / "a", tmp_path / "b"], router="arrow", top_k=1)
    site = "layers.0.attn.q"
    with Attachment(model, backbone, [Architecture.of({site: [spec]})], [0]) as attachment:
        attachment.eval()
        seen: list[Tensor] = []
        bank = attachment.banks[0]
        model.get_submodule(bank.site.module).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        attachment.routers.watch()
        with torch.no_grad():
            model(input_ids=tokens(), attention_mask=torch.ones(3, 5))
        own = bank.of_slot(0)
        x = seen[0].flatten(0, 1)
        pointed = []
        for e in range(2):
            _, _, right = torch.linalg.svd(own["B"][e] @ own["A"][e])
            pointed.append((x @ right[0]).abs())
        share = torch.stack(pointed).argmax(0).bincount(minlength=2) / len(x)
        (routes,) = attachment.routers.routes(0).values()
        torch.testing.assert_close(torch.tensor(routes["load"]), share, atol=1e-3, rtol=0)


def test_given_experts_are_not_trained(tmp_path: Path) -> None:
    model, backbone = tiny("bert")
    for name in "ab":
        lora_in(tmp_path / name, model, ord(name), ["query", "value"], r=2)
    model, backbone = tiny("bert")
    spec = mixture_of([tmp_path / "a", tmp_path / "b"], router="token", top_k=2)
    site = backbone.site("layers.0.attn.q")
    assert spec.num_params(site) == 2 * site.in_features
    assert spec.stored_bits(site) == 32 * (2 * site.in_features + 2 * 2 * (site.in_features + site.out_features))
    architecture = placed(backbone, spec, ("attn.q", "attn.v"))
    with Attachment(model, backbone, [architecture, architecture], [0, 1]) as attachment:
        before = attachment.state(1)
        assert attachment.num_adapter_params() == 2 * architecture.num_params(backbone)
        optimizer = PackedAdamW(attachment, [Training(weight_decay=0.1)] * 2)
        logits = model(input_ids=tokens().repeat(2, 1)).logits
        attachment.routers.penalised(logits.square().view(2, -1).mean(1)).sum().backward()
        optimizer.step(1, torch.tensor([0.1, 0.1]))
        after = attachment.state(1)
    for name, value in before.items():
        moved = not torch.equal(value, after[name])
        assert moved == (name.endswith("/router") or name.startswith("head"))


def test_what_cannot_be_given(tmp_path: Path) -> None:
    model, backbone = tiny("bert")
    lora_in(tmp_path / "dora", model, 1, ["query"], r=2, use_dora=True)
    with pytest.raises(GivenError, match="use_dora"):
        read(str(tmp_path / "dora"))
    with pytest.raises(GivenError, match=f"nowhere/{CONFIG}: no such file"):
        read(str(tmp_path / "nowhere"))
    model, backbone = tiny("bert")
    lora_in(tmp_path / "lora", model, 1, ["query"], r=2)
    assert {site.role for site in sites_of([str(tmp_path / "lora")], backbone)} == {"attn.q"}
    for fields in ({"experts": 2}, {"shared_experts": 1, "experts": 1}):
        with pytest.raises(ValueError, match="one expert per folder"):
            Mixture(given=(str(tmp_path / "lora"),), **fields)
    assert not Mixture(router="arrow").fits(backbone.site("layers.0.attn.q"))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"lora_bias": True}, "lora_bias: True"),
        ({"bias": "all"}, "bias: all"),
        ({"bias": "lora_only"}, "bias: lora_only"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
        ({"modules_to_save": ["word_embeddings"]}, "no linear layer of this model: .*word_embeddings.weight"),
        ({"target_modules": ["query", "pooler.dense"]}, "no linear layer of this model: .*bert.pooler.dense"),
    ],
)
def test_what_an_expert_would_not_have_is_refused(tmp_path: Path, settings: dict[str, Any], problem: str) -> None:
    """And not left out of what the LoRA was."""
    model, backbone = tiny("bert")
    lora_in(tmp_path / "lora", model, 1, **{"modules": ["query"], "r": 2, **settings})
    with pytest.raises(GivenError, match=f"{tmp_path / 'lora'}: .*{problem}"):
        sites_of([str(tmp_path / "lora")], backbone)


def test_a_task_head_beside_a_lora_is_left_out(tmp_path: Path) -> None:
    model, backbone = tiny("bert")
    lora_in(tmp_path / "lora", model, 1, ["attention.output.dense"], r=2, modules_to_save=["classifier"])
    assert {site.role for site in sites_of([str(tmp_path / "lora")], backbone)} == {"attn.o"}


def test_a_spec_with_given_experts_is_read_as_it_was_written(tmp_path: Path) -> None:
    spec = Mixture(experts=2, given=("a", "b"))
    assert spec_from_dict(spec.to_dict()) == spec


def given_study(folder: Path, only: dict[str, Any] | None = None, **lora: Any) -> Path:
    """The tiny study between two LoRAs of its model. `only`: settings of peft for these."""
    from transformers import AutoModelForSequenceClassification

    path = save_study(
        folder,
        space={"adapters": {"lora": {"given": ["a", "b"], "router": ["arrow", "token"], "top_k": [1, 2], **lora}}},
        baselines={"names": ["head"], "learning_rates": [1e-2]},
        search={"searcher": "random", "trials": 4, "batch": 4},
    )
    for name in "ab":
        model = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=3)
        lora_in(folder / name, model, ord(name), ["query", "value"], **{"r": 2, **(only or {})})
    return path


@pytest.mark.slow
def test_a_study_between_given_loras(tmp_path: Path) -> None:
    path = given_study(tmp_path / "study")
    snapshot = run(load_study(path))
    found = [spec for t in snapshot.search_trials for _, spec in t.candidate.architecture]
    assert {spec.router for spec in found} == {"arrow", "token"}  # type: ignore[attr-defined]
    for trial in snapshot.search_trials:
        arrow = {spec.router for _, spec in trial.candidate.architecture} == {"arrow"}  # type: ignore[attr-defined]
        assert trial.state == "complete"
        assert (trial.values["num_params"] == 0) == arrow
        assert {snapshot.backbone.site(site).role for site, _ in trial.candidate.architecture} == {"attn.q", "attn.v"}


@pytest.mark.parametrize(
    ("own", "layers"), [({}, {1, 2}), ({"layers": [0, 1]}, {1}), ({"at": ["attn.q"], "placement": "layer"}, {1, 2})]
)
def test_mixtures_are_where_there_are_given_loras(tmp_path: Path, own: dict[str, Any], layers: set[int]) -> None:
    """Elsewhere a router between nothing would be trained, and the layers below could not be shared."""
    path = given_study(tmp_path / "study", only={"layers_to_transform": [1, 2]}, router=["token", "arrow"], **own)
    backbone = load_backbone(str(tmp_path / "study" / "model"), task="classification", labels=LABELS).backbone
    space = space_for(load_study(path), backbone)
    assert {place.site.layer for place in space.placements} == layers
    assert space.decode(space.largest()).architecture.lowest_layer(backbone) == 1


def test_a_layer_has_mixtures_at_the_sites_of_its_own_loras(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    path = given_study(folder, only={"layers_to_transform": [0]})
    loaded = load_backbone(str(folder / "model"), task="classification", labels=LABELS)
    lora_in(folder / "b", loaded.model, 1, r".*layer\.2\.output\.dense", r=2)
    space = space_for(load_study(path), loaded.backbone)
    assert {place.site.name for place in space.placements} == {
        "layers.0.attn.q",
        "layers.0.attn.v",
        "layers.2.mlp.down",
    }


@pytest.mark.parametrize("own", [{"layers": [0]}, {"at": ["attn.o"]}])
def test_where_there_is_nothing_given_there_is_no_mixture(tmp_path: Path, own: dict[str, Any]) -> None:
    path = given_study(tmp_path / "study", only={"layers_to_transform": [1, 2]}, **own)
    with pytest.raises(StudyFileError, match="pretrained LoRAs adapt no site"):
        run(load_study(path))


def test_an_export_holds_the_given_loras(tmp_path: Path) -> None:
    path = given_study(tmp_path / "study", router="token", top_k=2)
    snapshot = run(load_study(path))
    number = next(t.of for t in snapshot.trials if t.role.kind == "finalist" and t.candidate.architecture)
    with pytest.raises(SystemExit) as exit_:
        main(["export", str(path), "--pick", f"trial:{number}", "--out", str(tmp_path / "out")])
    assert exit_.value.code == 0
    for name in "ab":
        rmtree(tmp_path / "study" / name)
    _, attachment = load(tmp_path / "out")
    (state,) = [v for name, v in attachment.state().items() if name == "layers.0.attn.q/mixture/B"]
    assert state.shape[0] == 2
    assert state.abs().min(0).values.max() > 0


@pytest.mark.parametrize(
    ("lora", "problem"),
    [
        ({"rank": 4}, "the LoRAs in `given` determine it"),
        ({"experts": 2}, "the LoRAs in `given` determine it"),
        ({"given": ["nowhere"]}, "nowhere/adapter_config.json: no such file"),
        ({"kind": "ia3"}, "only kind lora"),
    ],
)
def test_what_a_study_says_of_bad_ones(tmp_path: Path, lora: dict[str, Any], problem: str) -> None:
    path = given_study(tmp_path / "study", **lora)
    with pytest.raises(StudyFileError, match=problem):
        run(load_study(path))


# Where nothing is trained


CAUSAL_ROWS = rows("train", 48)


def causal_model(folder: Path) -> Path:
    """A Llama without a task head, and two LoRAs of it, `a` and `b`; returns the model's folder."""
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    config = LlamaConfig(**shape, vocab_size=300, max_position_embeddings=64)
    tokenizer = byte_tokenizer([row["prompt"] + row["completion"] for row in CAUSAL_ROWS])
    save(seeded(LlamaForCausalLM, config), folder / "model", tokenizer)
    for name in "ab":
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        lora_in(folder / name, model, ord(name), ["q_proj", "v_proj"], r=2, layers_to_transform=[1, 2])
    return folder / "model"


def test_what_is_not_trained_is_scored_like_any_other(tmp_path: Path) -> None:
    """In a pack of trained ones, in one of its own, alone, by both evaluators."""
    loaded = load_backbone(str(causal_model(tmp_path)), task="causal-lm")
    data = loaded, "causal-lm", Splits(CAUSAL_ROWS, CAUSAL_ROWS[:20], CAUSAL_ROWS[20:], None), 32
    upper = [site.name for site in loaded.backbone.sites if site.role in ("attn.q", "attn.v") and site.layer]
    given = [mixture_of([tmp_path / "a", tmp_path / "b"], router=name).canonical() for name in ("arrow", "uniform")]
    architectures = [Architecture.of({name: [spec] for name in upper}) for spec in (*given, Lora(rank=2))]
    assert [architecture.num_params(loaded.backbone) > 0 for architecture in architectures] == [False, False, True]
    wanted = [
        Request(
            candidate=Candidate(architecture=architecture, training={"epochs": 1, "batch_size": 8}),
            fidelity=Fidelity(rungs=(0.5,)),
            test=True,
            keep_weights=True,
        )
        for architecture in architectures
    ]
    expected = TrainEvaluator(*data).evaluate(wanted)
    for k, found in enumerate(expected):
        assert found.measurement is not None, found.reason
        assert len(found.measurement.losses) == 6
        assert found.measurement.averaged.keys() == ({"loss", "accuracy"} if k < 2 else set())
    packed = [PackedEvaluator(*data, **own) for own in ({}, {"pack": 1, "cache": ActivationCache(10**7)})]
    for evaluator, part in ((packed[0], [0, 1, 2]), (packed[0], [0, 1]), (packed[1], [0, 1, 2])):
        for k, ours in zip(part, evaluator.evaluate([wanted[k] for k in part]), strict=True):
            theirs = expected[k].measurement
            assert ours.measurement is not None, ours.reason
            assert theirs is not None
            for name in ("values", "test", "averaged"):
                assert getattr(ours.measurement, name) == pytest.approx(getattr(theirs, name), rel=1e-5)
            assert ours.measurement.losses == pytest.approx(theirs.losses, rel=1e-5, abs=1.1e-5)
            assert [share for share, _ in ours.measurement.rungs] == [0.5]
            assert ours.weights is not None
            assert ours.weights.keys() == expected[k].weights.keys()


@pytest.mark.parametrize("name", ["snip", "grad_norm", "fisher"])
def test_what_is_not_trained_has_no_saliency(tmp_path: Path, name: str) -> None:
    loaded = load_backbone(str(causal_model(tmp_path)), task="causal-lm")
    evaluator = PackedEvaluator(loaded, "causal-lm", Splits(*[CAUSAL_ROWS] * 3, None), 32)
    given = [mixture_of([tmp_path / "a", tmp_path / "b"], router=router).canonical() for router in ("arrow", "token")]
    arrow, token = (Architecture.of({"layers.1.attn.q": [spec]}) for spec in given)
    proxy = PROXIES[name](evaluator)
    assert proxy.scores([arrow]) == [0.0]
    first, second = proxy.scores([arrow, token])
    assert second < first == 0.0


def test_the_bare_model_fails_in_every_pack(tmp_path: Path) -> None:
    loaded = load_backbone(str(causal_model(tmp_path)), task="causal-lm")
    evaluator = PackedEvaluator(loaded, "causal-lm", Splits(*[CAUSAL_ROWS] * 3, None), 32)
    evaluator.mixes_depths = True
    trained = Architecture.of({"layers.0.attn.q": [Lora(rank=2)]})
    wanted = [
        Request(candidate=Candidate(architecture=own, training={"epochs": 0.5})) for own in (Architecture(), trained)
    ]
    bare, other = evaluator.evaluate(wanted)
    assert bare.reason == "nothing to train: no adapter is on and the model has no task head"
    assert other.measurement is not None


@pytest.mark.slow
@pytest.mark.parametrize("evaluator", ["packed", slow("train")])
def test_a_study_between_given_loras_of_a_causal_model(
    tmp_path: Path, evaluator: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its average has nothing to train: the verdict comes all the same, and the recipe keeps its promise."""
    path = save_study(
        tmp_path / "study",
        task="causal-lm",
        space={"adapters": {"lora": {"given": ["a", "b"], "router": ["arrow", "token"], "top_k": 1}}},
        training={"learning_rate": 1e-2, "epochs": 1, "batch_size": 8},
        objectives=["loss", "num_params", "peak_memory_bytes"],
        baselines={"names": ["lora-r8-qv"], "learning_rates": [1e-2]},
        search={"searcher": "grid", "trials": 2, "batch": 2},
        evaluation={"evaluator": evaluator},
    )
    rmtree(tmp_path / "study" / "model")
    causal_model(tmp_path / "study")
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / "study" / f"{split}.jsonl", list(rows(split, 24)))
    settings = YAML().load(path)
    settings["data"]["max_length"] = 32
    YAML().dump(settings, path)
    snapshot = run(load_study(path))
    assert {(trial.role, trial.state) for trial in snapshot.trials if trial.state != "complete"} == set()
    found = verdicts(snapshot)
    assert found
    assert all(verdict.complete for verdict in found)
    for verdict in found:
        own = {one.control: one for one in verdict.against}
        assert verdict.num_params < verdict.active_params < verdict.total_params
        assert own["average"].num_params == 0 < own["average"].total_params <= verdict.total_params
        assert own["active"].total_params <= own["total"].total_params <= verdict.total_params
        head, *lines = verdict.lines(METRICS["loss"])
        assert f"({verdict.total_params:,} parameters, {verdict.num_params:,} of them trained, " in head
        assert any("against average" in line and " 0 of them trained" in line for line in lines)

    number = next(t.number for t in snapshot.search_trials if t.values["num_params"] == 0)
    recipe = str(tmp_path / "out" / "recipe.yaml")
    for command in (
        ["export", str(path), "--pick", f"trial:{number}", "--out", str(tmp_path / "out")],
        ["train", recipe, "--device", "cpu"],
        ["verify", recipe, "--device", "cpu", "--json"],
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(command)
        assert exit_.value.code == 0, capsys.readouterr().err
    kept = json.loads(capsys.readouterr().out)["kept"]
    assert kept
    assert all(kept.values())
