"""Supernets: a subnet is the stand-alone candidate with the weights that it inherits, however many are side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.backbones import LoadedBackbone
from autopeft.evaluators.proxies import supernet as module
from autopeft.evaluators.proxies.supernet import Supernet
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.declaration import AdapterChoice, OneOf
from autopeft.search_space.domains import Choice, Int
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.search_space.training import Training
from autopeft.searchers.scored.policies import POLICIES, SUBNETS, preferred

from ...support.slow import mostly_slow
from ..training.test_packed import loaded, together  # noqa: F401  (a fixture)

TRAINING = Training(learning_rate=2e-2, epochs=2, batch_size=8, warmup=0.1, weight_decay=0.01)
STEPS = 12


def space_of(backbone: Backbone) -> SearchSpace:
    """Every way of sharing: nested ranks, a choice of types, activations with weights of their own, two of one kind,
    nested experts.
    """
    sizes = Choice.of([0, 1, 2, 4])
    return SearchSpace(
        backbone=backbone,
        adapters={
            "qv": AdapterChoice(kind="lora", fields={"rank": sizes, "dropout": 0.1}, vary={"rank": "layer"}),
            "again": AdapterChoice(kind="lora", at=("attn.q",), placement="model", fields={"rank": Int(low=1, high=3)}),
            "mlp": AdapterChoice(
                kind="bottleneck",
                at=("mlp",),
                fields={"size": Choice.of([2, 5]), "activation": Choice.of(["relu", "gelu"]), "init": "kaiming"},
                vary={"size": "stage"},
            ),
            "scales": AdapterChoice(kind="ia3"),
            "experts": AdapterChoice(
                kind="lora",
                at=("attn.o",),
                fields={
                    "rank": Choice.of([1, 2]),
                    "experts": Choice.of([0, 2, 4]),
                    "router": Choice.of(["token", "sigmoid"]),
                    "top_k": Choice.of([1, 3]),
                    "shared_experts": 1,
                },
                vary={"experts": "layer", "rank": "layer"},
            ),
            "prefix": AdapterChoice(kind="prefix", placement="layer", fields={"length": Choice.of([1, 3])}),
        },
        one_of=[OneOf(name="type", members=("mlp", "scales"), per="layer", optional=True)],
        stages=2,
    )


def drawn(space: SearchSpace, count: int, seed: int = 0) -> list[Architecture]:
    rng = Random(seed)
    found = [space.decode(space.sample(rng)).architecture for _ in range(4 * count)]
    return [architecture for architecture in dict.fromkeys(found) if architecture][:count]


@pytest.fixture
def evaluator(loaded: LoadedBackbone) -> PackedEvaluator:  # noqa: F811
    return together(loaded)


def untrained(evaluator: PackedEvaluator, **settings: Any) -> Supernet:
    return Supernet(evaluator, space_of(evaluator.backbone), TRAINING, 0, **settings)


def shaken(supernet: Supernet) -> Supernet:
    """No weight at a special value: zeros would hide what is read from the wrong place."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value, _ in supernet.weights.trainable():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return supernet


def test_a_slice_is_the_stand_alone_candidate(evaluator: PackedEvaluator) -> None:
    supernet = shaken(untrained(evaluator))
    for architecture in drawn(space_of(evaluator.backbone), 6):
        with supernet.attach([architecture], [0]) as inherited:
            state = inherited.state()
            (shared,) = evaluator.columns(inherited, "validation")
        with Attachment(evaluator.model, evaluator.backbone, [architecture], [0]) as alone:
            alone.load_state(state)
            (own,) = evaluator.columns(alone, "validation")
        assert own["loss"] == pytest.approx(shared["loss"], abs=1e-5)


def gradients(supernet: Supernet, architectures: Sequence[Architecture], banks: Sequence[int]) -> list[torch.Tensor]:
    for value, _ in supernet.weights.trainable():
        value.grad = None
    with supernet.attach(architectures, banks) as attachment:
        attachment.eval()  # dropout would draw by the place in the pack
        supernet.evaluator.scores(attachment, "train", range(8))["loss"].mean(1).sum().backward()
    return [torch.zeros_like(v) if v.grad is None else v.grad.clone() for v, _ in supernet.weights.trainable()]


@pytest.mark.parametrize("num_banks", [1, 2])
def test_gradients_of_subnets_side_by_side_are_the_sum_of_separate_ones(
    evaluator: PackedEvaluator, num_banks: int
) -> None:
    supernet = shaken(untrained(evaluator, num_banks=num_banks))
    architectures = drawn(space_of(evaluator.backbone), 5)
    banks = [k % num_banks for k in range(5)]
    together_ = gradients(supernet, architectures, banks)
    apart = [gradients(supernet, [a], [bank]) for a, bank in zip(architectures, banks, strict=True)]
    assert any(gradient.abs().max() > 1e-3 for gradient in together_)
    for found, parts in zip(together_, zip(*apart, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(parts).sum(0), atol=1e-5, rtol=1e-4)


def test_scores_are_the_held_out_losses(evaluator: PackedEvaluator) -> None:
    """Whatever is shared below: by the best depth, by another, by none."""
    supernet = shaken(untrained(evaluator))
    architectures = drawn(space_of(evaluator.backbone), 12)
    expected = []
    for architecture in architectures:
        with supernet.attach([architecture], [0]) as attachment:
            (columns,) = evaluator.columns(attachment, "validation", supernet.examples)
            expected.append(sum(columns["loss"]) / len(columns["loss"]))
    assert supernet.scores(architectures) == pytest.approx(expected, abs=1e-5)
    for depth in range(evaluator.backbone.num_layers + 1):
        supernet._best_depth = lambda subnets, depth=depth: depth  # type: ignore[method-assign,misc]
        assert supernet.scores(architectures) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_trains(evaluator: PackedEvaluator, name: str) -> None:
    policy = POLICIES[name](space_of(evaluator.backbone), 0)
    supernet = untrained(evaluator, num_banks=policy.num_banks, bank_of=policy.bank_of)
    losses = supernet.train(policy.subnets, 3 * STEPS)
    assert all(len(row) == SUBNETS for row in losses)
    begin, end = (sum(map(sum, part)) for part in (losses[:STEPS], losses[-STEPS:]))
    assert end < begin
    scores = supernet.scores(drawn(policy.space, 5))
    assert len(set(scores)) == 5


def test_every_set_of_weights_of_a_mixture_trains_as_much(evaluator: PackedEvaluator) -> None:
    policy = POLICIES["mixture"](space_of(evaluator.backbone), 0)
    supernet = shaken(untrained(evaluator, num_banks=policy.num_banks, bank_of=policy.bank_of))
    for number in range(1, 6):
        banks = supernet._banks(policy.subnets(number), range(8))
        assert sorted(banks) == [0, 0, 1, 1]


def test_distillation_follows_the_largest(evaluator: PackedEvaluator) -> None:
    policy = POLICIES["sandwich"](space_of(evaluator.backbone), 0)
    supernet = untrained(evaluator, distil=True)
    supernet.train(policy.subnets, STEPS)
    with supernet.attach(policy.subnets(1), [0] * SUBNETS) as attachment:
        attachment.eval()
        loss, taught = supernet._losses(attachment, range(8))
    with supernet.attach([policy.subnets(1)[0]] * 2, [0, 0]) as attachment:
        attachment.eval()
        _, distance = supernet._losses(attachment, range(8))
    assert taught is not None
    assert distance is not None
    assert torch.equal(taught[0], loss[0])
    assert distance[1].item() == pytest.approx(0.0, abs=1e-6)
    assert (taught[1:] > 1e-6).all()


class KilledError(Exception):
    pass


@pytest.mark.slow
def test_a_killed_training_goes_on(evaluator: PackedEvaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS_BETWEEN_CHECKPOINTS", 4)
    policy = POLICIES["sandwich"](space_of(evaluator.backbone), 0)
    whole = untrained(evaluator)
    losses = whole.train(policy.subnets, STEPS)

    def kill(done: int, total: int) -> None:
        if done == 7:
            raise KilledError

    file = tmp_path / "supernet.pt"
    with pytest.raises(KilledError):
        untrained(evaluator).train(policy.subnets, STEPS, checkpoint=file, key="a", progress=kill)
    seen: list[int] = []
    resumed = untrained(evaluator)
    assert resumed.train(
        policy.subnets, STEPS, checkpoint=file, key="a", progress=lambda done, total: seen.append(done)
    ) == losses  # fmt: skip
    assert seen == list(range(5, STEPS + 1))
    for (a, _), (b, _) in zip(whole.weights.trainable(), resumed.weights.trainable(), strict=True):
        assert torch.equal(a, b)
    again = untrained(evaluator)
    again.train(policy.subnets, STEPS, checkpoint=file, key="another", progress=lambda done, total: seen.append(done))
    assert seen[-STEPS:] == list(range(1, STEPS + 1))
    for damaged in (file.read_bytes()[:-100], b"", b"no checkpoint"):
        file.write_bytes(damaged)
        assert untrained(evaluator).train(policy.subnets, STEPS, checkpoint=file, key="a") == losses


def test_the_model_is_left_as_it_was(evaluator: PackedEvaluator) -> None:
    before = {name: value.clone() for name, value in evaluator.model.state_dict().items()}
    supernet = untrained(evaluator)
    supernet.train(POLICIES["uniform"](space_of(evaluator.backbone), 0).subnets, 3)
    supernet.scores(drawn(space_of(evaluator.backbone), 3))
    for name, value in evaluator.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(module._forward_hooks for module in evaluator.model.modules())


def test_a_backbone_cannot_be_shared(evaluator: PackedEvaluator) -> None:
    space = SearchSpace(
        backbone=evaluator.backbone,
        adapters={
            "full": AdapterChoice(kind="full"),
            "lora": AdapterChoice(kind="lora", fields={"rank": Choice.of([1, 2])}),
        },
    )
    with pytest.raises(ValueError, match=r"'full'.*trains the backbone"):
        Supernet(evaluator, space, TRAINING, 0)


@pytest.mark.parametrize("name", mostly_slow(POLICIES, "sandwich", "fair"))
def test_policies_replay_and_never_draw_nothing(evaluator: PackedEvaluator, name: str) -> None:
    space = space_of(evaluator.backbone)
    for number in range(1, 30):
        first, again = (POLICIES[name](space, 3).subnets(number) for _ in range(2))
        assert first == again
        assert len(first) == SUBNETS
        assert all(first)


def test_a_filter_keeps_the_best_of_each_size(evaluator: PackedEvaluator) -> None:
    space = space_of(evaluator.backbone)

    def most_layers(architectures: Sequence[Architecture]) -> list[float]:
        return [-float(len(architecture.adapters)) for architecture in architectures]

    pool = preferred(space, 0, most_layers)
    policy = POLICIES["uniform"](space, 0, pool)
    chosen = [a for number in range(1, 9) for a in policy.subnets(number)]
    every = [a for number in range(1, 9) for a in POLICIES["uniform"](space, 0).subnets(number)]
    assert sum(most_layers(chosen)) < sum(most_layers(every))
