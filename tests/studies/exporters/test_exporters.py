"""Exports are tested by rebuilding: the same modules, the same trainable count, the same logits."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from ruamel.yaml import YAML
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from autopeft.evaluators.backbones import load_backbone
from autopeft.search_space.adapters import (
    ADAPTERS,
    AdapterSpec,
    Bitfit,
    Bottleneck,
    Dora,
    Full,
    Ia3,
    Lora,
    Mixture,
    Norm,
    Prefix,
    Shira,
    Ssf,
    Vera,
)
from autopeft.search_space.backbones.linear import weight_of
from autopeft.search_space.routers import ROUTERS
from autopeft.studies.errors import UserError
from autopeft.studies.exporters import EXPORTERS, Assessment, ExportError, native, trl_script
from autopeft.studies.exporters import axolotl as axolotl_target
from autopeft.studies.exporters.base import State
from autopeft.studies.exporters.peft_config import plan
from autopeft.studies.recipes.recipe import Averaged, Recipe
from autopeft.testing import check_exporter

from ...support.exported import CLASSIFIERS, MODELS, TEXTS, logits, make_recipe, save_model, trained

EXACT, APPROXIMATE, UNSUPPORTED = "exact", "approximate", "unsupported"
# Exporters that hold a type exactly over a causal language model with biases (GPT-2), beside `native`, which holds all
# types, and `merged`, which holds those that can be merged. The README shows this table.
EXACTLY: dict[str, tuple[str, ...]] = {
    "lora": ("peft", "trl-script", "axolotl"),
    "dora": ("peft", "trl-script", "axolotl"),
    "vera": ("peft", "trl-script"),
    "shira": (),  # GPT-2's weights are transposed; other families are in test_peft_rebuilds_the_network
    "ia3": ("peft", "trl-script"),
    "norm": ("peft", "trl-script"),
}


class Folders:
    """Models on disk, each saved when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __getitem__(self, family: str) -> Path:
        folder = self.root / family / "model"
        return folder if folder.exists() else save_model(family, folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("models"))


def plain_model(recipe: Recipe, folder: str | Path | None = None) -> nn.Module:
    """A model as a user without autopeft loads it."""
    folder = folder or recipe.backbone.id
    if recipe.task == "causal-lm":
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(recipe.labels or ())).eval()


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def trained_params(recipe: Recipe) -> int:
    return recipe.num_adapter_params + recipe.host.num_head_params


def assert_close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# The registry


def test_the_registry_has_the_names_of_the_exporters() -> None:
    assert all(EXPORTERS[name].name == name for name in EXPORTERS)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("target", EXPORTERS)
def test_fit_of_each_type(models: Folders, kind: str, target: str) -> None:
    spec = ADAPTERS[kind]()
    sites = load_backbone(str(models["gpt2"]), task="causal-lm").backbone.sites
    roles = (*spec.default_roles, *spec.roles)  # GPT-2 has no attn.q
    site = next(site.name for role in roles for site in sites if site.role == role and site.layer in (1, None))
    fit = EXPORTERS[target].assess(make_recipe("gpt2", models["gpt2"], {site: spec}))
    exact = {"native", *(["merged"] if spec.mergeable else []), *EXACTLY.get(kind, ())}
    assert fit.level == (EXACT if target in exact else UNSUPPORTED), fit
    assert bool(fit.lost) == (fit.level != EXACT)
    assert all(line.startswith(site) for line in fit.lost), fit


# peft


def every_linear(family: str, spec: type[Lora], **fields: Any) -> dict[str, AdapterSpec]:
    """A rank of its own for each layer and role."""
    roles = {
        "bert": ("attn.q", "attn.o", "mlp.down"),
        "llama": ("attn.q", "attn.k", "mlp.gate", "mlp.down"),
        "gpt2": ("attn.qkv", "mlp.up"),
    }.get(family, ("attn.v", "mlp.up"))
    return {
        f"layers.{layer}.{role}": spec(rank=1 + (layer + i) % 5, alpha=1.0 + layer % 4, **fields)
        for layer in range(12)
        if layer != 4  # one layer without any
        for i, role in enumerate(roles)
    }


#: A linear of each family.
LINEARS = {family: "attn.qkv" if family == "gpt2" else "attn.q" for family in MODELS}


@dataclass(frozen=True)
class Case:
    family: str
    placement: Mapping[str, Any]


PEFT_CASES = {
    **{f"lora-{family}": Case(family, every_linear(family, Lora)) for family in MODELS},
    **{f"dora-{family}": Case(family, every_linear(family, Dora)) for family in MODELS},
    "rslora-llama": Case("llama", every_linear("llama", Lora, scaling="rslora")),
    "scale-rules-mixed": Case(
        "bert",
        {
            "layers.1.attn.q": Lora(rank=3, scaling="rslora"),
            "layers.11.attn.q": Lora(rank=5, alpha=7.5),
            "layers.2.attn.q": Lora(rank=5, alpha=2.0, init="gaussian"),
            "layers.3.attn.q": Lora(rank=5, init="gaussian"),
        },
    ),
    **{
        f"vera-{family}": Case(family, {name: Vera(rank=4) for name in every_linear(family, Lora)}) for family in MODELS
    },
    "vera-key-bert": Case("bert", {"layers.1.mlp.up": Vera(rank=3, projection_key=7, d_initial=0.5)}),
    **{
        f"shira-{family}": Case(family, {name: Shira(rank=2) for name in every_linear(family, Lora)})
        for family in MODELS
        if family != "gpt2"
    },
    "ia3-bert": Case(
        "bert", {f"layers.{i}.{role}": Ia3() for i in (1, 11) for role in ("attn.k", "attn.v", "mlp.down")}
    ),
    "ia3-attention": Case("llama", {"layers.1.attn.k": Ia3(), "layers.11.attn.v": Ia3()}),
    "ia3-gpt2": Case("gpt2", {"layers.1.attn.qkv": Ia3(), "layers.11.mlp.down": Ia3()}),
    "norm-bert": Case("bert", {"embed.norm": Norm(), "layers.1.norm.0": Norm(), "layers.11.norm.1": Norm()}),
    "norm-llama": Case("llama", {"layers.1.norm.0": Norm(), "layers.11.norm.1": Norm(), "norm.final": Norm()}),
}


@pytest.mark.parametrize("case", PEFT_CASES.values(), ids=PEFT_CASES.keys())
def test_peft_rebuilds_the_network(models: Folders, tmp_path: Path, case: Case) -> None:
    recipe = make_recipe(case.family, models[case.family], case.placement)
    state, wanted = trained(recipe)
    fit = EXPORTERS["peft"].export(recipe, state, tmp_path / "out", allow_lossy=True)
    assert fit.level == (APPROXIMATE if case is PEFT_CASES["scale-rules-mixed"] else EXACT), fit

    loaded = PeftModel.from_pretrained(plain_model(recipe), tmp_path / "out", is_trainable=True).eval()
    assert_close(logits(loaded), wanted)
    assert trainable(loaded) == trained_params(recipe)
    assert trainable(get_peft_model(plain_model(recipe), plan(recipe).build())) == trained_params(recipe)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "recipe.yaml",
    }


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_peft_rebuilds_rows_of_zeros(tmp_path: Path, family: str) -> None:
    folder = save_model(family, tmp_path / "model")
    names = [f"layers.{layer}.{LINEARS[family]}" for layer in (1, 11)]
    placement = {name: Dora(rank=2) for name in names}
    whole = make_recipe(family, folder, placement)
    model = plain_model(whole)
    for name in names:
        weight_of(model.get_submodule(whole.sites[name].module))[:3] = 0.0
    model.save_pretrained(folder)
    recipe = make_recipe(family, folder, placement)
    state, _ = trained(recipe)
    state[f"{names[0]}/dora/B"][:2] = 0.0  # two rows that stay zeros, and one that does not
    EXPORTERS["native"].export(recipe, state, tmp_path / "native")
    rebuilt, attachment = native.load(tmp_path / "native")
    with attachment:
        wanted = logits(rebuilt)
    EXPORTERS["peft"].export(recipe, state, tmp_path / "out")
    assert_close(logits(PeftModel.from_pretrained(plain_model(recipe), tmp_path / "out").eval()), wanted)


def assert_reloads(recipe: Recipe, state: State, wanted: Tensor, folder: Path) -> None:
    """peft's export in `folder`/out has the logits, and one of our own format has them to the bit."""
    assert_close(logits(PeftModel.from_pretrained(plain_model(recipe), folder / "out").eval()), wanted)
    EXPORTERS["native"].export(recipe, state, folder / "native")
    model, attachment = native.load(folder / "native")
    with attachment:
        assert torch.equal(logits(model), wanted)


def test_peft_has_one_rank_of_vera_and_one_key(models: Folders, tmp_path: Path) -> None:
    ranks = {"layers.1.attn.q": Vera(rank=3), "layers.2.mlp.up": Vera(rank=2), "layers.3.mlp.down": Vera(rank=3)}
    recipe = make_recipe("bert", models["bert"], ranks)
    state, wanted = trained(recipe)
    assert not any(name.endswith(("/A", "/B")) for name in state), "they follow from the recipe"
    fit = EXPORTERS["peft"].export(recipe, state, tmp_path / "out", allow_lossy=True)
    assert fit.lost == ("layers.2.mlp.up vera: rank 2 becomes 3, one for all sites (affects only training)",)
    assert_reloads(recipe, state, wanted, tmp_path)
    keys = make_recipe("bert", models["bert"], {**ranks, "layers.4.attn.q": Vera(projection_key=1)})
    assert EXPORTERS["peft"].assess(keys).lost == (
        "layers.1.attn.q vera: peft supports one pair of projections per file, here there are 2",
    )


def test_peft_has_one_rank_of_shira_and_no_scale(models: Folders, tmp_path: Path) -> None:
    placement = {"layers.1.attn.q": Shira(rank=3, scale=0.5), "layers.3.mlp.down": Shira(rank=3)}
    recipe = make_recipe("bert", models["bert"], placement)
    state, wanted = trained(recipe)
    fit = EXPORTERS["peft"].export(recipe, state, tmp_path / "out", allow_lossy=True)
    assert fit.lost == ("layers.1.attn.q shira: scale 0.5 becomes part of the values (affects only training)",)
    assert_reloads(recipe, state, wanted, tmp_path)
    other = make_recipe("bert", models["bert"], {**placement, "layers.4.attn.q": Shira(rank=2)})
    assert EXPORTERS["peft"].assess(other).lost == (
        "layers.4.attn.q shira: rank 2, but peft supports one rank for all, here 3",
    )


@pytest.mark.parametrize("spec", [Vera(rank=4, projection_key=3), Shira(rank=2)], ids=lambda spec: spec.kind)
def test_script_declares_what_peft_has(models: Folders, spec: AdapterSpec) -> None:
    recipe = make_recipe("llama", models["llama"], {"layers.1.attn.q": spec, "layers.2.mlp.up": spec})
    text = trl_script.script(recipe)
    compile(text, "train.py", "exec")
    assert f"return {type(plan(recipe).build()).__name__}(**PEFT)" in text
    decayed = recipe.model_copy(update={"training": replace(recipe.training, weight_decay=0.1)})
    lost = EXPORTERS["trl-script"].assess(decayed).lost
    assert len(lost) == 2
    assert all("weight_decay 0.1 also applies to its v" in line for line in lost)


def test_peft_loses_what_it_has_once(models: Folders, tmp_path: Path) -> None:
    placement = {
        "layers.0.attn.q": Lora(),
        "layers.1.attn.q": Lora(dropout=0.1),
        "layers.2.attn.q": Lora(),
        "layers.11.attn.q": Lora(dropout=0.2, init="gaussian"),
        "layers.3.attn.q": Lora(),
    }
    recipe = make_recipe("bert", models["bert"], placement)
    with pytest.raises(ExportError, match="allow-lossy") as caught:
        EXPORTERS["peft"].export(recipe, trained(recipe)[0], tmp_path / "out")
    lost = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert [line.split(" becomes ")[0] for line in lost] == [
        "layers.1.attn.q lora: dropout 0.1",
        "layers.11.attn.q lora: dropout 0.2",
        "layers.11.attn.q lora: init gaussian",
    ]
    assert not list(tmp_path.iterdir())


def test_unsupported_is_refused_even_when_loss_is_allowed(models: Folders, tmp_path: Path) -> None:
    placement = {
        "layers.0.attn.q": [Lora(), Lora(rank=2)],
        "layers.1.attn.k": Ia3(),
        "layers.2.attn.q": Lora(),
    }
    recipe = make_recipe("bert", models["bert"], placement)
    with pytest.raises(ExportError) as caught:
        EXPORTERS["peft"].export(recipe, trained(recipe)[0], tmp_path / "out", allow_lossy=True)
    assert "layers.0.attn.q lora: peft supports one adapter per module" in str(caught.value)
    assert "layers.1.attn.k ia3: peft supports one adapter type per file" in str(caught.value)
    assert isinstance(caught.value, UserError)


# Mixtures of LoRAs in formats that have none

BY_TASK = ("task", "poly")
#: Without those that need LoRAs that are given, or a site to follow.
ROUTED = [router for router in ROUTERS if router not in ("uniform", "arrow", "xlora", "follow")]
UNIFORM = Mixture(expert=Lora(rank=2, alpha=3.0), experts=3, router="uniform")
UNIFORM_CASES = {
    **{family: Case(family, {f"layers.{i}.{role}": UNIFORM for i in (1, 11)}) for family, role in LINEARS.items()},
    "shared, scales and plain ones": Case(
        "bert",
        {
            "layers.1.attn.q": Mixture(expert=Lora(rank=3, scaling="rslora"), experts=4, router="uniform"),
            "layers.11.attn.q": Mixture(expert=Lora(rank=2), experts=3, shared_experts=2, router="uniform"),
            "layers.2.attn.q": Lora(rank=5, scaling="rslora"),
            "layers.2.attn.k": Mixture(expert=Lora(alpha=3.0), ranks=(1, 4, 2, 1), router="uniform"),
            "layers.2.attn.v": Mixture(
                expert=Lora(scaling="rslora"), experts=2, shared_experts=1, ranks=(2, 3, 1), router="uniform"
            ),
            "layers.3.mlp.down": Mixture(expert=Lora(rank=1), experts=1, router="uniform"),
            "layers.3.mlp.up": Mixture(expert=Lora(rank=2), experts=1, shared_experts=1, router="uniform"),
        },
    ),
}


def rebuilt(target: str, recipe: Recipe, folder: Path) -> Tensor:
    if target == "peft":
        return logits(PeftModel.from_pretrained(plain_model(recipe), folder).eval())
    return logits(plain_model(recipe, folder))


@pytest.mark.parametrize("case", UNIFORM_CASES.values(), ids=UNIFORM_CASES.keys())
@pytest.mark.parametrize("target", ["peft", "merged"])
def test_experts_without_a_router_are_one_lora(models: Folders, tmp_path: Path, target: str, case: Case) -> None:
    recipe = make_recipe(case.family, models[case.family], case.placement)
    state, wanted = trained(recipe)
    assert EXPORTERS[target].export(recipe, state, tmp_path / "out") == Assessment("exact")
    assert_close(rebuilt(target, recipe, tmp_path / "out"), wanted)
    assert Recipe.load(tmp_path / "out" / "recipe.yaml") == recipe, "how it is trained has not changed"


def routed(router: str, **fields: Any) -> dict[str, AdapterSpec]:
    """With a mixture to follow in the same layer."""
    expert, tasks = Lora(rank=2), 4 if router in BY_TASK else 1
    return {
        "layers.1.attn.q": Mixture(expert=expert, experts=3, **fields),
        "layers.1.attn.k": Mixture(expert=expert, experts=3, router=router, tasks=tasks, **fields),
        "layers.2.attn.q": Lora(),
        "layers.3.attn.q": UNIFORM,
        "layers.4.attn.q": Mixture(expert=Lora(alpha=4.0), experts=2, ranks=(1, 3), router="uniform"),
    }


@pytest.mark.parametrize("router", ROUTED)
@pytest.mark.parametrize("target", ["peft", "merged"])
def test_routed_experts_are_one_lora_without_the_routing(
    models: Folders, tmp_path: Path, target: str, router: str
) -> None:
    price = {"accuracy": Averaged(value=0.51234, routed=0.53421, seeds=(1, 2))}
    recipe = make_recipe("bert", models["bert"], routed(router), averaged=price)
    state, as_routed = trained(recipe)
    with pytest.raises(ExportError, match="allow-lossy") as caught:
        EXPORTERS[target].export(recipe, state, tmp_path / "out")
    (line,) = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert line.startswith("layers.1.attn.k mixture and 1 more: ")
    assert f"without routing by {', '.join(sorted({'token', router}))};" in line
    assert "validation accuracy 0.5123 instead of 0.5342 (mean of 2 trainings)" in line
    assert not list(tmp_path.iterdir())

    fit = EXPORTERS[target].export(recipe, state, tmp_path / "out", allow_lossy=True)
    assert fit == Assessment("approximate", (line,))
    found = rebuilt(target, recipe, tmp_path / "out")
    assert_close(found, trained(recipe, averaged=True)[1])
    assert not torch.allclose(found, as_routed, atol=1e-4)


def test_what_was_not_measured_has_no_price(models: Folders) -> None:
    recipe = make_recipe("bert", models["bert"], {"layers.1.attn.q": Mixture()})
    (line,) = EXPORTERS["peft"].assess(recipe).lost
    assert line.startswith("layers.1.attn.q mixture: ")
    assert line.endswith("the cost of this was not measured (studies measure it for finalists)")


@pytest.mark.parametrize("target", ["peft", "merged"])
def test_other_mixtures_are_no_plain_adapter(models: Folders, target: str) -> None:
    placement = {
        "layers.1.attn.k": Mixture(expert=Ia3()),
        "layers.2.attn.q": Mixture(expert=Dora(), router="uniform"),
        "layers.3.attn.q": [UNIFORM, Lora()],
        "layers.4.attn.q": UNIFORM,
    }
    assert EXPORTERS[target].assess(make_recipe("bert", models["bert"], placement)) == Assessment(
        "unsupported",
        (
            "layers.1.attn.k mixture: experts of type ia3 cannot be combined into one adapter, only LoRAs",
            "layers.2.attn.q mixture: experts of type dora cannot be combined into one adapter, only LoRAs",
            "layers.3.attn.q mixture: would become a second LoRA on one module",
        ),
    )


def test_averaged_experts_keep_to_the_rules_of_the_format(models: Folders) -> None:
    beside = {"layers.1.attn.k": Ia3(), "layers.1.attn.q": UNIFORM, "layers.2.attn.q": UNIFORM}
    fit = EXPORTERS["peft"].assess(make_recipe("bert", models["bert"], beside))
    assert fit == Assessment(
        "unsupported", ("layers.1.attn.k ia3: peft supports one adapter type per file, here lora",)
    )


@pytest.mark.parametrize("target", ["trl-script", "axolotl"])
def test_what_trains_has_no_mixtures(models: Folders, target: str) -> None:
    fit = EXPORTERS[target].assess(make_recipe("gpt2", models["gpt2"], {"layers.1.attn.qkv": UNIFORM}))
    assert fit.level == UNSUPPORTED
    assert fit.lost[0].startswith("layers.1.attn.qkv mixture: peft cannot train routed experts")


# native


@pytest.mark.parametrize("family", MODELS)
def test_native_rebuilds_mixtures(models: Folders, tmp_path: Path, family: str) -> None:
    placement = {
        **every_linear(family, Lora),
        "layers.1.mlp": Bottleneck(size=3),
        "layers.2.attn": Prefix(length=4),
        "layers.11.norm.0": Norm(),
        "layers.4.mlp.up": [Lora(rank=2), Lora(rank=3)],
        "layers.5.mlp.up": Mixture(experts=2, shared_experts=1, ranks=(1, 3, 2)),
    }
    recipe = make_recipe(family, models[family], placement)
    state, wanted = trained(recipe)
    assert EXPORTERS["native"].export(recipe, state, tmp_path / "out") == Assessment("exact")
    model, attachment = native.load(tmp_path / "out")
    assert_close(logits(model), wanted)
    assert attachment.num_adapter_params() == recipe.num_adapter_params
    assert set(attachment.state()) == set(state)


@pytest.mark.parametrize("router", ROUTED)
def test_native_rebuilds_routers(models: Folders, tmp_path: Path, router: str) -> None:
    recipe = make_recipe("bert", models["bert"], routed(router, shared_experts=int(router not in ("soft", "poly"))))
    found = {}
    for domain in (0, 3):
        state, wanted = trained(recipe, domain=domain)
        EXPORTERS["native"].export(recipe, state, tmp_path / "out", force=True)
        model, attachment = native.load(tmp_path / "out")
        if router in BY_TASK:
            with pytest.raises(ValueError, match="domain"):
                logits(model)
            attachment.routers.tokens.domains = torch.full((TEXTS,), domain)
        found[domain] = logits(model)
        assert_close(found[domain], wanted)
    assert torch.equal(found[0], found[3]) == (router not in BY_TASK)


def test_native_says_what_is_missing(models: Folders, tmp_path: Path) -> None:
    recipe = make_recipe("bert", models["bert"], {"layers.1.attn.q": Lora()})
    EXPORTERS["native"].export(recipe, trained(recipe)[0], tmp_path / "out")
    (tmp_path / "out" / native.WEIGHTS_FILE).write_bytes(b"damaged")
    with pytest.raises(ExportError, match="cannot be read"):
        native.load(tmp_path / "out")
    (tmp_path / "out" / native.WEIGHTS_FILE).unlink()
    with pytest.raises(ExportError, match="cannot be read"):
        native.load(tmp_path / "out")


# merged

MERGED_CASES = {
    **{f"lora-{family}": Case(family, every_linear(family, Lora)) for family in MODELS},
    **{f"dora-{family}": Case(family, every_linear(family, Dora)) for family in MODELS},
    "mixture": Case(
        "bert",
        {
            "layers.1.attn.k": [Lora(), Ia3(), Bitfit()],
            "layers.2.mlp.up": Ssf(),
            "layers.3.mlp.down": [Lora(), Ia3()],
            "layers.4.norm.1": [Norm(), Ssf()],
        },
    ),
    "norm-llama": Case("llama", {"norm.final": Norm()}),
    "full": Case("bert", {"backbone": Full()}),
    "head-alone": Case("roberta", {}),
}


@pytest.mark.parametrize("case", MERGED_CASES.values(), ids=MERGED_CASES.keys())
def test_merged_is_a_plain_model(models: Folders, tmp_path: Path, case: Case) -> None:
    recipe = make_recipe(case.family, models[case.family], case.placement)
    state, wanted = trained(recipe)
    assert EXPORTERS["merged"].export(recipe, state, tmp_path / "out") == Assessment("exact")
    assert_close(logits(plain_model(recipe, tmp_path / "out")), wanted)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")("w1 w2")["input_ids"]) == 3


def test_merged_refuses_what_a_plain_model_would_drop(models: Folders) -> None:
    fit = EXPORTERS["merged"].assess(make_recipe("llama", models["llama"], {"layers.1.mlp.up": Ssf()}))
    assert fit == Assessment("unsupported", ("layers.1.mlp.up ssf: needs a bias, but this layer of llama has none",))


def test_merged_says_that_half_precision_rounds(models: Folders) -> None:
    recipe = make_recipe("llama", models["llama"], {"layers.1.mlp.up": Lora()})
    half = recipe.model_copy(update={"backbone": recipe.backbone.model_copy(update={"dtype": "bfloat16"})})
    assert EXPORTERS["merged"].assess(half).level == APPROXIMATE


# trl-script


def imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("exported_train", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", PEFT_CASES.values(), ids=PEFT_CASES.keys())
def test_script_declares_the_same_network(models: Folders, tmp_path: Path, case: Case) -> None:
    recipe = make_recipe(case.family, models[case.family], case.placement)
    EXPORTERS["trl-script"].export(recipe, None, tmp_path / "out", allow_lossy=True)
    script = imported(tmp_path / "out" / "train.py")
    tokenizer = script.load_tokenizer()
    model = script.load_model(tokenizer) if case.family in CLASSIFIERS else script.load_model()
    assert trainable(model) == trained_params(recipe)
    assert not any(
        module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout) and "lora" not in name
    )
    assert script.TRAINING["learning_rate"] == recipe.training.learning_rate


@pytest.mark.parametrize("family", ["roberta", "llama-score"])
def test_classification_script_runs(models: Folders, tmp_path: Path, family: str) -> None:
    recipe = make_recipe(family, models[family], every_linear(family, Lora, dropout=0.1))
    EXPORTERS["trl-script"].export(recipe, None, tmp_path / "out")
    command = [sys.executable, "train.py", "--max-steps", "2", "--output", str(tmp_path / "trained")]
    done = subprocess.run(command, cwd=tmp_path / "out", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "eval_accuracy" in done.stdout
    loaded = PeftModel.from_pretrained(plain_model(recipe), tmp_path / "trained")
    assert logits(loaded).isfinite().all()


def test_causal_script_prepares_rows_as_trl_names_them(models: Folders, tmp_path: Path) -> None:
    recipe = make_recipe("llama", models["llama"], {"layers.1.attn.q": Lora()})
    EXPORTERS["trl-script"].export(recipe, None, tmp_path / "out")
    script = imported(tmp_path / "out" / "train.py")
    rows = script.prepare(script.load_rows("train"))
    assert rows.column_names == ["prompt", "completion"]
    assert rows[0] == {"prompt": "w0 train", "completion": "w1"}


@pytest.mark.parametrize("source", ["embedded", "embedded-domains"])
def test_script_of_the_embedded_model_names_no_folder(models: Folders, tmp_path: Path, source: str) -> None:
    recipe = make_recipe("bert", models["bert"], {"layers.1.attn.q": Lora()})
    embedded = recipe.model_copy(
        update={
            "backbone": recipe.backbone.model_copy(update={"id": "embedded"}),
            "data": type(recipe.data)(source=source),
        }
    )
    EXPORTERS["trl-script"].export(embedded, None, tmp_path / "out")
    text = (tmp_path / "out" / "train.py").read_text()
    assert os.sep + "site-packages" not in text
    settings = runpy.run_path(str(tmp_path / "out" / "train.py"))
    assert (Path(settings["MODEL"]) / "config.json").is_file()
    assert Path(settings["DATA"]["train"]["data_files"]).is_file()


def test_script_says_which_vectors_are_decayed(models: Folders) -> None:
    placement = {"layers.1.attn.q": Dora(), "layers.2.attn.q": Dora()}
    recipe = make_recipe("bert", models["bert"], placement, {"weight_decay": 0.1})
    fit = EXPORTERS["trl-script"].assess(recipe)
    assert [line.split(":")[0] for line in fit.lost] == ["layers.1.attn.q dora", "layers.2.attn.q dora"]
    assert EXPORTERS["peft"].assess(recipe).level == EXACT


# axolotl


def test_axolotl_holds_the_same_configuration(models: Folders, tmp_path: Path) -> None:
    recipe = make_recipe("llama", models["llama"], every_linear("llama", Dora, dropout=0.1))
    EXPORTERS["axolotl"].export(recipe, None, tmp_path / "out")
    found = YAML(typ="safe").load((tmp_path / "out" / axolotl_target.CONFIG_FILE).read_text())
    peft = plan(recipe).arguments
    assert (found["adapter"], found["peft_use_dora"], found["peft_use_rslora"]) == ("lora", True, False)
    assert found["lora_rank_pattern"] == peft["rank_pattern"]
    assert found["lora_alpha_pattern"] == peft["alpha_pattern"]
    assert found["lora_target_modules"] == peft["target_modules"]
    assert found["lora_dropout"] == 0.1
    assert (found["micro_batch_size"], found["num_epochs"]) == (4, 2.0)
    assert found["datasets"][0]["type"]["field_output"] == "completion"
    assert found["base_model"] == recipe.backbone.id


def test_axolotl_refuses_what_it_cannot_say(models: Folders) -> None:
    assess = EXPORTERS["axolotl"].assess
    bert = assess(make_recipe("bert", models["bert"], {"layers.1.attn.q": Lora()}))
    assert (bert.level, len(bert.lost)) == (UNSUPPORTED, 1)
    fraction = {"layers.1.attn.q": Lora(alpha=2.5), "layers.2.attn.q": Lora()}
    fit = assess(make_recipe("llama", models["llama"], fraction))
    assert fit.level == UNSUPPORTED
    assert [line.split(":")[0] for line in fit.lost] == ["layers.1.attn.q"]


# All or nothing


@pytest.fixture
def simple(models: Folders) -> Recipe:
    return make_recipe("bert", models["bert"], {"layers.1.attn.q": Lora()})


@pytest.mark.parametrize("target", EXPORTERS)
def test_it_passes_the_checks_of_plug_ins(simple: Recipe, tmp_path: Path, target: str) -> None:
    (tmp_path / "exports").mkdir()
    check_exporter(EXPORTERS[target], simple, trained(simple)[0], tmp_path / "exports")


@pytest.mark.parametrize("target", EXPORTERS)
def test_nothing_half_written(models: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    exporter = EXPORTERS[target]
    recipe = make_recipe("gpt2", models["gpt2"], {"layers.1.attn.qkv": Lora()})
    state, _ = trained(recipe)
    exporter.export(recipe, state, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(self: Recipe, path: Path) -> None:
        assert any(path.parent.iterdir()), "the weights were written before"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Recipe, "save", fail)
    with pytest.raises(ExportError, match="No space left"):
        exporter.export(recipe, state, tmp_path / "new")
    with pytest.raises(ExportError, match="No space left"):
        exporter.export(recipe, state, tmp_path / "out", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_a_folder_in_use_is_kept(simple: Recipe, tmp_path: Path) -> None:
    exporter, state = EXPORTERS["native"], trained(simple)[0]
    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis.tex").write_text("mine")
    with pytest.raises(ExportError, match="no earlier export"):
        exporter.export(simple, state, work, force=True)
    assert (work / "thesis.tex").read_text() == "mine"
    with pytest.raises(ExportError, match="is a file"):
        exporter.export(simple, state, work / "thesis.tex", force=True)

    exporter.export(simple, state, tmp_path / "out")
    with pytest.raises(ExportError, match="--force"):
        exporter.export(simple, state, tmp_path / "out")
    EXPORTERS["trl-script"].export(simple, None, tmp_path / "out", force=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train.py", "recipe.yaml"}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "work"}


def test_a_folder_that_cannot_be_written(simple: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    # Not by chmod: for root, no folder is read-only.
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ExportError, match="cannot be written: Permission denied"):
        EXPORTERS["trl-script"].export(simple, None, tmp_path / "out")


def test_weights_must_be_those_of_the_recipe(simple: Recipe, tmp_path: Path) -> None:
    state, _ = trained(simple)
    name = "layers.1.attn.q/lora/A"
    wrong = {
        "is missing": {k: v for k, v in state.items() if k != name},
        "not a tensor of this recipe": state | {"layers.2.attn.q/lora/A": state[name]},
        "has shape": state | {name: state[name][1:]},
        "train it first": None,
    }
    for message, tensors in wrong.items():
        for target in ("native", "peft", "merged"):
            with pytest.raises(ExportError, match=message):
                EXPORTERS[target].export(simple, tensors, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_backbone_that_is_gone_is_the_users_error(simple: Recipe, tmp_path: Path) -> None:
    gone = simple.model_copy(update={"backbone": simple.backbone.model_copy(update={"id": str(tmp_path / "gone")})})
    with pytest.raises(ExportError, match="no such folder"):
        EXPORTERS["peft"].export(gone, trained(simple)[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())
