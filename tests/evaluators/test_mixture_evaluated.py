"""Mixtures in the evaluators: alone, in packs, above layers that ran before, and in a supernet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.attachment.shared_weights import SharedWeights
from autopeft.evaluators.backbones import LoadedBackbone
from autopeft.evaluators.data.splits import Splits
from autopeft.evaluators.training.activations import ActivationCache
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.evaluators.training.train import TrainEvaluator
from autopeft.search_space import AdapterChoice, Architecture, Choice, SearchSpace
from autopeft.search_space.adapters import Bottleneck, Dora, Lora, Mixture
from autopeft.testing.models import tiny, tokens

from .tasks.test_causal_lm import TRAIN, rows
from .tasks.test_causal_lm import loaded as causal  # noqa: F401  (a fixture)
from .training.test_packed import alone, at, compare, loaded, requests, together  # noqa: F401  (a fixture)

torch.set_num_threads(1)


def candidates(backbone: LoadedBackbone, lowest: int = 1) -> list[Architecture]:
    specs = [
        Mixture(expert=Lora(rank=2, dropout=0.1), experts=4, balance=0.1, router_noise=0.1),
        Mixture(expert=Lora(rank=3), experts=2, top_k=1, router="sigmoid"),
        Mixture(expert=Dora(rank=2), experts=3, shared_experts=1, z_loss=0.01),
        Mixture(expert=Lora(dropout=0.1), experts=3, ranks=(1, 4, 2)),
    ]
    mlp = Mixture(expert=Bottleneck(size=3), experts=3, balance=0.05)
    return [*(at(backbone, spec, lowest, ("attn.q", "mlp.up")) for spec in specs), at(backbone, mlp, lowest, ("mlp",))]


@pytest.mark.slow
def test_packs_are_what_each_is_alone(loaded: LoadedBackbone) -> None:  # noqa: F811
    wanted = requests([*candidates(loaded), at(loaded, Lora(rank=2), 1)])
    expected = alone(loaded).evaluate(wanted)
    for settings in ({"share_lower_layers": False}, {"pack": 2}, {"cache": ActivationCache(10**7)}, {}):
        compare(together(loaded, **settings).evaluate(wanted), expected)


def test_packs_of_a_causal_model_too(causal: LoadedBackbone, tmp_path: Path) -> None:  # noqa: F811
    splits = Splits(TRAIN[:48], rows("validation", 40), rows("test", 10), None)
    wanted = requests(candidates(causal), test=True)
    expected = TrainEvaluator(causal, "causal-lm", splits, max_length=32).evaluate(wanted)
    found = expected[0].measurement
    assert found is not None
    assert found.routes
    assert found.averaged
    for settings in ({"share_lower_layers": False}, {"pack": 1}, {"cache": ActivationCache(10**7)}, {"pack": 2}):
        evaluator = PackedEvaluator(causal, "causal-lm", splits, 32, **settings)  # type: ignore[arg-type]
        outcomes = evaluator.evaluate(wanted)
        compare(outcomes, expected)
        for ours, theirs in zip(outcomes, expected, strict=True):
            assert ours.measurement is not None
            assert theirs.measurement is not None
            for site, route in theirs.measurement.routes.items():
                assert ours.measurement.routes[site]["load"] == pytest.approx(route["load"], abs=2e-3)


def test_what_has_no_mixture_has_no_average(loaded: LoadedBackbone) -> None:  # noqa: F811
    wanted = requests([candidates(loaded)[0], at(loaded, Lora(rank=2), 1)], test=True)
    mixed, plain = (outcome.measurement for outcome in together(loaded).evaluate(wanted))
    assert mixed is not None
    assert plain is not None
    assert mixed.averaged.keys() == {"loss", "accuracy"}
    assert plain.averaged == {}


def test_shared_weights_have_room_for_many_experts_and_for_large_ones() -> None:
    model, backbone = tiny("bert")
    space = SearchSpace(
        backbone=backbone,
        adapters={
            "few": AdapterChoice(kind="lora", at=("attn.q",), placement="model", fields={"rank": 8, "experts": 2}),
            "many": AdapterChoice(
                kind="lora", at=("attn.q",), placement="model", fields={"rank": 2, "experts": Choice.of([3, 6])}
            ),
        },
    )
    shared = SharedWeights(model, space, seed=0)
    for on in ("few", "many"):
        genes = {"few.on": on == "few", "many.on": on == "many", "many.experts": 6}
        for name, spec in space.decode(space.completed(genes)).architecture:
            bank = shared.bank(backbone.site(name), spec.structure())
            for key, parameter in spec.parameters(backbone.site(name)).items():
                assert all(own <= has for own, has in zip(parameter.shape, bank.values[key].shape[1:], strict=True))


def test_shared_weights_of_mixtures_side_by_side_begin_apart() -> None:
    """Those of one declaration, of which a candidate has one, begin alike. Both are found again by who follows them."""
    model, backbone = tiny("bert")
    fields = {"experts": 2, "router": Choice.of(["token", "sigmoid"])}
    choice = AdapterChoice(kind="lora", at=("attn.q", "attn.v"), fields=fields, router_per="layer")
    site = backbone.site("layers.0.attn.q")

    def starts(space: SearchSpace, **genes: str) -> list[torch.Tensor]:
        shared = SharedWeights(model, space, seed=0)
        architecture = space.decode(genes).architecture
        with Attachment(model, backbone, [architecture], [0], shared=shared) as attachment, torch.no_grad():
            model(tokens())
            return [bank.values["A"].clone() for bank in attachment.banks if bank.site == site]

    single = SearchSpace(backbone=backbone, adapters={"lora": choice})
    (token,), (sigmoid,) = (starts(single, **{"lora.router": router}) for router in ("token", "sigmoid"))
    assert torch.equal(token, sigmoid)
    both = SearchSpace(backbone=backbone, adapters={"lora": choice, "again": choice})
    for first, second in (("token", "sigmoid"), ("sigmoid", "token"), ("token", "token")):
        one, two = starts(both, **{"lora.router": first, "again.router": second})
        assert not torch.equal(one, two)


def test_shared_weights_have_no_ranks_of_each_expert() -> None:
    model, backbone = tiny("bert")
    fields = {"rank": Choice.of([1, 2]), "experts": Choice.of([0, 2])}
    choice = AdapterChoice(kind="lora", fields=fields, vary={"rank": "expert"})
    space = SearchSpace(backbone=backbone, adapters={"lora": choice})
    with pytest.raises(ValueError, match="a supernet cannot share 'lora': its experts have different ranks"):
        SharedWeights(model, space, seed=0)
