"""Initial values of LoRA from training rows: statistics against obvious ones, values against peft's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.backbones import LoadedBackbone
from autopeft.evaluators.proxies.supernet import Supernet
from autopeft.evaluators.site_statistics import STATISTICS, SiteStatistics
from autopeft.evaluators.tasks import Batch
from autopeft.search_space.adapters import Dora, Lora
from autopeft.search_space.adapters.lora import FROM_SITE
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.declaration import AdapterChoice
from autopeft.search_space.domains import Choice
from autopeft.search_space.runtime.factors import MOMENT, RULES, Starts
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.search_space.training import Training
from autopeft.testing.adapters import placed
from autopeft.testing.models import tiny

from .training.test_packed import alone, at, compare, loaded, requests, together  # noqa: F401

torch.set_num_threads(1)

OF_DATA = ("eva", "corda_ipm", "corda_kpm", "lora_ga")
FAMILIES = ("bert", "llama-causal", "gpt2")


def batches() -> list[Batch]:
    """Two batches of rows of different lengths."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(2):
        mask = (torch.arange(9)[None] < torch.tensor([[9], [6], [4]])).long()
        ids = torch.randint(1, 61, (3, 9), generator=generator) * mask
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """A loss per row that reads the tokens of the row alone."""
    logits = model(**batch).logits
    if logits.dim() == 3:
        logits = logits * batch["attention_mask"][..., None]
    return logits.square().flatten(1).mean(1)


def site_statistics(
    model: nn.Module, backbone: Backbone, rows: Callable[[], Iterable[Batch]] = batches
) -> SiteStatistics:
    task = SimpleNamespace(scores=lambda model, batch: {"loss": loss_of(model, batch)})
    return SiteStatistics(
        model,
        backbone,
        cast(Any, task),
        rows,
        lambda architecture, seed: Attachment(model, backbone, [architecture], [str(seed)], pretrained_head=True),
    )


def inputs_of(model: nn.Module, module: str) -> list[Tensor]:
    """The inputs of a module, one [T, D_in] per row without padding, each row alone."""
    found: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_hook(lambda _, args, __: found.append(args[0].detach()[0]))
    with torch.no_grad():
        for batch in batches():
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
                model(input_ids=ids[mask][None])
    handle.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_the_obvious_ones(family: str) -> None:
    model, backbone = tiny(family)
    measured = site_statistics(model, backbone)
    for site in [site for site in backbone.sites if site.role in ("attn.q", "attn.qkv", "mlp.up", "mlp.down")]:
        rows = inputs_of(model, site.module)
        x = torch.cat(rows).double()
        centred = x - x.mean(0)
        torch.testing.assert_close(
            measured(site, "the covariance of inputs"), centred.T @ centred / len(x), atol=1e-5, rtol=1e-4
        )
        scaled = [row.double() / row.max().abs() for row in rows]
        expected = torch.stack([row.T @ row for row in scaled]).mean(0)
        torch.testing.assert_close(measured(site, MOMENT), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_the_weight(family: str) -> None:
    model, backbone = tiny(family)
    measured = site_statistics(model, backbone)
    for site in [site for site in backbone.sites if site.role in ("attn.q", "attn.qkv", "mlp.down")]:
        found = measured(site, "the gradient of the weight")
        weight = cast(Tensor, model.get_submodule(site.module).weight)
        total = sum(torch.autograd.grad(loss_of(model, batch).sum(), weight)[0] for batch in batches())
        expected = cast(Tensor, total) / 6  # of the mean over the six rows
        expected = expected.T if family == "gpt2" else expected
        torch.testing.assert_close(found.float(), expected, atol=1e-6, rtol=1e-4)


def test_a_pass_serves_a_layer_and_leaves_the_model_as_it_was() -> None:
    model, backbone = tiny("bert")
    flags = [parameter.requires_grad for parameter in model.parameters()]
    model.train()
    passes: list[int] = []

    def rows() -> Iterable[Batch]:
        passes.append(1)
        return batches()

    with Attachment(
        model,
        backbone,
        [placed(Lora(rank=2, init=init), backbone, ("attn.q", "attn.v", "mlp.up", "mlp.down")) for init in OF_DATA[:2]],
        [1, 2],
        starts=Starts(site_statistics(model, backbone, rows)),
    ):
        pass
    # Per layer: linears of the hidden size, and those of the inner size; eva and corda have statistics of their own.
    assert len(passes) <= 2 * 2 * 2 * 2
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def ours(family: str, spec: Lora, rows: Callable[[], Iterable[Batch]]) -> tuple[dict[str, Tensor], Backbone]:
    model, backbone = tiny(family)
    starts = Starts(site_statistics(model, backbone, rows))
    with Attachment(model, backbone, [placed(spec, backbone)], [1], pretrained_head=True, starts=starts) as attachment:
        attachment.eval()
        bare, _ = tiny(family)
        for batch in batches():
            torch.testing.assert_close(model(**batch).logits, bare(**batch).logits, atol=1e-5, rtol=1e-5)
        return attachment.state(), backbone


def theirs(
    family: str, spec: Lora, init: str, before: Callable[[nn.Module, Any], None], **config: Any
) -> tuple[nn.Module, dict[str, nn.Module]]:
    from peft import LoraConfig, get_peft_model

    model, backbone = tiny(family)
    modules = {name: backbone.site(name).module for name, _ in placed(spec, backbone)}
    settings = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]
        target_modules=list(modules.values()),
        init_lora_weights=init,  # type: ignore[arg-type]
        **config,
    )
    before(model, settings)
    wrapped = get_peft_model(model, settings).eval()  # type: ignore[arg-type]
    return wrapped, {name: wrapped.get_submodule(f"base_model.model.{path}") for name, path in modules.items()}


def factors(module: nn.Module) -> tuple[Tensor, Tensor]:
    a, b = (module.get_submodule(f"lora_{side}.default").weight.detach() for side in "AB")
    return cast(Tensor, a), cast(Tensor, b)


@pytest.mark.parametrize("family", ["bert", "llama-causal"])
def test_eva_is_pefts(family: str) -> None:
    """peft computes the decomposition incrementally; with as many components as it keeps, it is exact."""
    from peft import EvaConfig, initialize_lora_eva_weights

    spec = Lora(rank=12, alpha=6.0, init="eva")
    state, _ = ours(family, spec, lambda: batches()[:1])
    wrapped, modules = theirs(family, spec, "eva", lambda *_: None, eva_config=EvaConfig(rho=1.0, tau=0.99))
    initialize_lora_eva_weights(wrapped, batches()[:1], show_progress_bar=False)
    for name, module in modules.items():
        a, b = factors(module)
        own = state[f"{name}/lora/A"]
        assert not b.any()
        assert not state[f"{name}/lora/B"].any()
        torch.testing.assert_close(own.T @ own, a.T @ a, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(own[:4].abs(), a[:4].abs(), atol=1e-4, rtol=1e-3)
    assert {name.rpartition("/")[2] for name in state if "/lora/" in name} == {"A", "B"}


@pytest.mark.parametrize("family", ["bert", "llama-causal"])
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_is_pefts(family: str, mode: str) -> None:
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    def before(model: nn.Module, config: Any) -> None:
        def run() -> None:
            for batch in batches():
                for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
                    model(input_ids=ids[mask][None])

        preprocess_corda(model, config, run_model=run)

    spec = Lora(rank=3, alpha=6.0, init=f"corda_{mode}")
    state, backbone = ours(family, spec, batches)
    _, modules = theirs(family, spec, "corda", before, corda_config=CordaConfig(corda_method=mode))
    bare, _ = tiny(family)
    for name, module in modules.items():
        a, b = factors(module)
        own_a, own_b = state[f"{name}/lora/A"], state[f"{name}/lora/B"]
        torch.testing.assert_close(own_b @ own_a, b @ a, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(own_b @ own_b.T, b @ b.T, atol=1e-4, rtol=1e-3)
        weight = cast(Tensor, bare.get_submodule(backbone.site(name).module).weight).detach()
        torch.testing.assert_close(
            weight - spec.scale * own_b @ own_a, module.base_layer.weight.detach(), atol=1e-5, rtol=1e-3
        )


@pytest.mark.parametrize("family", ["bert", "llama-causal"])
def test_lora_ga_is_pefts(family: str) -> None:
    from peft import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    def before(model: nn.Module, config: Any) -> None:
        def step() -> None:
            model.eval()
            loss_of(model, batches()[0]).mean().backward()

        preprocess_loraga(model, config, step)

    spec = Lora(rank=3, alpha=6.0, init="lora_ga")
    state, _ = ours(family, spec, lambda: batches()[:1])
    _, modules = theirs(family, spec, "lora_ga", before, lora_ga_config=LoraGAConfig())
    for name, module in modules.items():
        a, b = factors(module)
        own_a, own_b = state[f"{name}/lora/A"], state[f"{name}/lora/B"]
        torch.testing.assert_close(own_a.T @ own_a, a.T @ a, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(own_b @ own_b.T, b @ b.T, atol=1e-5, rtol=1e-3)


def test_rows_in_a_pack_train_as_alone(loaded: LoadedBackbone) -> None:  # noqa: F811
    """All inits side by side, with dropout; each evaluator has its own statistics of the same rows."""
    specs = [Lora(rank=2 + k % 2, dropout=0.2 * (k % 2), init=init) for k, init in enumerate(FROM_SITE)]
    wanted = requests([*(at(loaded, spec, 1) for spec in specs), at(loaded, Lora(rank=2), 1)])
    wanted += requests([at(loaded, Dora(rank=2, init="eva"), 1)])
    # The start values cancel up to rounding, which training magnifies.
    compare(together(loaded, pack=12).evaluate(wanted), alone(loaded).evaluate(wanted), 1e-4)


@pytest.mark.slow
def test_values_do_not_depend_on_the_seed_or_on_what_ran_before(loaded: LoadedBackbone) -> None:  # noqa: F811
    first, second = alone(loaded), alone(loaded)
    architectures = [at(loaded, Lora(rank=rank, init=init), 0) for init in OF_DATA for rank in (2, 4)]
    for architecture in reversed(architectures):
        second.attached([architecture], [9]).detach()
    for architecture in architectures:
        states = []
        for evaluator, seed in ((first, 1), (second, 2)):
            with evaluator.attached([architecture], [seed]) as attachment:
                states.append({k: v for k, v in attachment.state().items() if not k.startswith("head.")})
        for name, value in states[0].items():
            torch.testing.assert_close(value, states[1][name], atol=0, rtol=0)


def test_without_rows_the_init_is_named() -> None:
    model, backbone = tiny("bert")
    for init in OF_DATA:
        with pytest.raises(ValueError, match=f"'{init}' reads the .* training rows"):
            Attachment(model, backbone, [placed(Lora(rank=2, init=init), backbone)], [1])
    assert {rule.statistic for rule in RULES.values()} - {None} == set(STATISTICS)


def test_inputs_that_are_no_tokens_are_named() -> None:
    model, backbone = tiny("bert")

    def without_mask() -> list[Batch]:
        return [{"input_ids": batch["input_ids"]} for batch in batches()]

    architecture = placed(Lora(rank=2, init="eva"), backbone)
    with pytest.raises(ValueError, match="no vectors of the tokens of a row"):
        Attachment(model, backbone, [architecture], [1], starts=Starts(site_statistics(model, backbone, without_mask)))


def test_a_supernet_shares_nested_starts(loaded: LoadedBackbone) -> None:  # noqa: F811
    """Every subnet, of any rank and init, starts as the bare model, and reads the leading part of the largest."""
    evaluator = together(loaded)
    choices: dict[str, Any] = {"rank": Choice.of([2, 4]), "init": Choice.of(["kaiming", "pissa", "eva"])}
    space = SearchSpace(
        backbone=loaded.backbone, adapters={"lora": AdapterChoice(kind="lora", at=("attn.q",), fields=choices)}
    )
    supernet = Supernet(evaluator, space, Training(batch_size=8, epochs=1), 0)
    architectures = [
        at(loaded, Lora(rank=rank, init=init), 0, ("attn.q",)) for rank in (2, 4) for init in ("kaiming", "pissa")
    ]
    ids = torch.arange(4, 20).view(2, 8)
    with supernet.attach(architectures, [0] * 4) as attachment, torch.no_grad():
        attachment.eval()
        packed = loaded.model(input_ids=ids.repeat(4, 1), attention_mask=torch.ones(8, 8)).logits.unflatten(0, (4, 2))
    with supernet.attach([Architecture()], [0]), torch.no_grad():
        bare = loaded.model(input_ids=ids, attention_mask=torch.ones(2, 8)).logits
    for own in packed:
        torch.testing.assert_close(own, bare, atol=1e-5, rtol=1e-5)
    losses = supernet.train(lambda number: architectures, 3)
    assert torch.tensor(losses).isfinite().all()

    for init in ("lora_ga", Choice.of(["lora_ga", "pissa"])):
        fields: dict[str, Any] = {"rank": Choice.of([2, 4]), "init": init}
        crossed = SearchSpace(
            backbone=loaded.backbone, adapters={"lora": AdapterChoice(kind="lora", at=("attn.q",), fields=fields)}
        )
        with pytest.raises(ValueError, match="a smaller adapter is no part of a larger one"):
            Supernet(evaluator, crossed, Training(batch_size=8, epochs=1), 0)


def test_the_gradient_goes_through_the_same_head_in_every_process(loaded: LoadedBackbone) -> None:  # noqa: F811
    """The head that a checkpoint lacks is random where it is loaded; the statistics do not see it."""
    states = []
    for noise in (0.0, 1.0):
        with torch.no_grad():
            for name in loaded.backbone.head_modules:
                for parameter in loaded.model.get_submodule(name).parameters():
                    parameter.add_(noise)
        with alone(loaded).attached([at(loaded, Lora(rank=2, init="lora_ga"), 2)], [1]) as attachment:
            states.append({name: value for name, value in attachment.state().items() if "/lora/" in name})
    torch.testing.assert_close(states[0], states[1], atol=0, rtol=0)
