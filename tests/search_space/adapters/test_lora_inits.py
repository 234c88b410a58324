"""Initial values of LoRA from the frozen weight: against peft's, with the offset beside the shared weight."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.search_space.adapters import Dora, Lora, Mixture
from autopeft.search_space.adapters.lora import FROM_SITE
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import Backbone, Site
from autopeft.search_space.backbones.linear import weight_of
from autopeft.search_space.declaration import AdapterChoice, SpaceError
from autopeft.search_space.domains import Choice
from autopeft.search_space.parameter import Factor
from autopeft.search_space.runtime.factors import Starts
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.testing.adapters import check_adapter, noisy, placed
from autopeft.testing.models import tiny, tokens

from ...support.slow import mostly_slow

torch.set_num_threads(1)

OF_WEIGHT = ("pissa", "pissa_niter_4", "olora")
ROLES = ("attn.q", "attn.v", "attn.qkv")


def loras(init: str) -> list[Lora]:
    return [
        Lora(rank=3, alpha=6.0, dropout=0.2, init=init),
        Lora(rank=5, alpha=4.0, scaling="rslora", dropout=0.3, init=init),
        Lora(rank=1, alpha=1.0, init=init, freeze_a=True),
        Lora(rank=2),
    ]


def peft_model(family: str, spec: Lora, **config: Any) -> tuple[nn.Module, dict[str, nn.Module]]:
    """peft's model with the same LoRAs, and its modules by the names of our sites."""
    from peft import LoraConfig, get_peft_model

    model, backbone = tiny(family)
    modules = {name: backbone.site(name).module for name, _ in placed(spec, backbone, ROLES)}
    settings = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]
        use_rslora=spec.scaling == "rslora",
        target_modules=list(modules.values()),
        init_lora_weights=spec.init,  # type: ignore[arg-type]
        fan_in_fan_out=family == "gpt2",
        **config,
    )
    wrapped = get_peft_model(model, settings).eval()  # type: ignore[arg-type]
    return wrapped, {name: wrapped.get_submodule(f"base_model.model.{path}") for name, path in modules.items()}


def started(family: str, spec: Lora) -> tuple[dict[str, Tensor], nn.Module, Backbone]:
    model, backbone = tiny(family)
    with Attachment(model, backbone, [placed(spec, backbone, ROLES)], [1], pretrained_head=True) as attachment:
        return attachment.state(), model, backbone


@pytest.mark.parametrize("init", OF_WEIGHT)
@pytest.mark.parametrize("family", mostly_slow(("bert", "llama-causal", "gpt2"), "gpt2"))
def test_it_passes_the_checks_of_adapters(init: str, family: str) -> None:
    check_adapter(*loras(init), roles=ROLES, families=[family])


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("family", ["bert", "llama-causal", "gpt2"])
@pytest.mark.parametrize("scaling", ["alpha", "rslora"])
def test_initial_values_are_pefts(init: str, family: str, scaling: str) -> None:
    """The products B A, and what is left of the weight, are equal; of A and B signs and rotations are free."""
    if (init, family) == ("olora", "gpt2"):
        pytest.skip("peft decomposes the transposed weight of Conv1D as it is stored")
    spec = Lora(rank=4, alpha=6.0, scaling=scaling, init=init)
    state, bare, backbone = started(family, spec)
    _, theirs = peft_model(family, spec)
    for name, module in theirs.items():
        a, b = (module.get_submodule(f"lora_{side}.default").weight.detach() for side in "AB")
        ours_a, ours_b = state[f"{name}/lora/A"], state[f"{name}/lora/B"]
        torch.testing.assert_close(ours_b @ ours_a, b @ a, atol=1e-5, rtol=1e-4)
        residual = weight_of(bare.get_submodule(backbone.site(name).module)) - spec.scale * ours_b @ ours_a
        torch.testing.assert_close(residual, weight_of(module.base_layer), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours_a.abs(), a.abs(), atol=1e-4, rtol=1e-3)
        for side in "AB":
            assert torch.equal(state[f"{name}/lora/{side}"], state[f"{name}/lora/{side}0"])


def test_subspace_iterations_find_the_principal_part() -> None:
    """Of a weight with a gap in its spectrum, they find what the full decomposition finds."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(30, 4, generator=generator) @ torch.randn(4, 20, generator=generator)
    linear = nn.Linear(20, 30)
    with torch.no_grad():
        linear.weight.copy_(weight + 1e-3 * torch.randn(30, 20, generator=generator))
    site = Site(
        name="s", layer=0, role="attn.q", module="s", input_module="s", in_features=20, out_features=30, bias=True
    )

    def product(rule: str) -> Tensor:
        starts, parts = Starts(), {}
        for side, shape in (("A", (4, 20)), ("B", (30, 4))):
            parts[side] = starts.value(Factor(rule=rule, side=side, scale=2.0), site, linear, shape)  # type: ignore[arg-type]
        return 2.0 * parts["B"] @ parts["A"]

    torch.testing.assert_close(product("pissa_niter_4"), product("pissa"), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(product("pissa"), weight, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("family", ["bert", "llama-causal"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_training_is_pefts(family: str, init: str) -> None:
    """Gradient descent on A and B gives peft's logits, whose weight has lost the initial part, at each step."""
    spec = Lora(rank=3, alpha=6.0, init=init)
    theirs, modules = peft_model(family, spec)
    model, backbone = tiny(family)
    with Attachment(model, backbone, [placed(spec, backbone)], [1], pretrained_head=True) as attachment:
        state = attachment.state()
        with torch.no_grad():  # the signs are free
            for name, module in modules.items():
                for side in "AB":
                    module.get_submodule(f"lora_{side}.default").weight.copy_(state[f"{name}/lora/{side}"])
        pairs = [
            (bank.values[side], modules[bank.site.name].get_submodule(f"lora_{side}.default").weight)
            for bank in attachment.banks
            if bank.site.name in modules
            for side in "AB"
        ]
        for step in range(4):
            ours, other = model(tokens(seed=step)).logits, theirs(tokens(seed=step)).logits
            torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-5)
            for logits in (ours, other):
                logits.square().mean().backward()
            with torch.no_grad():
                for pair in pairs:
                    for value in pair:
                        value.sub_(0.1 * value.grad)
                        value.grad = None


def test_costs_are_those_of_twice_the_rank() -> None:
    _, backbone = tiny("bert")
    plain, offset = (placed(Lora(rank=4, init=init), backbone) for init in ("kaiming", "pissa"))
    double = placed(Lora(rank=8), backbone)
    assert offset.num_params(backbone) == plain.num_params(backbone)
    assert offset.stored_bytes(backbone) == double.stored_bytes(backbone)
    assert offset.flops_per_token(backbone) == double.flops_per_token(backbone)
    assert offset.total_params(backbone) == double.num_params(backbone)


def test_the_backbone_is_shared_and_unchanged() -> None:
    """Three inits in one pack: every slot starts as the bare model, and its weights never change."""
    model, backbone = tiny("llama-causal")
    weights, logits = copy.deepcopy(model.state_dict()), model(tokens()).logits
    specs = [Lora(rank=2, init=init) for init in ("pissa", "olora", "kaiming")]
    with Attachment(model, backbone, [placed(spec, backbone) for spec in specs], [1, 2, 3]) as attachment:
        attachment.eval()
        packed = model(tokens().repeat(3, 1)).logits.unflatten(0, (3, -1))
        for own in packed:
            torch.testing.assert_close(own, logits, atol=1e-5, rtol=1e-5)
        for name, value in model.state_dict().items():
            assert torch.equal(value, weights[name])


def test_dropout_spares_the_offset() -> None:
    """In training, the start value is dropped like any LoRA, and the offset is not: it belongs to the weight."""
    model, backbone = tiny("bert")
    site = next(site for site in backbone.sites if site.role == "attn.q")
    architecture = Architecture.of({site.name: [Lora(rank=3, dropout=0.5, init="pissa")]})
    with Attachment(model, backbone, [architecture], [1], pretrained_head=True) as attachment:
        (bank,) = [bank for bank in attachment.banks if bank.site == site]
        x = torch.randn(1, 7, site.in_features)
        y = torch.zeros(1, 7, site.out_features)
        attachment.train()
        state = bank.dropout_streams[0].get_state()
        found = bank(x, y)[0]
        bank.dropout_streams[0].set_state(state)
        dropped = bank.call.dropout(x)[0]
        p = bank.of_slot(0)
        scale = bank.specs[0].scale  # type: ignore[attr-defined]
        expected = scale * (dropped @ p["A"].T @ p["B"].T - x[0] @ p["A0"].T @ p["B0"].T)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_one_decomposition_per_site_and_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    model, backbone = tiny("bert")
    starts = Starts()
    specs = [Lora(rank=4, init="pissa"), Lora(rank=2, init="pissa"), Lora(rank=4, alpha=1.0, init="pissa")]
    for _ in range(2):
        architectures = [placed(spec, backbone) for spec in specs]
        with Attachment(model, backbone, architectures, [1, 2, 3], starts=starts) as attachment:
            first, second = attachment.state(0), attachment.state(1)
    sites = len(list(placed(specs[0], backbone)))
    assert len(calls) <= 2 * sites, "once, and once more for a larger rank"
    name = next(name for name in first if name.endswith("/A"))
    scale = (specs[0].scale / specs[1].scale) ** 0.5
    torch.testing.assert_close(second[name], first[name][:2] * scale, atol=1e-6, rtol=1e-5)


def test_a_rank_above_the_features_is_refused_before_training() -> None:
    _, backbone = tiny("bert")
    fields: dict[str, Any] = {"rank": Choice.of([4, 25]), "init": Choice.of(["kaiming", "pissa"])}
    with pytest.raises(SpaceError, match="25 is too large"):
        SearchSpace(backbone=backbone, adapters={"lora": AdapterChoice(kind="lora", fields=fields)})
    SearchSpace(
        backbone=backbone,
        adapters={"lora": AdapterChoice(kind="lora", fields={**fields, "init": Choice.of(["kaiming", "gaussian"])})},
    )
    # Of several inits, the one that needs most of the features counts, in any order and for the default rank too.
    for inits in (["pissa", "lora_ga"], ["lora_ga", "pissa"]):
        fields = {"rank": Choice.of([4, 16]), "init": Choice.of(inits)}
        with pytest.raises(SpaceError, match="16 is too large"):
            SearchSpace(backbone=backbone, adapters={"lora": AdapterChoice(kind="lora", fields=fields)})
    narrow = replace(backbone, sites=tuple(replace(site, out_features=12) for site in backbone.sites))
    with pytest.raises(SpaceError, match="fits no site"):
        SearchSpace(backbone=narrow, adapters={"lora": AdapterChoice(kind="lora", fields={"init": "lora_ga"})})


def test_mixtures_and_dora_refuse_offsets() -> None:
    with pytest.raises(ValueError, match="would start all experts"):
        Mixture(expert=Lora(init="pissa"))
    with pytest.raises(ValueError, match="for dora"):
        Dora(init="olora")
    _, backbone = tiny("bert")
    fields: dict[str, Any] = {"init": Choice.of(["kaiming", "olora"]), "experts": Choice.of([0, 2])}
    with pytest.raises(SpaceError, match="olora would start"):
        SearchSpace(backbone=backbone, adapters={"lora": AdapterChoice(kind="lora", fields=fields)})
    with pytest.raises(ValueError, match="alpha must be greater than 0"):
        Lora(init="pissa", alpha=0.0)


def test_merging_an_offset_is_exact_in_double_precision() -> None:
    site = Site(
        name="s", layer=0, role="attn.q", module="s", input_module="s", in_features=6, out_features=8, bias=False
    )
    spec = Lora(rank=2, init="pissa")
    p = {name: torch.randn(parameter.shape).double() for name, parameter in spec.parameters(site).items()}
    weight = torch.randn(8, 6).double()
    merged, _ = spec.merge(p, weight, None)
    torch.testing.assert_close(merged - weight, spec.scale * (p["B"] @ p["A"] - p["B0"] @ p["A0"]))


def test_the_facts_of_inits_are_those_of_their_rules() -> None:
    from autopeft.search_space.adapters.flora import OF_WEIGHT
    from autopeft.search_space.runtime.factors import RULES

    assert RULES.keys() == FROM_SITE.keys() | {OF_WEIGHT}, "and that of the fixed factors of flora"
    for init in FROM_SITE:
        spec = Lora(init=init)
        assert replace(spec, init="kaiming").structure() == Lora().structure()
        assert (spec.structure() == Lora().structure()) == (not spec.has_offset)


def test_statistics_that_overflow_are_named() -> None:
    model, backbone = tiny("bert")

    def overflown(site: Site, name: str) -> Tensor:
        return torch.full((site.in_features, site.in_features), torch.inf).double()

    with pytest.raises(ValueError, match="is not finite"):
        Attachment(model, backbone, [placed(Lora(init="corda_ipm"), backbone)], [1], starts=Starts(overflown))


def test_noise_is_loaded_back() -> None:
    model, backbone = tiny("bert")
    architecture = placed(Lora(rank=2, init="olora"), backbone)
    with Attachment(model, backbone, [architecture], [1], draw=False) as attachment:
        state = {name: value + 1.0 for name, value in noisy(attachment).items()}
        attachment.load_state(state)
        assert attachment.state().keys() == state.keys()
        assert {name.rpartition("/")[2] for name in state if "/lora/" in name} == {"A", "B", "A0", "B0"}
