"""Supernets, gates and proxies without training on a quantised backbone: as on its dequantised weights."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch

from autopeft.evaluators.proxies import PROXIES
from autopeft.evaluators.proxies.gates import Gates
from autopeft.evaluators.proxies.supernet import Supernet
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.search_space import AdapterChoice, Choice, SearchSpace
from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.training import Training

from ...support.tiny_models import save, word_tokenizer
from ..training.test_packed import together
from ..training.test_quantised import MODELS, in_full, load

pytest.importorskip("bitsandbytes")
torch.set_num_threads(1)

TRAINING = Training(learning_rate=1e-2, epochs=2, batch_size=8)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[PackedEvaluator, PackedEvaluator]:
    """A Llama in NF4, and the reference: plain linears with the same values."""
    folder = save(MODELS["llama"](), Path(tmp_path_factory.mktemp("llama")), word_tokenizer())
    quantised = load(folder, "nf4")
    return together(quantised), together(in_full(quantised, folder))


def space_of(backbone: Backbone) -> SearchSpace:
    ranks = Choice.of([0, 1, 2, 4])
    lora = AdapterChoice(kind="lora", at=("attn.q", "mlp.down"), fields={"rank": ranks}, vary={"rank": "layer"})
    return SearchSpace(backbone=backbone, adapters={"lora": lora, "ia3": AdapterChoice(kind="ia3")})


@pytest.mark.parametrize("name", PROXIES)
def test_proxies_without_training(pair: tuple[PackedEvaluator, PackedEvaluator], name: str) -> None:
    space, rng = space_of(pair[0].backbone), Random(0)
    architectures = [space.decode(space.sample(rng)).architecture for _ in range(4)]
    ours, theirs = (PROXIES[name](evaluator).scores(architectures) for evaluator in pair)
    assert ours == pytest.approx(theirs, rel=1e-3, nan_ok=True)


def test_a_supernet(pair: tuple[PackedEvaluator, PackedEvaluator]) -> None:
    found = []
    for evaluator in pair:
        space, rng = space_of(evaluator.backbone), Random(0)
        architectures = [space.decode(space.sample(rng)).architecture for _ in range(4)]
        supernet = Supernet(evaluator, space, TRAINING, 0)
        supernet.train(lambda step, subnets=architectures: subnets[:2], 4)
        found.append(supernet.scores(architectures))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_gates(pair: tuple[PackedEvaluator, PackedEvaluator]) -> None:
    ours, theirs = (Gates(one, space_of(one.backbone), TRAINING, 0, 0.1).train(4) for one in pair)
    assert ours == pytest.approx(theirs, rel=1e-4)
