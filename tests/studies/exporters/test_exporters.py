"""Exports are tested by rebuilding in a fresh process: the same modules, the same trainable count, the same logits."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import get_peft_model
from ruamel.yaml import YAML
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
)

from autopeft.evaluators.backbones import load_backbone
from autopeft.evaluators.data.splits import SPLITS, load_splits
from autopeft.evaluators.tasks import TASKS
from autopeft.search_space.adapters import (
    ADAPTERS,
    AdapterSpec,
    Beft,
    Bitfit,
    Boft,
    Bottleneck,
    C3a,
    Delora,
    Dense,
    Dora,
    Eigenlorax,
    Flora,
    Full,
    Gralora,
    Hira,
    Hra,
    Ia3,
    Loha,
    Lokr,
    Lora,
    Miss,
    Mixture,
    Mos,
    Norm,
    Oft,
    Prefix,
    Randlora,
    Road,
    Shira,
    Spiel,
    Ssf,
    Vblora,
    Vera,
)
from autopeft.search_space.backbones.linear import weight_of
from autopeft.search_space.routers import ROUTERS
from autopeft.studies.errors import UserError
from autopeft.studies.exporters import EXPORTERS, Assessment, ExportError, native, trl_script
from autopeft.studies.exporters import axolotl as axolotl_target
from autopeft.studies.exporters.base import State
from autopeft.studies.exporters.peft_config import plan
from autopeft.studies.recipes.parts import Averaged, RecipeData
from autopeft.studies.recipes.recipe import Recipe
from autopeft.testing import check_exporter

from ...support.exported import CLASSIFIERS, MODELS, logits, make_recipe, save_model, token_ids, trained
from ...support.fresh import FreshProcess
from ...support.slow import mostly_slow, mostly_slow_cases, slow

EXACT, APPROXIMATE, UNSUPPORTED = "exact", "approximate", "unsupported"
# Exporters that hold a type exactly over a causal language model with biases (GPT-2), beside `native`, which holds all
# types, and `merged`, which holds those that can be merged. The README shows this table.
EXACTLY: dict[str, tuple[str, ...]] = {
    "lora": ("peft", "peft-patterns", "trl-script", "axolotl"),
    "dora": ("peft", "peft-patterns", "trl-script", "axolotl"),
    "vera": ("peft", "peft-patterns", "trl-script"),
    "randlora": ("peft", "peft-patterns", "trl-script"),
    "vblora": ("peft", "peft-patterns", "trl-script"),
    # as plain LoRAs
    "mos": ("peft", "peft-patterns"),
    "eigenlorax": ("peft", "peft-patterns"),
    "flora": ("peft", "peft-patterns"),
    # GPT-2's weights are transposed, which most other types of peft do not know; other families are in
    # test_peft_rebuilds_the_network.
    "hira": ("peft", "peft-patterns", "trl-script"),
    "gralora": ("peft", "peft-patterns", "trl-script"),
    "ia3": ("peft", "peft-patterns", "trl-script"),
    "norm": ("peft", "peft-patterns", "trl-script"),
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


def plain_model(recipe: Recipe) -> nn.Module:
    """A model as a user without autopeft loads it."""
    folder = recipe.backbone.id
    if recipe.task == "causal-lm":
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(recipe.labels or ())).eval()


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def trained_params(recipe: Recipe) -> int:
    return recipe.num_adapter_params + recipe.host.num_head_params


def assert_close(one: Tensor | list[Any], other: Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(one), other, rtol=1e-5, atol=1e-5)


def read(fresh: FreshProcess, reader: str, recipe: Recipe, folder: Path, **request: Any) -> Any:
    """Read an export by a reader that knows the task, and the backbone unless the export is a model."""
    if reader != "merged":
        request["base"] = recipe.backbone.id
    ids = token_ids().tolist()
    return fresh.read(reader, folder=folder, task=recipe.task, labels=len(recipe.labels or ()), ids=ids, **request)


# The registry


def test_the_registry_has_the_names_of_the_exporters() -> None:
    assert all(EXPORTERS[name].name == name for name in EXPORTERS)


@pytest.fixture(scope="module")
def of_each_type(models: Folders) -> dict[str, Recipe]:
    """A recipe with one adapter over GPT-2 for each type."""
    sites = load_backbone(str(models["gpt2"]), task="causal-lm").backbone.sites
    found = {}
    for kind, spec in ((kind, make()) for kind, make in ADAPTERS.items()):
        roles = (*spec.default_roles, *spec.roles)  # GPT-2 has no attn.q
        site = next(site.name for role in roles for site in sites if site.role == role and site.layer in (1, None))
        found[kind] = make_recipe("gpt2", models["gpt2"], {site: spec})
    return found


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("target", EXPORTERS)
def test_fit_of_each_type(of_each_type: dict[str, Recipe], kind: str, target: str) -> None:
    recipe = of_each_type[kind]
    ((site, spec),) = recipe.adapters
    fit = EXPORTERS[target].assess(recipe)
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


#: Types that peft knows at plain linears alone, with settings that a file can hold exactly.
AT_PLAIN_LINEARS: dict[str, Callable[[int], AdapterSpec]] = {
    "oft": lambda n: Oft(block_size=4),
    "boft": lambda n: Boft(block_size=4),
    "hra": lambda n: Hra(pairs=2),
    "road": lambda n: Road(variant=4, group_size=4),
    "loha": lambda n: Loha(rank=1 + n % 5, alpha=1.0 + n % 4),
    "lokr": lambda n: Lokr(rank=1, alpha=1.0 + n % 4, factor=4),
    "miss": lambda n: Miss(rank=5),
    "c3a": lambda n: C3a(block_size=(2, 4, 8)[n % 3]),
    "delora": lambda n: Delora(rank=1 + n % 5, strength=1.0 + n % 4),
    "beft": lambda n: Beft(),
}
#: Types that also know transposed weights.
ANYWHERE: dict[str, Callable[[int], AdapterSpec]] = {
    "hira": lambda n: Hira(rank=3),
    "gralora": lambda n: Gralora(rank=2, alpha=6.0),
    "randlora": lambda n: Randlora(rank=6, alpha=12.0),
    "vblora": lambda n: Vblora(rank=2, vectors=6, vector_length=4),
}


def at_linears(family: str, make: Callable[[int], AdapterSpec]) -> dict[str, AdapterSpec]:
    """An adapter at each site of `every_linear`, made of its number."""
    return {name: make(n) for n, name in enumerate(every_linear(family, Lora))}


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
    **{
        f"{kind}-{family}": Case(family, at_linears(family, make))
        for kind, make in AT_PLAIN_LINEARS.items()
        for family in ("bert", "llama")
    },
    **{
        f"{kind}-{family}": Case(family, at_linears(family, make))
        for kind, make in ANYWHERE.items()
        for family in ("bert", "llama", "gpt2")
    },
    "ia3-anywhere": Case("llama", {f"layers.{i}.{role}": Ia3() for i in (1, 11) for role in ("attn.q", "mlp.gate")}),
    "ia3-bert": Case(
        "bert", {f"layers.{i}.{role}": Ia3() for i in (1, 11) for role in ("attn.k", "attn.v", "mlp.down")}
    ),
    "ia3-attention": Case("llama", {"layers.1.attn.k": Ia3(), "layers.11.attn.v": Ia3()}),
    "ia3-gpt2": Case("gpt2", {"layers.1.attn.qkv": Ia3(), "layers.11.mlp.down": Ia3()}),
    "norm-bert": Case("bert", {"embed.norm": Norm(), "layers.1.norm.0": Norm(), "layers.11.norm.1": Norm()}),
    "norm-llama": Case("llama", {"layers.1.norm.0": Norm(), "layers.11.norm.1": Norm(), "norm.final": Norm()}),
}


SERVERS = ("sglang", "vllm", "llama.cpp")
#: LoRA in every family, the rules that mix, and each other type in one family.
QUICK_CASES = (
    *(f"lora-{family}" for family in MODELS),
    *("scale-rules-mixed", "ia3-bert", "norm-llama"),
    *(f"{kind}-llama" for kind in ("dora", "vera", "shira", *ANYWHERE)),
    *(f"{kind}-bert" for kind in AT_PLAIN_LINEARS),
)


@pytest.mark.parametrize("case", mostly_slow_cases(PEFT_CASES, QUICK_CASES))
def test_peft_rebuilds_the_network(models: Folders, tmp_path: Path, fresh: FreshProcess, case: Case) -> None:
    recipe = make_recipe(case.family, models[case.family], case.placement)
    state, wanted = trained(recipe)
    level = APPROXIMATE if case is PEFT_CASES["scale-rules-mixed"] else EXACT
    for target in ("peft", "peft-patterns"):
        fit = EXPORTERS[target].export(recipe, state, tmp_path / target, allow_lossy=True)
        assert fit.level == level, fit
        found = read(fresh, "peft", recipe, tmp_path / target)
        assert_close(found["logits"], wanted)
        assert {path.name for path in (tmp_path / target).iterdir()} >= {
            "adapter_config.json",
            "adapter_model.safetensors",
            "recipe.yaml",
        }
    assert found["trainable"] == trained_params(recipe), "of the form to train on"
    assert trainable(get_peft_model(plain_model(recipe), plan(recipe).build())) == trained_params(recipe)
    # SGLang is for language models here: it needs more modules, which the file of a classifier has not.
    for rule in SERVERS[bool(recipe.head_modules) :] if recipe.adapters.kinds == ("lora",) else ():
        assert_close(read(fresh, "server", recipe, tmp_path / "peft", rule=rule), wanted)


# Servers

MIXED = {
    "layers.0.attn.q": Lora(rank=1, alpha=3.0),
    "layers.1.attn.k": Lora(rank=5, alpha=3.0),
    "layers.2.mlp.up": Lora(rank=9, alpha=3.0),
    "layers.2.attn.o": Lora(rank=2, alpha=3.0),
}


def adapter_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in load_file(folder / "adapter_model.safetensors").items()}


def test_servers_get_one_rank_and_one_scale(models: Folders, tmp_path: Path) -> None:
    recipe = make_recipe("llama", models["llama"], MIXED)
    state, _ = trained(recipe)
    fit = EXPORTERS["peft"].export(recipe, state, tmp_path / "out")
    config = adapter_config(tmp_path / "out")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (16, 16, False)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    shapes = tensor_shapes(tmp_path / "out")
    assert {min(shape) for shape in shapes.values()} <= {16, 8}, "widths of this model are 8 (k, v), 16 and 24"
    assert all(16 in shape for shape in shapes.values())
    stacked = [f"{layer}.self_attn.{name}_proj" for layer, name in ((0, "q"), (0, "v"), (1, "q"), (1, "k"), (1, "v"))]
    own = ("2.self_attn.o_proj", "2.mlp.up_proj", "2.mlp.gate_proj")
    assert set(shapes) == {
        f"base_model.model.model.layers.{name}.lora_{factor}.weight" for name in (*stacked, *own) for factor in "AB"
    }
    written = 4 * sum(prod(shape) for shape in shapes.values())
    (size, rank) = fit.remarks
    assert f" {written:,} bytes in the form for servers (rank 16 everywhere" in size
    assert f" {recipe.adapters.stored_bytes(recipe.host):,} bytes in the form of the training" in size
    assert "--max-lora-rank 16 or more" in rank
    assert all(f"- {line}\n" in (tmp_path / "out" / "README.md").read_text() for line in fit.remarks)


def test_the_patterned_form_is_wrong_in_servers(models: Folders, tmp_path: Path, fresh: FreshProcess) -> None:
    recipe = make_recipe("llama", models["llama"], every_linear("llama", Lora))
    state, wanted = trained(recipe)
    assert EXPORTERS["peft-patterns"].export(recipe, state, tmp_path / "out").remarks == ()
    assert adapter_config(tmp_path / "out")["rank_pattern"]
    found = torch.tensor(read(fresh, "server", recipe, tmp_path / "out", rule="llama.cpp"))
    assert not torch.allclose(found, wanted, atol=1e-3)
    with pytest.raises(AssertionError, match="one rank"):
        read(fresh, "server", recipe, tmp_path / "out", rule="vllm")


@pytest.mark.parametrize(
    ("lora", "written"),
    [
        (Lora(rank=3, alpha=6.0), (3, 6)),
        (Lora(rank=3, alpha=6.0, scaling="rslora"), (8, 8)),
        (Lora(rank=8, alpha=2.5), (8, 2.5)),
    ],
)
def test_what_every_reader_computes_stays(
    models: Folders, tmp_path: Path, fresh: FreshProcess, lora: Lora, written: tuple[int, float]
) -> None:
    recipe = make_recipe("llama", models["llama"], {"layers.1.attn.q": lora, "layers.1.attn.v": lora})
    state, wanted = trained(recipe)
    fit = EXPORTERS["peft"].export(recipe, state, tmp_path / "out")
    config = adapter_config(tmp_path / "out")
    assert (config["r"], config["lora_alpha"]) == written
    assert not config["use_rslora"]
    assert len(fit.remarks) == (1 if written[0] == lora.rank else 2), "the size if zeros were added"
    for rule in SERVERS:
        assert_close(read(fresh, "server", recipe, tmp_path / "out", rule=rule), wanted)


def test_what_servers_refuse_is_said(models: Folders, tmp_path: Path) -> None:
    dora = make_recipe("llama", models["llama"], {"layers.1.attn.q": Dora(), "layers.2.attn.q": Dora(rank=2)})
    (line,) = EXPORTERS["peft"].export(dora, trained(dora)[0], tmp_path / "dora").remarks
    assert line == "vLLM, SGLang and llama.cpp serve plain LoRAs, not dora: export `merged` for them"
    assert adapter_config(tmp_path / "dora")["rank_pattern"], "peft's own form stays"
    head = make_recipe("bert", models["bert"], {"layers.1.attn.q": Lora()})
    (line,) = EXPORTERS["peft"].export(head, trained(head)[0], tmp_path / "head").remarks
    assert "task head" in line


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_peft_rebuilds_rows_of_zeros(tmp_path: Path, fresh: FreshProcess, family: str) -> None:
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
    assert_close(read(fresh, "peft", recipe, tmp_path / "out")["logits"], wanted)


def assert_reloads(
    recipe: Recipe, state: State, wanted: Tensor, folder: Path, fresh: FreshProcess, fresh_own: FreshProcess
) -> None:
    """peft's export in `folder`/out has the logits, and one of our own format has them to the bit."""
    assert_close(read(fresh, "peft", recipe, folder / "out")["logits"], wanted)
    EXPORTERS["native"].export(recipe, state, folder / "native")
    found = fresh_own.read("native", folder=folder / "native", ids=token_ids().tolist())
    assert torch.equal(torch.tensor(found["logits"]), wanted)


@pytest.mark.parametrize(
    ("specs", "reason"),
    [
        ((Oft(block_size=4), Oft(block_size=8)), "block size 8, but peft supports one block size for all, here 4"),
        ((Boft(block_size=4), Boft(block_size=2)), "block size 2, but peft supports one block size for all, here 4"),
        ((Boft(factors=2),), "peft computes 2 factors only where its CUDA extension can be compiled"),
        ((Hra(pairs=1), Hra(pairs=2)), "number of pairs 2, but peft supports one number of pairs for all, here 1"),
        ((Road(), Road(variant=2)), "variant 2, but peft supports one variant for all, here 1"),
        ((Miss(rank=3), Miss(rank=2)), "rank 2, but peft supports one rank for all, here 3"),
        ((Lokr(rank=1), Lokr(rank=1, factor=2)), "factor 2, but peft supports one factor for all, here -1"),
        ((Randlora(rank=4), Randlora(rank=8)), "rank 8, but peft supports one rank for all, here 4"),
        ((Gralora(rank=1), Gralora(rank=2)), "grid and rank 2 x 2, but peft supports one grid and rank for all"),
    ],
)
def test_what_peft_has_once_is_refused_by_name(models: Folders, specs: tuple[AdapterSpec, ...], reason: str) -> None:
    placement = {f"layers.{n}.attn.q": spec for n, spec in enumerate(specs)}
    fit = EXPORTERS["peft"].assess(make_recipe("bert", models["bert"], placement))
    assert fit.level == UNSUPPORTED
    (line,) = fit.lost
    assert line.startswith(f"layers.{len(specs) - 1}.attn.q {specs[0].kind}: {reason}")


def test_peft_has_one_rank_of_hira(models: Folders, tmp_path: Path, fresh: FreshProcess) -> None:
    placement = {f"layers.{n}.attn.q": Hira(rank=rank) for n, rank in enumerate((3, 1, 2))}
    recipe = make_recipe("bert", models["bert"], placement)
    state, wanted = trained(recipe)
    fit = EXPORTERS["peft"].export(recipe, state, tmp_path / "out", allow_lossy=True)
    assert [line.split(",")[0] for line in fit.lost] == [
        "layers.1.attn.q hira: rank 1 becomes 3",
        "layers.2.attn.q hira: rank 2 becomes 3",
    ]
    assert_close(read(fresh, "peft", recipe, tmp_path / "out")["logits"], wanted)


def test_lokr_of_a_large_rank_is_a_whole_matrix_in_peft(models: Folders, tmp_path: Path, fresh: FreshProcess) -> None:
    placement = {f"layers.{n}.attn.q": Lokr(rank=rank) for n, rank in enumerate((1, 2, 3))}
    recipe = make_recipe("bert", models["bert"], placement)
    state, wanted = trained(recipe)
    fit = EXPORTERS["peft"].export(recipe, state, tmp_path / "out", allow_lossy=True)
    assert fit.level == APPROXIMATE
    assert [line.split(" of ")[0] for line in fit.lost] == [
        "layers.1.attn.q lokr: rank 2",
        "layers.2.attn.q lokr: rank 3",
    ]
    assert_close(read(fresh, "peft", recipe, tmp_path / "out")["logits"], wanted)


def test_peft_has_one_rank_of_vera_and_one_key(
    models: Folders, tmp_path: Path, fresh: FreshProcess, fresh_own: FreshProcess
) -> None:
    ranks = {"layers.1.attn.q": Vera(rank=3), "layers.2.mlp.up": Vera(rank=2), "layers.3.mlp.down": Vera(rank=3)}
    recipe = make_recipe("bert", models["bert"], ranks)
    state, wanted = trained(recipe)
    assert not any(name.endswith(("/A", "/B")) for name in state), "they follow from the recipe"
    fit = EXPORTERS["peft-patterns"].export(recipe, state, tmp_path / "out", allow_lossy=True)
    assert fit.lost == ("layers.2.mlp.up vera: rank 2 becomes 3, one for all sites (affects only training)",)
    assert_reloads(recipe, state, wanted, tmp_path, fresh, fresh_own)
    keys = make_recipe("bert", models["bert"], {**ranks, "layers.4.attn.q": Vera(projection_key=1)})
    assert EXPORTERS["peft-patterns"].assess(keys).lost == (
        "layers.1.attn.q vera: peft supports one pair of projections per file, here there are 2",
    )


def test_updates_of_low_rank_leave_as_plain_loras(models: Folders, tmp_path: Path, fresh: FreshProcess) -> None:
    """Side by side, with factors that sites share or that are frozen, and none of them as peft has them."""
    placement = {
        "layers.1.attn.q": Vera(rank=3),
        "layers.1.attn.v": Vera(rank=2, projection_key=1),
        "layers.2.attn.q": Vblora(rank=2, vectors=6, vector_length=4),
        "layers.2.mlp.up": Vblora(rank=3, vectors=5, vector_length=8),
        "layers.3.mlp.up": Mos(rank=3, pool=4, scale=0.5),
        "layers.4.mlp.up": Mos(rank=2, pool=6, private_rank=2),
        "layers.5.attn.q": Eigenlorax(rank=2, components=4),
        "layers.6.attn.q": Flora(rank=3, factors="frozen", scale=2.0),
        "layers.7.attn.q": Flora(rank=2, factors="svd"),
        "layers.8.attn.q": Lora(rank=2, init="pissa"),
    }
    recipe = make_recipe("llama", models["llama"], placement)
    state, wanted = trained(recipe)
    fit = EXPORTERS["peft"].export(recipe, state, tmp_path / "out")
    assert fit.level == EXACT
    assert fit.remarks[0].startswith(
        "eigenlorax, flora, mos, vblora, vera: written as the plain LoRAs that compute the"
    )
    assert adapter_config(tmp_path / "out")["peft_type"] == "LORA"
    assert_close(read(fresh, "peft", recipe, tmp_path / "out")["logits"], wanted)
    for rule in SERVERS:
        assert_close(read(fresh, "server", recipe, tmp_path / "out", rule=rule), wanted)
    with pytest.raises(ExportError, match="one adapter type per file"):
        EXPORTERS["peft-patterns"].export(recipe, state, tmp_path / "patterns")


def test_peft_has_one_rank_of_shira_and_no_scale(
    models: Folders, tmp_path: Path, fresh: FreshProcess, fresh_own: FreshProcess
) -> None:
    placement = {"layers.1.attn.q": Shira(rank=3, scale=0.5), "layers.3.mlp.down": Shira(rank=3)}
    recipe = make_recipe("bert", models["bert"], placement)
    state, wanted = trained(recipe)
    fit = EXPORTERS["peft"].export(recipe, state, tmp_path / "out", allow_lossy=True)
    assert fit.lost == ("layers.1.attn.q shira: scale 0.5 becomes part of the values (affects only training)",)
    assert_reloads(recipe, state, wanted, tmp_path, fresh, fresh_own)
    other = make_recipe("bert", models["bert"], {**placement, "layers.4.attn.q": Shira(rank=2)})
    assert EXPORTERS["peft"].assess(other).lost == (
        "layers.4.attn.q shira: rank 2, but peft supports one rank for all, here 3",
    )


def test_peft_has_the_places_of_sparse_changes_that_it_cannot_train(
    models: Folders, tmp_path: Path, fresh: FreshProcess
) -> None:
    for spec in (Shira(rank=3, places="magnitude"), Spiel(rank=3)):
        recipe = make_recipe("bert", models["bert"], {"layers.1.attn.q": spec, "layers.3.mlp.down": spec})
        state, wanted = trained(recipe)
        fit = EXPORTERS["peft"].export(recipe, state, tmp_path / spec.kind, allow_lossy=True)
        reason = f"{spec.kind}: peft trains random places, which stay (affects only training)"
        assert fit.lost == (f"layers.1.attn.q {reason}", f"layers.3.mlp.down {reason}")
        assert_close(read(fresh, "peft", recipe, tmp_path / spec.kind)["logits"], wanted)


@pytest.mark.parametrize(
    "spec", [Vera(rank=4, projection_key=3), Shira(rank=2), Randlora(rank=4)], ids=lambda spec: spec.kind
)
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


def rebuilt(fresh: FreshProcess, target: str, recipe: Recipe, folder: Path) -> Tensor:
    found = read(fresh, target, recipe, folder)
    return torch.tensor(found["logits"] if target == "peft" else found)


@pytest.mark.parametrize("case", mostly_slow_cases(UNIFORM_CASES, ("gpt2", "shared, scales and plain ones")))
@pytest.mark.parametrize("target", ["peft", "merged"])
def test_experts_without_a_router_are_one_lora(
    models: Folders, tmp_path: Path, fresh: FreshProcess, target: str, case: Case
) -> None:
    recipe = make_recipe(case.family, models[case.family], case.placement)
    state, wanted = trained(recipe)
    assert EXPORTERS[target].export(recipe, state, tmp_path / "out") == Assessment("exact")
    assert_close(rebuilt(fresh, target, recipe, tmp_path / "out"), wanted)
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


@pytest.mark.parametrize("router", mostly_slow(ROUTED, "token", "task", "soft"))
@pytest.mark.parametrize("target", ["peft", slow("merged")])
def test_routed_experts_are_one_lora_without_the_routing(
    models: Folders, tmp_path: Path, fresh: FreshProcess, target: str, router: str
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
    found = rebuilt(fresh, target, recipe, tmp_path / "out")
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


@pytest.mark.parametrize("family", mostly_slow(MODELS, "llama", "gpt2", "bert"))
def test_native_rebuilds_mixtures(models: Folders, tmp_path: Path, fresh_own: FreshProcess, family: str) -> None:
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
    found = fresh_own.read("native", folder=tmp_path / "out", ids=token_ids().tolist())
    assert_close(found["logits"], wanted)
    assert found["names"] == sorted(state)
    attachment = native.load(tmp_path / "out")[1]
    assert attachment.num_adapter_params() == recipe.num_adapter_params


@pytest.mark.parametrize("router", ROUTED)
def test_native_rebuilds_routers(models: Folders, tmp_path: Path, fresh_own: FreshProcess, router: str) -> None:
    recipe = make_recipe("bert", models["bert"], routed(router, shared_experts=int(router not in ("soft", "poly"))))
    found = {}
    for domain in (0, 3):
        state, wanted = trained(recipe, domain=domain)
        EXPORTERS["native"].export(recipe, state, tmp_path / "out", force=True)
        request = {"folder": tmp_path / "out", "ids": token_ids().tolist()}
        if router in BY_TASK:
            with pytest.raises(AssertionError, match=r"ValueError: .*domain"):
                fresh_own.read("native", **request)
            request["domain"] = domain
        found[domain] = torch.tensor(fresh_own.read("native", **request)["logits"])
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
    **{f"dense-{family}": Case(family, at_linears(family, lambda n: Dense())) for family in ("bert", "llama", "gpt2")},
    "head-alone": Case("roberta", {}),
}


@pytest.mark.parametrize(
    "case",
    mostly_slow_cases(MERGED_CASES, MERGED_CASES.keys() - {f"dora-{family}" for family in MODELS if family != "llama"}),
)
def test_merged_is_a_plain_model(models: Folders, tmp_path: Path, fresh: FreshProcess, case: Case) -> None:
    recipe = make_recipe(case.family, models[case.family], case.placement)
    state, wanted = trained(recipe)
    assert EXPORTERS["merged"].export(recipe, state, tmp_path / "out") == Assessment("exact")
    assert_close(read(fresh, "merged", recipe, tmp_path / "out"), wanted)
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


SCRIPT_CASES = {
    name: case for name, case in PEFT_CASES.items() if name not in {f"{kind}-llama" for kind in AT_PLAIN_LINEARS}
}


@pytest.mark.parametrize("case", mostly_slow_cases(SCRIPT_CASES, QUICK_CASES))
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


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_classification_script_runs(models: Folders, tmp_path: Path, fresh: FreshProcess, family: str) -> None:
    recipe = make_recipe(family, models[family], every_linear(family, Lora, dropout=0.1))
    fit = EXPORTERS["trl-script"].export(recipe, None, tmp_path / "out")
    assert "whoever gets this folder gets these rows" in fit.remarks[0]
    assert fit.remarks[0] in (tmp_path / "out" / "README.md").read_text()
    printed = fresh.read("script", folder=tmp_path / "out", output=tmp_path / "trained", steps=2)
    assert "eval_accuracy" in printed
    found = read(fresh, "peft", recipe, tmp_path / "trained")
    assert torch.tensor(found["logits"]).isfinite().all()
    assert found["trainable"] == trained_params(recipe)


LABEL_FILES = {
    "floats": (".jsonl", [1.0, 0.0], ("0", "1")),
    "whole numbers": (".jsonl", [10, 9], ("9", "10")),
    "not available": (".csv", ["NA", "ok"], ("NA", "ok")),
    "numbers in CSV": (".csv", ["01", "1.0"], ("01", "1.0")),
    "dates": (".jsonl", ["2020-01-01", "2021-01-01"], ("2020-01-01", "2021-01-01")),
    "an array": (".json", [True, False], ("False", "True")),
}


@pytest.mark.parametrize("case", LABEL_FILES)
def test_the_script_reads_the_labels_of_the_study(
    models: Folders, tmp_path: Path, fresh: FreshProcess, case: str
) -> None:
    suffix, values, labels = LABEL_FILES[case]
    rows = [{"text": f"w{i} w3", "label": values[i % 2]} for i in range(6)]
    for split in SPLITS:
        path = tmp_path / f"{split}{suffix}"
        if suffix == ".csv":
            lines = ["text,label", *(f"{row['text']} {split},{row['label']}" for row in rows)]
            path.write_text("".join(f"{line}\n" for line in lines))
        elif suffix == ".json":
            path.write_text(json.dumps(rows))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {split: f"{split}{suffix}" for split in SPLITS}
    data = RecipeData(source="files", folder=str(tmp_path), max_length=8, max_train_rows=4, **files)
    bert = make_recipe("bert", models["bert"], {"layers.1.attn.q": Lora()})
    recipe = make_recipe("bert", models["bert"], {"layers.1.attn.q": Lora()}, data=data, labels=labels)
    assert bert.labels != labels
    EXPORTERS["trl-script"].export(recipe, None, tmp_path / "out")
    splits = load_splits(data.for_loading(), "classification")
    for split in ("train", "validation"):
        written = [json.loads(line) for line in (tmp_path / "out" / f"{split}.jsonl").read_text().splitlines()]
        assert written == getattr(splits, split)
        assert {row["label"] for row in written} == set(labels)
    assert len(splits.train) == 4
    assert "eval_accuracy" in fresh.read("script", folder=tmp_path / "out", output=tmp_path / "trained", steps=1)


def test_rows_that_have_changed_are_refused(models: Folders, tmp_path: Path) -> None:
    recipe = make_recipe("bert", models["bert"], {"layers.1.attn.q": Lora()})
    other = recipe.model_copy(update={"labels": ("a", "b", "c")})
    with pytest.raises(ExportError, match="the data has changed"):
        EXPORTERS["trl-script"].export(other, None, tmp_path / "out")
    gone = recipe.model_copy(update={"data": recipe.data.model_copy(update={"folder": str(tmp_path / "gone")})})
    with pytest.raises(ExportError, match="no such file"):
        EXPORTERS["trl-script"].export(gone, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


LONG = "w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12"
CAUSAL_ROWS = {
    "prompts": [{"prompt": LONG, "completion": " w20"}, {"prompt": "w1", "completion": " w2 w3"}],
    "texts": [{"text": LONG}, {"text": "w1 w2"}],
    "chats": [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "w20 w21"}]}
        for text in (LONG, "w1")
    ],
}
CHAT = "{% for m in messages %}{{ m['content'] }} [EOS] {% endfor %}"


@pytest.mark.parametrize("form", CAUSAL_ROWS)
@pytest.mark.parametrize("target", ["trl-script", "axolotl"])
def test_language_models_train_on_the_tokens_of_the_study(tmp_path: Path, form: str, target: str) -> None:
    folder = save_model("llama", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    recipe = make_recipe("llama", folder, {"layers.1.attn.q": Lora()})
    for split in SPLITS:
        rows = [json.dumps(row) for row in CAUSAL_ROWS[form]]
        (tmp_path / f"{split}.jsonl").write_text("".join(f"{row}\n" for row in rows))
    EXPORTERS[target].export(recipe, None, tmp_path / "out")
    written = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    task = TASKS["causal-lm"](tokenizer, recipe.data.max_length, None)
    examples = task.encode(load_splits(recipe.data.for_loading(), "causal-lm").train)
    assert [row["labels"] for row in written] == [example["labels"] for example in examples]
    assert len(written[0]["input_ids"]) == 8, "cut to max_length"
    assert form == "texts" or written[0]["labels"][-2] == tokenizer("w20 w21")["input_ids"][form == "chats"]
    batch = DataCollatorForSeq2Seq(tokenizer)(written)
    ours = task.collate(examples)
    assert torch.equal(batch["labels"], ours["targets"])
    assert torch.equal(batch["input_ids"], ours["input_ids"])
    assert torch.equal(batch["attention_mask"], ours["attention_mask"])


@pytest.mark.parametrize("family", [family for family in MODELS if family not in CLASSIFIERS])
def test_the_script_of_a_language_model_runs(models: Folders, tmp_path: Path, fresh: FreshProcess, family: str) -> None:
    recipe = make_recipe(family, models[family], every_linear(family, Lora))
    EXPORTERS["trl-script"].export(recipe, None, tmp_path / "out")
    assert "eval_loss" in fresh.read("script", folder=tmp_path / "out", output=tmp_path / "trained", steps=1)
    found = read(fresh, "peft", recipe, tmp_path / "trained")
    assert torch.tensor(found["logits"]).isfinite().all()
    assert found["trainable"] == trained_params(recipe)


@pytest.mark.parametrize("source", ["embedded", "embedded-domains"])
def test_script_of_the_embedded_model_names_no_folder(models: Folders, tmp_path: Path, source: str) -> None:
    recipe = make_recipe("bert", models["bert"], {"layers.1.attn.q": Lora()})
    embedded = recipe.model_copy(
        update={
            "backbone": recipe.backbone.model_copy(update={"id": "embedded"}),
            "data": type(recipe.data)(source=source),
            "labels": load_splits(RecipeData(source=source).for_loading(), "classification").labels,
        }
    )
    EXPORTERS["trl-script"].export(embedded, None, tmp_path / "out")
    text = (tmp_path / "out" / "train.py").read_text()
    assert os.sep + "site-packages" not in text
    settings = runpy.run_path(str(tmp_path / "out" / "train.py"))
    assert (Path(settings["MODEL"]) / "config.json").is_file()


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
    assert found["datasets"] == [{"path": "train.jsonl", "ds_type": "json", "split": "train", "type": None}]
    assert found["test_datasets"][0]["path"] == "validation.jsonl"
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
    files = {"README.md", "recipe.yaml", "train.jsonl", "train.py", "validation.jsonl"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
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
        for target in ("native", "peft", "peft-patterns", "merged"):
            with pytest.raises(ExportError, match=message):
                EXPORTERS[target].export(simple, tensors, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_backbone_that_is_gone_is_the_users_error(simple: Recipe, tmp_path: Path) -> None:
    gone = simple.model_copy(update={"backbone": simple.backbone.model_copy(update={"id": str(tmp_path / "gone")})})
    with pytest.raises(ExportError, match="no such folder"):
        EXPORTERS["peft"].export(gone, trained(simple)[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


# Learning rates


RATES: dict[str, dict[str, Any]] = {
    "LoRA+": {"rate_ratio": 16.0},
    "LoRA-FA": {"freeze_a": True, "rate": 0.5},
    "by site": {"rate_ratio": 4.0, "rate": 2.0},
}


def with_rates(family: str, fields: dict[str, Any], every: bool) -> dict[str, Lora]:
    names = ["layers.1.attn.q", "layers.11.attn.q", "layers.1.attn.v"]
    return {name: Lora(**(fields if every or name == names[0] else {})) for name in names}


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("name", RATES)
def test_the_script_has_the_learning_rates(models: Folders, tmp_path: Path, family: str, name: str) -> None:
    """Its optimiser has each parameter of the study at its rate and weight decay, and no other."""
    placement = with_rates(family, RATES[name], every=name != "by site")
    recipe = make_recipe(family, models[family], placement, {"weight_decay": 0.1})
    assert EXPORTERS["trl-script"].assess(recipe).level == EXACT
    EXPORTERS["trl-script"].export(recipe, None, tmp_path / "out")
    script = runpy.run_path(str(tmp_path / "out" / "train.py"))
    arguments = () if family == "llama" else (script["load_tokenizer"](),)
    model = script["load_model"](*arguments)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in script["optimizer_for"](model).param_groups
        for parameter in group["params"]
    }
    expected = {}
    for site, spec in recipe.adapters:
        assert isinstance(spec, Lora)
        module = f"base_model.model.{recipe.sites[site].module}"
        expected[f"{module}.lora_B.default.weight"] = (1e-5 * spec.rate * spec.rate_ratio, 0.1)
        if not spec.freeze_a:
            expected[f"{module}.lora_A.default.weight"] = (1e-5 * spec.rate, 0.1)
    heads = {key: value for key, value in found.items() if key not in expected}
    assert all(found[key] == pytest.approx(expected[key]) for key in expected)
    assert sum(parameter.numel() for parameter in names if names[parameter] in heads) == recipe.host.num_head_params
    assert all(value == (1e-5, 0.0 if key.endswith("bias") else 0.1) for key, value in heads.items())


@pytest.mark.parametrize("spec", [Ia3(rate=2.0), Boft(rate=2.0), Beft(rate=2.0), Road(rate=2.0), Dora(rate=2.0)])
def test_the_script_with_a_learning_rate_decays_no_vector(models: Folders, tmp_path: Path, spec: AdapterSpec) -> None:
    """Some vectors have two dimensions in peft."""
    name = "layers.1.attn.v"
    recipe = make_recipe("bert", models["bert"], {name: spec}, {"weight_decay": 0.1})
    assert EXPORTERS["trl-script"].assess(recipe).level == EXACT
    EXPORTERS["trl-script"].export(recipe, None, tmp_path / "out")
    script = runpy.run_path(str(tmp_path / "out" / "train.py"))
    model = script["load_model"](script["load_tokenizer"]())
    names = {parameter: key for key, parameter in model.named_parameters()}
    found: dict[float, int] = {}
    for group in script["optimizer_for"](model).param_groups:
        own = [p for p in group["params"] if f".{recipe.sites[name].module}." in names[p]]
        assert not own or group["lr"] == pytest.approx(2e-5)
        found[group["weight_decay"]] = found.get(group["weight_decay"], 0) + sum(p.numel() for p in own)
    for decay in (True, False):
        declared = [p for p in spec.parameters(recipe.sites[name]).values() if p.decay == decay]
        assert found.get(0.1 * decay, 0) == sum(p.count for p in declared)


def test_beft_is_a_bias_that_trainers_do_not_decay(models: Folders) -> None:
    recipe = make_recipe("bert", models["bert"], {"layers.1.attn.v": Beft()}, {"weight_decay": 0.1})
    assert EXPORTERS["trl-script"].assess(recipe).level == EXACT
    wrapped = get_peft_model(plain_model(recipe), plan(recipe).build())
    decayed = Trainer.get_decay_parameter_names(None, wrapped)
    assert not [name for name in decayed if "beft" in name]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_script_with_learning_rates_runs(models: Folders, tmp_path: Path, fresh: FreshProcess, family: str) -> None:
    placement = with_rates(family, {"rate_ratio": 4.0, "freeze_a": True}, every=True)
    recipe = make_recipe(family, models[family], placement)
    EXPORTERS["trl-script"].export(recipe, None, tmp_path / "out")
    assert "eval_loss" in fresh.read("script", folder=tmp_path / "out", output=tmp_path / "trained", steps=1)


def test_a_plain_script_has_no_learning_rates(models: Folders, tmp_path: Path) -> None:
    recipe = make_recipe("llama", models["llama"], {"layers.1.attn.q": Lora()})
    EXPORTERS["trl-script"].export(recipe, None, tmp_path / "out")
    text = (tmp_path / "out" / "train.py").read_text()
    assert "RATES" not in text
    assert "FROZEN" not in text


def test_axolotl_has_one_ratio_and_trains_a(models: Folders) -> None:
    def assessed(fields: dict[str, Any], every: bool, **training: Any) -> tuple[str, list[str], dict[str, Any]]:
        recipe = make_recipe("llama", models["llama"], with_rates("llama", fields, every), training)
        fit = EXPORTERS["axolotl"].assess(recipe)
        return fit.level, list(fit.lost), axolotl_target.settings(recipe)

    level, _, settings = assessed({"rate_ratio": 16.0, "rate": 0.5}, every=True)
    assert (level, settings["loraplus_lr_ratio"], settings["learning_rate"]) == (EXACT, 16.0, 5e-6)
    level, lost, _ = assessed({"rate_ratio": 16.0}, every=True, weight_decay=0.1)
    assert (level, [line.split(":")[0] for line in lost]) == (APPROXIMATE, ["weight_decay 0.1"])
    level, lost, _ = assessed({"rate_ratio": 16.0}, every=False)
    assert (level, len(lost)) == (APPROXIMATE, 2)
    level, lost, _ = assessed({"freeze_a": True}, every=True)
    assert (level, len(lost)) == (APPROXIMATE, 3)
    assert all("freeze_a" in line for line in lost)
    recipe = make_recipe("llama", models["llama"], {"layers.1.attn.q": Dora(rate=2.0)}, {"weight_decay": 0.1})
    assert "also applies to its magnitude" in EXPORTERS["axolotl"].assess(recipe).lost[0]


def test_peft_has_weights_whatever_trained_them(models: Folders) -> None:
    recipe = make_recipe("bert", models["bert"], with_rates("bert", {"rate_ratio": 4.0, "freeze_a": True}, every=True))
    assert EXPORTERS["peft"].assess(recipe).level == EXACT


# Initial values from the site


@pytest.mark.parametrize("family", ["llama", slow("bert"), slow("gpt2")])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_offset_is_a_plain_lora_of_twice_the_rank(
    models: Folders, tmp_path: Path, fresh: FreshProcess, family: str, init: str
) -> None:
    """Trained adapters are exact in peft and, with one rank and scale, in servers; native and merged too."""
    attention = "attn.qkv" if family == "gpt2" else "attn.q"
    placement = {
        f"layers.1.{attention}": Lora(rank=3, alpha=5.0, init=init, dropout=0.1),
        f"layers.11.{attention}": Lora(rank=2, scaling="rslora", init=init, dropout=0.1),
        "layers.2.mlp.up": Lora(rank=2, dropout=0.1),
    }
    recipe = make_recipe(family, models[family], placement)
    state, wanted = trained(recipe)
    for target in ("peft", "peft-patterns"):
        assert EXPORTERS[target].export(recipe, state, tmp_path / target).level == EXACT
        assert_close(read(fresh, "peft", recipe, tmp_path / target)["logits"], wanted)
        assert adapter_config(tmp_path / target)["init_lora_weights"] is True
    assert max(tensor_shapes(tmp_path / "peft-patterns").values())  # it has tensors
    for rule in SERVERS[bool(recipe.head_modules) :]:
        assert_close(read(fresh, "server", recipe, tmp_path / "peft", rule=rule), wanted)
    EXPORTERS["merged"].export(recipe, state, tmp_path / "merged")
    assert_close(read(fresh, "merged", recipe, tmp_path / "merged"), wanted)
    missing = {name: value for name, value in state.items() if not name.endswith("B0")}
    with pytest.raises(ExportError, match="B0: is missing"):
        EXPORTERS["peft"].export(recipe, missing, tmp_path / "missing")


def test_peft_starts_like_the_study_where_it_can(models: Folders, tmp_path: Path) -> None:
    def fit(family: str, init: str, **changes: Any) -> tuple[str, Any]:
        site = "layers.1.attn.qkv" if family == "gpt2" else "layers.1.attn.q"
        recipe = make_recipe(family, models[family], {site: Lora(init=init, rank=2)})
        backbone = recipe.backbone.model_copy(update=changes)
        assessed = plan(recipe.model_copy(update={"backbone": backbone}))
        return assessed.fit.level, assessed.arguments["init_lora_weights"]

    assert fit("llama", "pissa") == (EXACT, "pissa")
    assert fit("llama", "olora") == (EXACT, "olora")
    assert fit("gpt2", "pissa") == (EXACT, "pissa")
    assert fit("llama", "pissa_niter_4") == (APPROXIMATE, "pissa")
    assert fit("gpt2", "olora") == (APPROXIMATE, True)
    assert fit("llama", "pissa", quantization="nf4") == (APPROXIMATE, True)
    recipe = make_recipe("llama", models["llama"], {"layers.1.attn.q": Lora(init="pissa", rank=2)})
    remarks = EXPORTERS["trl-script"].export(recipe, None, tmp_path / "out").remarks
    assert any("path_initial_model_for_weight_conversion" in line for line in remarks)
