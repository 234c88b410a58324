"""LoRAs that were trained elsewhere as the experts of a mixture: read as peft reads them, and never trained."""

from __future__ import annotations

from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopeft.evaluators.backbones import load_backbone
from autopeft.evaluators.host import Attachment
from autopeft.evaluators.optimizer import PackedAdamW
from autopeft.search_space import Architecture
from autopeft.search_space.adapters import Lora, Mixture, spec_from_dict
from autopeft.search_space.adapters.given import CONFIG, GivenError, arrows, read, sites_of
from autopeft.search_space.backbone import Backbone
from autopeft.search_space.training import Training
from autopeft.studies.cli.app import main
from autopeft.studies.exporters.native import load
from autopeft.studies.study_file import StudyFileError, load_study

from .conformance import tiny, tokens
from .test_study import run
from .tiny_study import LABELS, save_study

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
    with pytest.raises(GivenError, match="cannot be read"):
        read(str(tmp_path / "nowhere"))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / CONFIG).write_text("{")
    with pytest.raises(GivenError, match="cannot be read"):
        read(str(broken))
    model, backbone = tiny("bert")
    lora_in(tmp_path / "lora", model, 1, ["query"], r=2)
    assert {site.role for site in sites_of([str(tmp_path / "lora")], backbone)} == {"attn.q"}
    for fields in ({"experts": 2}, {"shared_experts": 1, "experts": 1}):
        with pytest.raises(ValueError, match="all of them"):
            Mixture(given=(str(tmp_path / "lora"),), **fields)
    assert not Mixture(router="arrow").fits(backbone.site("layers.0.attn.q"))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"lora_bias": True}, "lora_bias: True"),
        ({"bias": "all"}, "bias: all"),
        ({"bias": "lora_only"}, "bias: lora_only"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
        ({"modules_to_save": ["word_embeddings"]}, "word_embeddings.weight: no linear"),
        ({"target_modules": ["query", "pooler.dense"]}, "bert.pooler.dense: no linear"),
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
    space = load_study(path).space_for(backbone)
    assert {place.site.layer for place in space.placements} == layers
    assert space.decode(space.largest()).architecture.lowest_layer(backbone) == 1


@pytest.mark.parametrize("own", [{"layers": [0]}, {"at": ["attn.o"]}])
def test_where_there_is_nothing_given_there_is_no_mixture(tmp_path: Path, own: dict[str, Any]) -> None:
    path = given_study(tmp_path / "study", only={"layers_to_transform": [1, 2]}, **own)
    with pytest.raises(StudyFileError, match="no module that the LoRAs are for"):
        run(load_study(path))


def test_an_export_holds_the_given_loras(tmp_path: Path) -> None:
    path = given_study(tmp_path / "study", router="token", top_k=2)
    snapshot = run(load_study(path))
    number = next(t.of for t in snapshot.trials if t.role == "finalist" and t.candidate.architecture)
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
        ({"rank": 4}, "follows from the LoRAs"),
        ({"experts": 2}, "follows from the LoRAs"),
        ({"given": ["nowhere"]}, "cannot be read"),
        ({"kind": "ia3"}, "only LoRAs"),
    ],
)
def test_what_a_study_says_of_bad_ones(tmp_path: Path, lora: dict[str, Any], problem: str) -> None:
    path = given_study(tmp_path / "study", **lora)
    with pytest.raises(StudyFileError, match=problem):
        run(load_study(path))
