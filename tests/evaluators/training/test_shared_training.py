"""Training with tensors that sites share: packed AdamW takes each of them once, as torch's does."""

from __future__ import annotations

import pytest
import torch

from autopeft.evaluators.backbones import LoadedBackbone
from autopeft.evaluators.costs.measurement import measure
from autopeft.evaluators.proxies.gates import Gates
from autopeft.evaluators.proxies.supernet import Supernet
from autopeft.search_space.adapters import Lora
from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.declaration import AdapterChoice
from autopeft.search_space.domains import Choice
from autopeft.search_space.problem import Fidelity
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.searchers.scored.policies import POLICIES

from ...support.slow import slow
from ...support.tied import Tied, tied  # noqa: F401  (a fixture)
from ..proxies.test_gates import gated, shake, ungated
from ..proxies.test_supernet import STEPS, TRAINING, drawn
from .test_packed import alone, at, compare, loaded, requests, together  # noqa: F401  (a fixture)

pytestmark = pytest.mark.usefixtures("tied")


def test_a_candidate_in_a_pack_is_the_candidate_alone(loaded: LoadedBackbone) -> None:  # noqa: F811
    """With own rates, decay and clipping, over rungs, and in packs that lose and gain slots."""
    specs = (Tied(rank=2), Tied(rank=4), Lora(rank=2), Tied(rank=1))
    wanted = requests(
        [at(loaded, spec, k % 3) for k, spec in enumerate(specs)], fidelity=Fidelity(rungs=(0.4,)), keep_weights=True
    )
    expected = alone(loaded).evaluate(wanted)
    for pack in (8, 3):
        found = together(loaded, pack=pack).evaluate(wanted)
        compare(found, expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.weights
            assert theirs.weights
            assert ours.weights.keys() == theirs.weights.keys()
            for name, value in ours.weights.items():
                torch.testing.assert_close(value, theirs.weights[name], rtol=1e-3, atol=1e-5)


def test_measured_memory_has_each_tensor_once(loaded: LoadedBackbone) -> None:  # noqa: F811
    evaluator = together(loaded)
    backbone = loaded.backbone
    (request,) = requests([at(loaded, Tied(rank=4), 0)])
    with evaluator.attach(request) as attachment:
        batch = evaluator.longest_batch(request.candidate)
        found = measure(attachment, evaluator.task, batch, frozenset({"peak_memory_bytes"}))
        tensors = {id(t): t.nbytes for t in (*attachment.model[0].parameters(), *attachment.parameters())}
        heads = sum(v.nbytes for name, v in attachment.state().items() if name.startswith("head."))
        own = sum(p.nbytes for p in attachment.parameters())
        assert own - heads == 4 * request.candidate.architecture.total_params(backbone)
        assert found.values["peak_memory_bytes"] > sum(tensors.values())


def space_of(backbone: Backbone, *kinds: str) -> SearchSpace:
    sizes = Choice.of([0, 1, 2])
    return SearchSpace(
        backbone=backbone,
        adapters={kind: AdapterChoice(kind=kind, fields={"rank": sizes}, vary={"rank": "layer"}) for kind in kinds},
    )


@pytest.mark.parametrize("name", ["uniform", slow("mixture")])
def test_supernets_train(loaded: LoadedBackbone, name: str) -> None:  # noqa: F811
    evaluator = together(loaded)
    policy = POLICIES[name](space_of(evaluator.backbone, "tied", "vera", "shira"), 0)
    supernet = Supernet(evaluator, policy.space, TRAINING, 0, num_banks=policy.num_banks, bank_of=policy.bank_of)
    losses = supernet.train(policy.subnets, 3 * STEPS)
    begin, end = (sum(map(sum, part)) for part in (losses[:STEPS], losses[-STEPS:]))
    assert end < begin
    assert len(set(supernet.scores(drawn(policy.space, 5)))) == 5


def test_gates_see_the_same_network(loaded: LoadedBackbone) -> None:  # noqa: F811
    evaluator = together(loaded)
    gates = Gates(evaluator, space_of(evaluator.backbone, "vera", "shira"), TRAINING, 0, 0.0)
    shake(gates)
    largest = gates.space.decode(gates.space.largest()).architecture
    found, num_params = gated(gates)
    assert num_params == largest.num_params(evaluator.backbone)
    torch.testing.assert_close(found, ungated(gates, largest), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="type 'tied': its sites share"):
        Gates(evaluator, space_of(evaluator.backbone, "tied"), TRAINING, 0, 0.0)
