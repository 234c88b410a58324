"""X-LoRA: gates from a first pass through the bare model, written out token by token, and peft's own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from peft.tuners import lora
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.backbones import LoadedBackbone
from autopeft.evaluators.training.activations import ActivationCache
from autopeft.search_space import AdapterChoice, Architecture, Choice, SearchSpace, SpaceError
from autopeft.search_space.adapters import Bottleneck, Lora, Mixture, Prefix
from autopeft.search_space.backbones.backbone import Backbone, Site
from autopeft.search_space.problem import declared_costs
from autopeft.search_space.runtime.bank import Bank
from autopeft.searchers.bo.encoding import Encoding
from autopeft.studies.config.loading import load_study
from autopeft.studies.exporters import EXPORTERS, Assessment
from autopeft.studies.recipes.recipe import Recipe
from autopeft.testing.models import FAMILIES, tiny, tokens

from ...search_space.adapters.test_given import given_study, lora_in, mixture_of, placed
from ...studies.engine.test_study import run
from ...support.conformance import descend
from ...support.exported import CLASSIFIERS, make_recipe, save_model, token_ids, trained
from ...support.exported import logits as logits_of
from ...support.fresh import FreshProcess
from ..training.test_packed import alone, compare, loaded, requests, together  # noqa: F401  (a fixture)

torch.set_num_threads(1)

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
#: A linear of every family that LoRAs can be given for, and its role.
LINEARS = {
    "bert": ("query", "attn.q"),
    "llama": ("q_proj", "attn.q"),
    "llama-causal": ("q_proj", "attn.q"),
    "gemma": ("q_proj", "attn.q"),
}


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path)


class Library:
    """LoRAs of the tiny models, saved by peft."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, family: str, modules: Sequence[str] = (), count: int = 2) -> Mixture:
        """LoRAs of ranks 2, 3, ... for some linears (default: that of `LINEARS`), with the router between them."""
        paths = [self.folder / family / str(e) for e in range(count)]
        for e, path in enumerate(paths):
            model, _ = tiny(family)
            lora_in(path, model, e, list(modules or LINEARS[family][:1]), r=2 + e, lora_alpha=3)
        return mixture_of(paths, router="xlora").canonical()


def at(backbone: Backbone, spec: Mixture, family: str) -> Architecture:
    return placed(backbone, spec, LINEARS[family][1:])


def moved(attachment: Attachment) -> dict[str, Tensor]:
    """The state of the first slot with routers away from those of the start."""
    generator = torch.Generator().manual_seed(1)
    state = attachment.state()
    for name, value in state.items():
        if "/router" in name:
            value.add_(torch.randn(value.shape, generator=generator))
    attachment.load_state(state)
    return state


@contextmanager
def first_passes(attachment: Attachment) -> Iterator[list[int]]:
    """Rows of each first pass."""
    bare = attachment.routers.bare
    seen: list[int] = []
    if bare is None:
        yield seen
        return
    handle = bare.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(_rows(args, kwargs)), with_kwargs=True
    )
    yield seen
    handle.remove()


def _rows(args: tuple, kwargs: dict[str, Any]) -> int:
    return len(args[0] if args else kwargs["input_ids"])


# The formula


def test_gates_are_those_of_every_token_one_by_one() -> None:
    texts, length, width, out, hidden, experts = 3, 4, 6, 5, 7, 4
    site = Site(
        name="q", layer=0, role="attn.q", module="q", in_features=width, out_features=out, input_module="q", bias=True,
        hidden_size=hidden,
    )  # fmt: skip
    spec = Mixture(
        expert=Lora(rank=2, alpha=3.0), experts=experts, given=tuple(map(str, range(experts))), router="xlora"
    )
    bank = Bank(site, [spec, spec], nn.Linear(width, out), [0, 1], draw=False).double().eval()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for value in bank.values.values():
        value.data = random(*value.shape)
        value.requires_grad_()
    states = random(texts, length, hidden)
    mask = torch.ones(texts, length, dtype=torch.bool)
    mask[1, 2:] = False
    assert bank.router is not None
    bank.router.tokens.begin(length, mask, lambda: states)
    x = random(2, texts * length, width).requires_grad_()
    y = random(2, texts * length, out).requires_grad_()

    found = bank(x, y)
    expected = []
    for k in range(2):
        p = bank.of_slot(k)
        for m in range(texts * length):
            token = states[m // length, m % length]
            weights = [(p["router"][e] @ token + p["router_bias"][e]).exp() for e in range(experts)]
            added = y[k, m]
            for e in range(experts):
                added = added + weights[e] / sum(weights) * 1.5 * p["B"][e] @ (p["A"][e] @ x[k, m])
            expected.append(added)
    reference = torch.stack(expected).view_as(found)
    torch.testing.assert_close(found, reference)

    wanted = [x, y, *bank.values.values()]
    weight = random(*found.shape)
    for one, two in zip(
        *(torch.autograd.grad((result * weight).sum(), wanted) for result in (found, reference)), strict=True
    ):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_first_pass_ends_in_the_last_hidden_states(family: str) -> None:
    model, backbone = tiny(family)
    site = next(site for site in backbone.sites if site.role in ("attn.q", "attn.qkv"))
    spec = Mixture(experts=2, given=("a", "b"), router="xlora")
    with torch.no_grad():
        expected = model(tokens(), attention_mask=MASK, output_hidden_states=True).hidden_states[-1]
    with Attachment(model, backbone, [Architecture.of({site.name: [spec]})] * 2, [0, 1], draw=False) as attachment:
        for value in attachment.banks[0].values.values():
            nn.init.normal_(value)
        model(tokens().repeat(2, 1), attention_mask=MASK.repeat(2, 1))
        assert torch.equal(attachment.routers.tokens.hidden_states(), expected)


# Against peft


@pytest.mark.parametrize(
    ("family", "modules", "roles"),
    [
        ("llama-causal", ["q_proj", "down_proj"], ("attn.q", "mlp.down")),
        ("gemma", ["o_proj", "gate_proj"], ("attn.o", "mlp.gate")),
        ("llama", ["k_proj", "v_proj"], ("attn.k", "attn.v")),
    ],
)
def test_logits_and_gradients_are_those_of_peft(
    library: Library, family: str, modules: list[str], roles: tuple[str, ...]
) -> None:
    spec = library.of(family, modules, count=3)
    model, backbone = tiny(family)
    architecture = placed(backbone, spec, roles)
    with Attachment(model, backbone, [architecture], [0], pretrained_head=True) as attachment:
        state = moved(attachment)
        ours = model(tokens(), attention_mask=MASK).logits
        attachment.routers.penalised(ours.square().mean()[None]).sum().backward()
        gradients = {
            f"{bank.site.module} {name}": bank.values[name].grad[0]
            for bank in attachment.banks
            for name in ("router", "router_bias")
            if bank.site.role != "head"
        }
        ours = ours.detach()

    model.config.use_cache = False
    adapters = dict(zip("012", spec.given, strict=True))
    config = XLoraConfig(hidden_size=24, adapters=adapters, xlora_depth=1, layerwise_scalings=True)
    wrapped = get_peft_model(model, config).eval()
    order = [name for name, module in wrapped.get_base_model().named_modules() if isinstance(module, lora.Linear)]
    site_of = {backbone.site(name).module: name for name, _ in architecture}
    classifier = wrapped.base_model.internal_xlora_classifier.layers[0]
    with torch.no_grad():
        classifier.weight.copy_(torch.cat([state[f"{site_of[path]}/mixture/router"] for path in order]))
        classifier.bias.copy_(torch.cat([state[f"{site_of[path]}/mixture/router_bias"] for path in order]))
    theirs = wrapped(input_ids=tokens(), attention_mask=MASK).logits
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-5, rtol=1e-5)
    theirs.square().mean().backward()
    for name in ("router", "router_bias"):
        wanted = classifier.weight.grad if name == "router" else classifier.bias.grad
        found = torch.cat([gradients[f"{path} {name}"] for path in order])
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


# In a pack


@pytest.mark.parametrize("family", LINEARS)
def test_a_slot_alone_equals_the_slot_in_a_pack(library: Library, family: str) -> None:
    """Beside candidates of other kinds, which do not notice, and with one first pass for all."""
    spec = library.of(family)
    model, backbone = tiny(family)
    made = [
        at(backbone, spec, family),
        Architecture.of({site.name: [Lora(rank=2)] for site in backbone.sites if site.role == "mlp.up"}),
        Architecture.of({site.name: [Prefix(length=3)] for site in backbone.sites if site.role == "attn"}),
        at(backbone, spec, family),
        at(backbone, replace(spec, router="token"), family),
        Architecture.of({**dict(at(backbone, spec, family).adapters), "layers.1.mlp": [Bottleneck(size=3)]}),
    ]

    def steps(architectures: list[Architecture], seeds: list[int], asks: bool) -> list[dict[str, Tensor]]:
        slots = len(architectures)
        with Attachment(model, backbone, architectures, seeds) as attachment:
            for number in range(3):
                ids = tokens(seed=number).repeat(slots, 1)
                with first_passes(attachment) as seen:
                    logits = model(ids, attention_mask=MASK.repeat(slots, 1)).logits
                assert seen == ([3] if asks else [])
                attachment.routers.penalised(logits.square().view(slots, -1).mean(1)).sum().backward()
                descend(attachment)
            return [attachment.state(k) for k in range(slots)]

    together_ = steps(made, list(range(len(made))), True)
    for k, architecture in enumerate(made):
        (single,) = steps([architecture], [k], k in (0, 3, 5))
        for name, value in single.items():
            torch.testing.assert_close(
                together_[k][name], value, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_an_attachment_leaves_the_model_as_it_was(library: Library) -> None:
    spec = library.of("bert")
    model, backbone = tiny("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(tokens()).logits
        with Attachment(model, backbone, [at(backbone, spec, "bert")], [0]) as attachment:
            attachment.eval()
            assert not torch.equal(model(tokens()).logits, expected)
        assert torch.equal(model(tokens()).logits, expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_whoever_averages_needs_no_first_pass(library: Library) -> None:
    spec = library.of("bert")
    model, backbone = tiny("bert")
    with Attachment(model, backbone, [at(backbone, spec, "bert")], [0]) as attachment, torch.no_grad():
        attachment.eval()
        moved(attachment)
        with first_passes(attachment) as seen, attachment.routers.averaged():
            averaged = model(tokens()).logits
        assert seen == []
    uniform = replace(spec, router="uniform").canonical()
    with Attachment(model, backbone, [at(backbone, uniform, "bert")], [0]) as attachment, torch.no_grad():
        assert attachment.routers.bare is None
        torch.testing.assert_close(model(tokens()).logits, averaged)


def test_nothing_is_merged_beside_it(library: Library) -> None:
    """What is folded into the weights would be in the first pass too."""
    spec = library.of("bert")
    model, backbone = tiny("bert")
    plain = {site.name: [Lora(rank=2, init="gaussian")] for site in backbone.sites if site.role == "mlp.up"}
    architecture = Architecture.of({**dict(at(backbone, spec, "bert").adapters), **plain})
    with Attachment(model, backbone, [architecture], [0]) as attachment, torch.no_grad():
        attachment.eval()
        attachment.load_state({name: value + 0.1 for name, value in attachment.state().items()})
        expected = model(tokens()).logits
        with attachment.merged():
            torch.testing.assert_close(model(tokens()).logits, expected)


def test_a_text_is_generated_without_a_cache(library: Library) -> None:
    spec = library.of("llama-causal")
    model, backbone = tiny("llama-causal")
    with Attachment(model, backbone, [at(backbone, spec, "llama-causal")], [0]) as attachment, torch.no_grad():
        attachment.eval()
        moved(attachment)
        ids = tokens(1)
        found = model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False)
        for _ in range(3):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(found, ids)
        with pytest.raises(ValueError, match="use_cache=False"):
            model.generate(tokens(1), max_new_tokens=2, do_sample=False, use_cache=True)


# In the evaluators


@pytest.mark.slow
def test_packs_are_what_each_is_alone(loaded: LoadedBackbone, tmp_path: Path) -> None:  # noqa: F811
    """Also where the lower layers are replaced by what is known of them."""
    causal = loaded.backbone.family == "llama"
    paths = [tmp_path / str(e) for e in range(2)]
    for e, path in enumerate(paths):
        torch.manual_seed(e)
        config = LoraConfig(r=2 + e, target_modules=["q_proj" if causal else "query"], init_lora_weights=False)
        adapted = get_peft_model(loaded.model, config)
        adapted.save_pretrained(str(path))
        adapted.unload()
    spec = mixture_of(paths, router="xlora").canonical()
    upper = [s.name for s in loaded.backbone.sites if s.role == "attn.q" and s.layer is not None and s.layer > 1]
    made = [
        placed(loaded.backbone, spec, ("attn.q",)),
        Architecture.of({name: [spec] for name in upper}),
        Architecture.of({name: [Lora(rank=2)] for name in upper}),
    ]
    wanted = requests(made)
    expected = alone(loaded).evaluate(wanted)
    for settings in (
        {"share_lower_layers": False},
        {"pack": 1},
        {"cache": ActivationCache(10**7)},
        {"mixes_depths": False},
    ):
        compare(together(loaded, **settings).evaluate(wanted), expected)


@pytest.mark.slow
def test_a_study_with_a_first_pass(tmp_path: Path) -> None:
    snapshot = run(load_study(given_study(tmp_path / "study", router="xlora", top_k=2, dropout=[0.0, 0.1])))
    for trial in snapshot.search_trials:
        assert trial.state == "complete"
        sites = [name for name, spec in trial.candidate.architecture if spec.first_pass]
        assert len(sites) == len(trial.candidate.architecture.adapters) > 0
        assert trial.values["num_params"] == 2 * (snapshot.backbone.hidden_size + 1) * len(sites)


# What it costs


@pytest.mark.parametrize("family", ["bert", "llama-causal"])
def test_costs_equal_counters(library: Library, family: str) -> None:
    spec = library.of(family)
    model, backbone = tiny(family)
    model.set_attn_implementation("eager")  # the counter does not know the CPU's fused attention
    architecture = at(backbone, spec, family)
    sites = [backbone.site(name) for name, _ in architecture]
    assert architecture.num_params(backbone) == len(sites) * 2 * (backbone.hidden_size + 1)
    assert spec.num_active == 2

    def count(length: int) -> tuple[int, int]:
        """Operations in all, and those of them that grow with the square of a text."""
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(tokens(2, length))
        return counter.get_total_flops(), counter.get_flop_counts()["Global"][torch.ops.aten.bmm]

    bare = {length: count(length) for length in (5, 9)}
    with Attachment(model, backbone, [architecture], [1]) as attachment:
        attachment.eval()
        assert attachment.num_adapter_params() == architecture.num_params(backbone)
        model(tokens(2, 5))  # imports the kernels: a counter knows the formulas that were registered before it
        # The slope over tokens: work per example (BERT's pooler) falls out.
        five, nine = (count(length)[0] - sum(bare[length]) for length in (5, 9))
    assert nine - five == architecture.flops_per_token(backbone) * 2 * (9 - 5)
    own = sum(spec.flops_per_token(site) for site in sites)
    assert architecture.flops_per_token(backbone) == backbone.flops_per_token + own


def test_costs_of_a_space_by_its_encoding() -> None:
    """A first pass counts once, however many sites read it."""
    _, backbone = tiny("bert")
    own = {"rank": 3, "experts": 2, "router": Choice.of(["arrow", "xlora"])}
    choice = AdapterChoice(kind="lora", placement="site", fields=own, vary={"router": "layer"}, given=("a", "b"))
    space = SearchSpace(backbone=backbone, adapters={"library": choice})
    encoding = Encoding(space)
    rng = Random(1)
    genes = [space.sample(rng) for _ in range(40)]
    rows, active = (np.array(column) for column in zip(*(space.encode(own) for own in genes), strict=True))
    found = encoding.costs(rows, active)
    for n, own in enumerate(genes):
        expected = declared_costs(space.decode(own).architecture, backbone)
        assert {name: found[name][n] for name in expected} == expected
    assert len({value > backbone.flops_per_token for value in found["flops_per_token"]}) == 2


# Refusals


def test_it_routes_between_loras_that_are_given() -> None:
    _, backbone = tiny("bert")
    site = backbone.site("layers.0.attn.q")
    given = Mixture(experts=2, given=("a", "b"), router="xlora")
    assert given.fits(site)
    assert not replace(given, given=()).fits(site)
    assert not given.fits(replace(site, hidden_size=0))
    with pytest.raises(SpaceError, match="'xlora' needs pretrained LoRAs as experts"):
        choice = AdapterChoice(kind="lora", fields={"experts": 2, "router": Choice.of(["token", "xlora"])})
        SearchSpace(backbone=backbone, adapters={"lora": choice})
    own = {"experts": 2, "router": "xlora"}
    choice = AdapterChoice(kind="lora", fields=own, given=given.given, router_per="layer")
    with pytest.raises(SpaceError, match="has separate parameters for each site"):
        SearchSpace(backbone=backbone, adapters={"library": choice})


# Exports


def given_recipe(folder: Path, family: str, modules: Sequence[str], roles: Sequence[str], **changes: Any) -> Recipe:
    """Two LoRAs, the second of which leaves out a layer; the mixtures leave out another."""
    saved = save_model(family, folder / family / "model")
    paths = [folder / family / str(e) for e in range(2)]
    for e, path in enumerate(paths):
        torch.manual_seed(e)
        loader = AutoModelForSequenceClassification if family in CLASSIFIERS else AutoModelForCausalLM
        model = loader.from_pretrained(saved)
        config = LoraConfig(
            r=2 + e,
            lora_alpha=5,
            target_modules=list(modules),
            init_lora_weights=False,
            exclude_modules=r".*\.3\..*" if e else None,
        )
        get_peft_model(model, config).save_pretrained(str(path))
    spec = mixture_of(paths, router="xlora").canonical()
    sites = {f"layers.{layer}.{role}": spec for layer in range(12) if layer != 4 for role in roles}
    return make_recipe(family, saved, sites, **changes)


def from_peft(recipe: Recipe, folder: Path) -> Tensor:
    """Logits of what a user without autopeft loads."""
    model = AutoModelForCausalLM.from_pretrained(recipe.backbone.id, use_cache=False).eval()
    adapters = {name: str(folder / name) for name in "01"}
    return logits_of(PeftModel.from_pretrained(model, str(folder), adapters=adapters).eval())


def test_an_export_is_the_x_lora_of_peft(tmp_path: Path, fresh: FreshProcess) -> None:
    recipe = given_recipe(tmp_path, "llama", ["q_proj", "o_proj", "down_proj"], ("mlp.down", "attn.o", "attn.q"))
    state, wanted = trained(recipe)
    assert EXPORTERS["peft"].export(recipe, state, tmp_path / "out") == Assessment("exact")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "XLORA"
    moved_to = (tmp_path / "out").rename(tmp_path / "elsewhere")
    torch.testing.assert_close(from_peft(recipe, moved_to), wanted, atol=1e-5, rtol=1e-5)
    found = torch.tensor(fresh.read("readme", folder=moved_to, ids=token_ids().tolist()))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert Recipe.load(moved_to / "recipe.yaml") == recipe


def test_what_x_lora_does_not_hold_is_averaged(tmp_path: Path) -> None:
    recipe = given_recipe(tmp_path, "llama", ["q_proj"], ("attn.q",))
    spec = recipe.architecture["layers.0.attn.q"][0]
    assert isinstance(spec, Mixture)
    others = {
        "another router": {"layers.0.attn.q": (replace(spec, router="arrow"),)},
        "a plain LoRA": {"layers.4.attn.q": (Lora(rank=2),)},
        "other LoRAs": {"layers.0.attn.q": (replace(spec, given=spec.given[::-1]),)},
    }
    sites = {**recipe.sites, "layers.4.attn.q": replace(recipe.sites["layers.0.attn.q"], name="layers.4.attn.q",
             module="model.layers.4.self_attn.q_proj", input_module="model.layers.4.self_attn.q_proj")}  # fmt: skip
    for name, change in others.items():
        changed = recipe.model_copy(update={"architecture": {**recipe.architecture, **change}, "sites": sites})
        fit = EXPORTERS["peft"].assess(changed)
        assert fit.level == "approximate", name
        assert "without routing by" in fit.lost[0]
    assert EXPORTERS["merged"].assess(recipe).level == "approximate"
    half = recipe.model_copy(update={"backbone": recipe.backbone.model_copy(update={"dtype": "bfloat16"})})
    assert EXPORTERS["peft"].assess(half).lost == ("backbone dtype bfloat16: peft's classifier computes in that dtype",)


def test_models_that_peft_does_not_load_it_into_are_averaged(tmp_path: Path) -> None:
    """Their layers are not in `model`, and their heads are trained."""
    recipe = given_recipe(tmp_path, "bert", ["query"], ("attn.q",))
    state, _ = trained(recipe)
    assert EXPORTERS["peft"].export(recipe, state, tmp_path / "out", allow_lossy=True).level == "approximate"
    model = AutoModelForSequenceClassification.from_pretrained(recipe.backbone.id, num_labels=3)
    found = logits_of(PeftModel.from_pretrained(model, str(tmp_path / "out")).eval())
    torch.testing.assert_close(found, trained(recipe, averaged=True)[1], atol=1e-5, rtol=1e-5)
