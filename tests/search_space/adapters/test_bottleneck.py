"""Bottlenecks: equal to the obvious modules, slot by slot, in the places and sizes that the papers give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.search_space.adapters import Bottleneck
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import Backbone, Site
from autopeft.search_space.backbones.introspection import describe
from autopeft.search_space.runtime.bank import Bank

WIDTH, LAYERS = 24, 2
_SHAPE = {
    "vocab_size": 61,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 40,
}
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "none": nn.Identity}
TOKENS = torch.randint(1, 61, (2, 5), generator=torch.Generator().manual_seed(0))


def build(family: str) -> tuple[nn.Module, Backbone]:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**_SHAPE)) if family == "bert" else LlamaModel(LlamaConfig(**_SHAPE))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval(), describe(model, id=family)


def site(in_features: int = 7, out_features: int = 7) -> Site:
    return Site(
        name="layers.0.mlp",
        layer=0,
        role="mlp",
        module="down",
        input_module="up",
        in_features=in_features,
        out_features=out_features,
        bias=True,
    )


def module_of(spec: Bottleneck, values: dict[str, Tensor]) -> nn.Sequential:
    """The stand-alone network with `values`."""
    down, up = nn.Linear(*reversed(values["down"].shape)), nn.Linear(*reversed(values["up"].shape))
    with torch.no_grad():
        for linear, name in ((down, "down"), (up, "up")):
            linear.weight.copy_(values[name])
            linear.bias.copy_(values[f"{name}_bias"])
    return nn.Sequential(down, ACTIVATIONS[spec.activation](), up)


def randomise(bank: Bank) -> None:
    """No value is special; what no slot owns stays zero, as in a new bank."""
    generator = torch.Generator().manual_seed(1)
    for k, spec in enumerate(bank.specs):
        shapes = {name: parameter.shape for name, parameter in spec.parameters(bank.site).items()}
        bank.load_slot(k, {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()})


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", ["serial", "parallel"])
@pytest.mark.parametrize("shared", [False, True])
def test_slots_equal_stand_alone_modules(activation: str, form: str, shared: bool) -> None:
    fields = {"form": form, "activation": activation}
    specs = [Bottleneck(size=size, scale=scale, **fields) for size, scale in ((3, 1.0), (1, 4.0), (5, 0.5))]
    banks = [0, 0, 0] if shared else None
    bank = Bank(site(6, 7), specs, nn.Linear(6, 7), seeds=[0, 1, 2], bank_of_slot=banks)
    randomise(bank)
    x, y, weight = torch.randn(3, 4, 6), torch.randn(3, 4, 7, requires_grad=True), torch.randn(3, 4, 7)
    x.requires_grad_()
    packed = bank(x, y)
    (packed * weight).sum().backward()

    # Slots that share a bank add up their gradients, each in the places that it owns.
    expected = {name: torch.zeros_like(value) for name, value in bank.values.items()}
    for k, spec in enumerate(specs):
        module = module_of(spec, bank.of_slot(k))
        own_x, own_y = (tensor[k].detach().requires_grad_() for tensor in (x, y))
        alone = own_y + spec.scale * module(own_y if form == "serial" else own_x)
        torch.testing.assert_close(packed[k], alone)
        (alone * weight[k]).sum().backward()
        torch.testing.assert_close(y.grad[k], own_y.grad)
        if form == "parallel":
            torch.testing.assert_close(x.grad[k], own_x.grad)
        for linear, name in ((module[0], "down"), (module[2], "up")):
            for gradient, place in ((linear.weight.grad, name), (linear.bias.grad, f"{name}_bias")):
                own = tuple(slice(n) for n in gradient.shape)
                expected[place][bank.bank_of_slot[k]][own] += gradient
    for name, value in bank.values.items():
        torch.testing.assert_close(value.grad, expected[name])


def test_the_serial_form_is_a_module_after_the_last_linear() -> None:
    model, backbone = build("bert")
    replaced = copy.deepcopy(model)
    architecture = Architecture.of(
        {s.name: [Bottleneck(size=4, init="kaiming", scale=2.0)] for s in backbone.select(roles=["attn", "mlp"])}
    )

    class Serial(nn.Module):
        def __init__(self, base: nn.Module, adapter: nn.Module) -> None:
            super().__init__()
            self.base, self.adapter = base, adapter

        def forward(self, x: Tensor) -> Tensor:
            y = self.base(x)
            return y + 2.0 * self.adapter(y)

    with Attachment(model, backbone, [architecture], seeds=[0]) as attachment:
        for bank in attachment.banks:
            randomise(bank)
            adapter = module_of(bank.specs[0], bank.of_slot(0))
            replaced.set_submodule(bank.site.module, Serial(replaced.get_submodule(bank.site.module), adapter))
        torch.testing.assert_close(model(TOKENS).last_hidden_state, replaced(TOKENS).last_hidden_state)


@pytest.mark.parametrize("role", ["attn", "mlp"])
def test_the_parallel_form_reads_what_the_sub_layer_reads(role: str) -> None:
    model, backbone = build("llama")
    replaced = copy.deepcopy(model)
    architecture = Architecture.of(
        {s.name: [Bottleneck(size=4, form="parallel", scale=4.0)] for s in backbone.select(roles=[role])}
    )

    class Parallel(nn.Module):
        def __init__(self, base: nn.Module, adapter: nn.Module) -> None:
            super().__init__()
            self.base, self.adapter = base, adapter

        def forward(self, *args: Tensor, **kwargs: Any) -> Any:
            update = 4.0 * self.adapter(args[0] if args else kwargs["hidden_states"])
            y = self.base(*args, **kwargs)
            return (y[0] + update, *y[1:]) if isinstance(y, tuple) else y + update

    with Attachment(model, backbone, [architecture], seeds=[0]) as attachment:
        for bank in attachment.banks:
            randomise(bank)
            adapter = module_of(bank.specs[0], bank.of_slot(0))
            name = f"layers.{bank.site.layer}.{'self_attn' if role == 'attn' else 'mlp'}"
            replaced.set_submodule(name, Parallel(replaced.get_submodule(name), adapter))
        torch.testing.assert_close(model(TOKENS).last_hidden_state, replaced(TOKENS).last_hidden_state)


def houlsby(backbone: Backbone, **fields: Any) -> Architecture:
    return Architecture.of({s.name: [Bottleneck(**fields)] for s in backbone.select(roles=["attn", "mlp"])})


def test_a_slot_alone_equals_the_slot_in_a_pack_with_dropout() -> None:
    model, backbone = build("bert")
    settings = [
        {"size": 2, "dropout": 0.3, "init": "kaiming"},
        {"size": 5, "dropout": 0.1, "init": "houlsby", "scale": 3.0},
        {"size": 3, "init": "kaiming"},
    ]
    seen = {}
    for chosen in ([0, 1, 2], [0], [1], [2]):
        architectures = [houlsby(backbone, **settings[k]) for k in chosen]
        with Attachment(model, backbone, architectures, seeds=chosen) as attachment:
            attachment.train()
            for _ in range(2):  # the streams stay in step, too
                hidden = model(torch.cat([TOKENS] * len(chosen))).last_hidden_state.unflatten(0, (len(chosen), -1))
                hidden.square().sum().backward()
            gradients = {
                (index, name): value.grad
                for index, bank in enumerate(attachment.banks)
                for name, value in bank.values.items()
            }
            for slot, k in enumerate(chosen):
                seen.setdefault(k, []).append((hidden[slot], {key: g[slot] for key, g in gradients.items()}))
    for k, ((packed, in_pack), (alone, on_its_own)) in seen.items():
        torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)
        for key, gradient in on_its_own.items():
            own = tuple(slice(n) for n in gradient.shape)
            torch.testing.assert_close(in_pack[key][own], gradient, rtol=1e-4, atol=1e-5, msg=f"{k} {key}")
            assert in_pack[key].count_nonzero() == in_pack[key][own].count_nonzero()


def test_new_adapters_are_the_identity_or_near_it_as_their_init_says() -> None:
    model, backbone = build("bert")
    bare = model(TOKENS).last_hidden_state
    change = {}
    for init in ("zero", "houlsby", "kaiming"):
        for form in ("serial", "parallel"):
            with Attachment(model, backbone, [houlsby(backbone, init=init, form=form)], seeds=[0]):
                change[init, form] = float((model(TOKENS).last_hidden_state - bare).detach().abs().max())
    for form in ("serial", "parallel"):
        assert change["zero", form] == 0.0
        assert 0.0 < change["houlsby", form] < 0.01 < 0.05 < change["kaiming", form]


def test_houlsby_init_is_cut_at_two_deviations() -> None:
    spec = Bottleneck(size=50, init="houlsby")
    values = Bank(site(80, 80), [spec], nn.Linear(80, 80), seeds=[0]).of_slot(0)
    for name in ("down", "up"):
        assert 0.008 < values[name].std() < 0.01  # cutting takes 12 % off
        assert 0.019 < values[name].abs().max() <= 0.02
        assert not values[f"{name}_bias"].any()


# Costs


def test_houlsby_and_pfeiffer_counts_are_the_papers() -> None:
    _, backbone = build("bert")
    d, m = WIDTH, 6
    per_adapter = 2 * m * d + d + m  # Houlsby et al. 2019, section 2.1
    assert houlsby(backbone, size=m).num_params(backbone) == 2 * LAYERS * per_adapter
    pfeiffer = Architecture.of({s.name: [Bottleneck(size=m)] for s in backbone.select(roles=["mlp"])})
    assert pfeiffer.num_params(backbone) == LAYERS * per_adapter
    model, _ = build("bert")
    with Attachment(model, backbone, [pfeiffer], seeds=[0]) as attachment:
        assert attachment.num_adapter_params() == LAYERS * per_adapter


@pytest.mark.parametrize("form", ["serial", "parallel"])
def test_operations_equal_a_counter(form: str) -> None:
    spec = Bottleneck(size=3, form=form)
    bank = Bank(site(6, 7), [spec, spec], nn.Linear(6, 7), seeds=[0, 1])
    with FlopCounterMode(display=False) as counter:
        bank(torch.randn(2, 4, 6), torch.randn(2, 4, 7))
    assert counter.get_total_flops() == 2 * 4 * spec.flops_per_token(bank.site)


@pytest.mark.parametrize(
    "fields",
    [
        {"size": 0},
        {"form": "both"},
        {"activation": "swish"},
        {"init": "ones"},
        {"scale": -1.0},
        {"dropout": 1.0},
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Bottleneck(**fields)
