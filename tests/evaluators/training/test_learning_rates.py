"""Factors of the learning rate: LoRA+, LoRA-FA and `rate`, alone and in packs, against peft's LoRA+."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.attachment.learning_rates import rate_factors
from autopeft.evaluators.backbones import LoadedBackbone
from autopeft.evaluators.training.optimizer import PackedAdamW, parameter_groups, set_rate
from autopeft.search_space.adapters import AdapterSpec, Bottleneck, Dora, Full, Ia3, Lora, Mixture, spec_from_dict
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.declaration import AdapterChoice
from autopeft.search_space.domains import Choice, Float
from autopeft.search_space.spaces.location import locate
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.search_space.training import Training
from autopeft.testing.adapters import placed
from autopeft.testing.models import tiny, tokens

from ...support.tied import Tied, tied  # noqa: F401
from .test_packed import alone, at, compare, loaded, requests, together  # noqa: F401

torch.set_num_threads(1)

RATE, STEPS = 1e-3, 4


def one_by_one(attachment: Attachment, training: Training) -> Callable[[int], None]:
    """A step of torch's AdamW with the attachment's factors."""
    groups = parameter_groups(list(attachment.trainable()), training, rate_factors(attachment))
    optimizer = AdamW(groups, lr=training.learning_rate)

    def step(number: int) -> None:
        set_rate(optimizer, training.learning_rate)
        optimizer.step()
        optimizer.zero_grad()

    return step


def in_one_pass(attachment: Attachment, training: Training) -> Callable[[int], None]:
    optimizer = PackedAdamW(attachment, [training])
    return lambda number: optimizer.step(number, torch.tensor([training.learning_rate]))


def descended(spec: AdapterSpec, family: str, optimizer: Any, **training: Any) -> tuple[dict[str, Tensor], Any]:
    """The tensors after some steps, and those from before."""
    model, backbone = tiny(family)
    settings = Training(learning_rate=RATE, max_grad_norm=0.0, **training)
    with Attachment(model, backbone, [placed(spec, backbone)], [1], pretrained_head=True) as attachment:
        before = attachment.state()
        attachment.train()
        step = optimizer(attachment, settings)
        for number in range(1, STEPS + 1):
            model(tokens(seed=number)).logits.square().mean().backward()
            step(number)
        return attachment.state(), before


def peft_descended(
    spec: Lora, family: str, before: dict[str, Tensor], weight_decay: float
) -> tuple[dict[str, Tensor], Backbone]:
    """peft's tensors after the same steps of its LoRA+ optimiser, by their names there."""
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    model, backbone = tiny(family)
    modules = [backbone.site(name).module for name, _ in placed(spec, backbone)]
    config = LoraConfig(
        r=spec.rank, lora_alpha=int(spec.alpha), target_modules=modules, use_dora=isinstance(spec, Dora)
    )
    wrapped = get_peft_model(model, config).eval()
    values = dict(wrapped.named_parameters())
    with torch.no_grad():
        for name, value in before.items():
            site, _, tensor = name.split("/")
            if tensor in ("A", "B"):
                module = backbone.site(site).module
                values[f"base_model.model.{module}.lora_{tensor}.default.weight"].copy_(value)
    optimizer = create_loraplus_optimizer(
        wrapped, AdamW, lr=RATE, loraplus_lr_ratio=spec.rate_ratio, loraplus_weight_decay=weight_decay
    )
    for number in range(1, STEPS + 1):
        wrapped(tokens(seed=number)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in values.items()}, backbone


@pytest.mark.parametrize("optimizer", [one_by_one, in_one_pass])
@pytest.mark.parametrize("family", ["llama-causal", "gemma"])  # without a head, whose bias peft trains at the ratio
@pytest.mark.parametrize("spec", [Lora(rank=3, rate_ratio=16.0), Dora(rank=3, rate_ratio=4.0)], ids=lambda s: s.kind)
def test_loraplus_is_pefts(spec: Lora, family: str, optimizer: Any) -> None:
    decay = 0.0 if isinstance(spec, Dora) else 0.1  # peft decays the magnitudes too
    ours, before = descended(spec, family, optimizer, weight_decay=decay)
    theirs, backbone = peft_descended(spec, family, before, decay)
    names = {"A": "lora_A.default.weight", "B": "lora_B.default.weight", "m": "lora_magnitude_vector.default.weight"}
    compared = 0
    for name, value in ours.items():
        site, kind, tensor = name.split("/")
        if kind == spec.kind:
            other = theirs[f"base_model.model.{backbone.site(site).module}.{names[tensor]}"]
            torch.testing.assert_close(value, other, atol=1e-5, rtol=1e-5)
            compared += 1
    assert compared >= 8
    plain, _ = descended(spec_from_dict({**spec.to_dict(), "rate_ratio": 1.0}), family, optimizer, weight_decay=decay)
    assert any((plain[name] - value).abs().max() > 1e-3 for name, value in ours.items()), "the ratio has an effect"


@pytest.mark.parametrize("optimizer", [one_by_one, in_one_pass])
def test_lora_fa_keeps_a_and_trains_b(optimizer: Any) -> None:
    ours, before = descended(Lora(rank=3, freeze_a=True), "llama-causal", optimizer, weight_decay=0.1)
    for name, value in ours.items():
        assert torch.equal(value, before[name]) == name.endswith("/A"), name
    _, backbone = tiny("llama-causal")
    for freeze_a in (True, False):
        architecture = placed(Lora(rank=3, freeze_a=freeze_a), backbone)
        sites = [backbone.site(name) for name, _ in architecture]
        of_b, of_a = (sum(3 * getattr(site, side) for site in sites) for side in ("out_features", "in_features"))
        assert architecture.num_params(backbone) == of_b + of_a * (not freeze_a)
        assert architecture.stored_bytes(backbone) == 4 * (of_a + of_b)


@pytest.mark.parametrize("optimizer", [one_by_one, in_one_pass])
@pytest.mark.parametrize("kind", [Bottleneck, Ia3, Tied], ids=lambda kind: kind.kind)
def test_a_rate_is_another_learning_rate(tied: type[Tied], kind: type[AdapterSpec], optimizer: Any) -> None:  # noqa: F811
    """Half of the learning rate by the factor is half of it by the training, for types of all kinds of tensors."""
    ours, _ = descended(kind(rate=0.5), "llama-causal", optimizer)
    model, backbone = tiny("llama-causal")
    with Attachment(model, backbone, [placed(kind(), backbone)], [1]) as attachment:
        attachment.train()
        step = optimizer(attachment, Training(learning_rate=RATE / 2, max_grad_norm=0.0))
        for number in range(1, STEPS + 1):
            model(tokens(seed=number)).logits.square().mean().backward()
            step(number)
        expected = attachment.state()
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


def test_a_rate_of_the_backbone_leaves_the_head() -> None:
    model, backbone = tiny("bert")
    architecture = Architecture.of({"backbone": [Full(rate=0.25)]})
    with Attachment(model, backbone, [architecture], [1]) as attachment:
        factors = rate_factors(attachment)
        heads = {value for bank in attachment.banks for _, value, _ in bank.trained()}
        assert heads
        assert {factors[parameter] for parameter, _ in attachment.trainable() if parameter not in heads} == {0.25}
        assert {factors[parameter] for parameter in heads} == {1.0}


def test_rates_in_a_pack_are_those_alone(loaded: LoadedBackbone) -> None:  # noqa: F811
    """LoRA+, LoRA-FA, factors and mixtures side by side, with dropout, decay, clipping and schedules."""
    wanted = requests(
        [
            at(loaded, Lora(rank=3, dropout=0.2, rate_ratio=2.0), 0),
            at(loaded, Lora(rank=5, dropout=0.1, freeze_a=True, rate=0.5), 1),
            at(loaded, Lora(rank=2), 0),
            at(loaded, Mixture(expert=Lora(rank=2, rate=0.3, rate_ratio=2.0), experts=3), 1),
            at(loaded, Lora(rank=4, freeze_a=True), 0),
        ],
        keep_weights=True,
    )
    found = together(loaded, pack=8).evaluate(wanted)
    expected = alone(loaded).evaluate(wanted)
    compare(found, expected, 5e-5)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.weights is not None
        assert theirs.weights is not None
        torch.testing.assert_close(dict(ours.weights), dict(theirs.weights), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("spec", [Lora(), Dora(), Bottleneck(), Mixture(), Ia3()], ids=lambda spec: spec.kind)
def test_new_fields_at_their_defaults_enter_no_key(spec: AdapterSpec) -> None:
    text = str(spec.to_dict())
    assert not any(name in text for name in ("rate'", "rate_ratio", "freeze_a"))
    assert spec_from_dict(spec.to_dict()) == spec


def test_the_fields_survive_their_dictionary() -> None:
    spec = Lora(rate=0.1, rate_ratio=16.0, freeze_a=True)
    assert spec.to_dict() | {"rate": 0.1, "rate_ratio": 16.0, "freeze_a": True} == spec.to_dict()
    mixture = Mixture(expert=spec)
    assert spec_from_dict(mixture.to_dict()) == mixture


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (Lora, {"rate": 0.0}, "rate must be greater than 0"),
        (Ia3, {"rate": -1.0}, "rate must be at least 0"),
        (Dora, {"rate_ratio": 0.0}, "rate_ratio must be greater than 0"),
        (Mixture, {"rate": 0.5}, "set it on the experts"),
    ],
)
def test_bad_values_are_refused(kind: type[AdapterSpec], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**fields)


def test_a_space_searches_them() -> None:
    _, backbone = tiny("bert")
    fields: dict[str, Any] = {
        "rank": Choice.of([2, 4]),
        "rate": Float(low=0.1, high=1.0, log=True),
        "rate_ratio": Choice.of([1.0, 4.0, 16.0]),
        "freeze_a": Choice.of([False, True]),
        "experts": Choice.of([0, 2]),
    }
    space = SearchSpace(backbone=backbone, adapters={"lora": AdapterChoice(kind="lora", fields=fields)})
    rng = random.Random(0)
    seen = set()
    for _ in range(40):
        genes = space.sample(rng)
        candidate = space.decode(genes)
        assert locate(space, candidate) is not None
        seen |= {(spec.plain.to_dict().get("rate_ratio"), spec.kind) for _, spec in candidate.architecture}
    assert len(seen) == 6


def test_a_frozen_a_gets_no_gradient_and_no_moments() -> None:
    model, backbone = tiny("bert")
    with Attachment(model, backbone, [placed(Lora(freeze_a=True), backbone)], [1]) as attachment:
        names = {name for bank in attachment.banks if bank.site.role != "head" for name, _, _ in bank.trained()}
        assert names == {"B"}
        model(tokens()).logits.square().mean().backward()
        assert all(bank.values["A"].grad is None for bank in attachment.banks if "A" in bank.values)
