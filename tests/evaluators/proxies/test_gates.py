"""Gates: an exact network forward, the derivative of fading its adapters in and out backward."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.backbones import load_backbone
from autopeft.evaluators.data.splits import Splits
from autopeft.evaluators.proxies.decisions import Decision, nested
from autopeft.evaluators.proxies.gates import GatedAttachment, Gates
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.search_space import AdapterChoice, Choice, Float, Int, OneOf, SearchSpace
from autopeft.search_space.adapters import Lora
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.domains import BOOLEAN
from autopeft.search_space.spaces.location import locate
from autopeft.search_space.training import Training

from ...support.slow import QUICK_FAMILY, mostly_slow
from ...support.tiny_models import save, seeded, word_tokenizer
from ..training.test_train import LABELS, rows
from .test_proxies import unchanged

torch.set_num_threads(1)

SPLITS = Splits(rows("train", 80), rows("validation", 50), rows("test", 20), LABELS)
SHAPE = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}
CLASSIFIER = SHAPE | {"vocab_size": 40, "num_labels": 3, "pad_token_id": 0}
MODELS: dict[str, Any] = {
    "bert": (BertForSequenceClassification, BertConfig(**CLASSIFIER)),
    "llama": (LlamaForSequenceClassification, LlamaConfig(**CLASSIFIER)),
}
TRAINING = Training(learning_rate=1e-2, batch_size=8, weight_decay=0.01)
RANKS = Choice.of((0, 1, 2, 4))
LORA = AdapterChoice(kind="lora", at=("attn.q", "mlp.up"), fields={"rank": RANKS}, vary={"rank": "layer"})
NET = {"size": Choice.of((2, 5)), "init": "houlsby", "activation": "gelu"}  # smooth, for finite differences
BOTTLENECK = AdapterChoice(kind="bottleneck", fields=NET)
#: Spaces by name: what `SearchSpace` takes beside the backbone.
SPACES: dict[str, dict[str, Any]] = {
    "sizes": {"adapters": {"lora": LORA}},
    "stages": {"adapters": {"lora": replace(LORA, vary={"rank": "stage"}, placement="site")}, "stages": 2},
    "types": {
        "adapters": {
            "lora": AdapterChoice(kind="lora", at=("mlp.up",), fields={"rank": Choice.of((1, 3))}),
            "wide": AdapterChoice(kind="lora", at=("mlp.up", "mlp.down"), fields={"rank": 4, "alpha": 8.0}),
            "net": replace(BOTTLENECK, fields={**NET, "form": Choice(choices=("serial", "parallel"))}),
        },
        "one_of": [OneOf(name="type", members=("lora", "wide", "net"), per="layer", optional=True)],
        "layer_gate": True,
    },
    "several": {
        "adapters": {
            "lora": replace(LORA, fields={"rank": RANKS, "dropout": 0.1}),
            "net": replace(BOTTLENECK, placement="layer"),
            "scales": AdapterChoice(kind="ia3", placement="stage"),
            "norms": AdapterChoice(kind="norm", placement="layer"),
        },
        "training": {"learning_rate": Float(low=1e-3, high=1e-1, log=True), "batch_size": Choice.of((8, 16))},
    },
}  # fmt: skip


def over(name: str, folder: Path, **settings: Any) -> PackedEvaluator:
    make, config = MODELS[name]
    saved = save(seeded(make, config), folder, word_tokenizer())
    loaded = load_backbone(saved, task="classification", labels=LABELS, **settings)
    return PackedEvaluator(replace(loaded, pretrained_head=False), "classification", SPLITS, max_length=16)


@pytest.fixture(scope="module", params=mostly_slow(MODELS, QUICK_FAMILY))
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PackedEvaluator:
    return over(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def evaluator(kept: PackedEvaluator) -> Iterator[PackedEvaluator]:
    """After every test the backbone is what it was, bit for bit."""
    for _ in unchanged(kept):
        yield kept


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> PackedEvaluator:
    """BERT in double precision; the norms of a Llama compute in single."""
    evaluator = over("bert", tmp_path_factory.mktemp("double"))
    evaluator.model.double()
    return evaluator


def build(evaluator: PackedEvaluator, name: str, penalty: float = 0.0, **settings: Any) -> Gates:
    space = SearchSpace(backbone=evaluator.backbone, **SPACES[name])
    gates = Gates(evaluator, space, TRAINING, 0, penalty, **settings)
    shake(gates)
    return gates


@torch.no_grad()
def shake(gates: Gates) -> None:
    """Weights as if they had been trained."""
    for n, (value, _) in enumerate(gates.weights.trainable()):
        value += 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(n))


def logits_of(evaluator: PackedEvaluator) -> Tensor:
    return evaluator.model(**{n: t for n, t in evaluator.batch("train", range(8)).items() if n != "targets"}).logits


def ungated(gates: Gates, architecture: Architecture) -> Tensor:
    """What the architecture computes with the shared weights."""
    evaluator = gates.evaluator
    with Attachment(evaluator.model, evaluator.backbone, [architecture], [0], shared=gates.weights) as attachment:
        attachment.eval()
        return logits_of(evaluator)


def gated(gates: Gates, weights: Mapping[str, Tensor] | None = None) -> tuple[Tensor, float]:
    """What the gates' network computes, and the parameters that it counts."""
    with gates.attach() as attachment:
        attachment.eval()
        num_params = attachment.weigh(gates.value_weights() if weights is None else weights)
        return logits_of(gates.evaluator), num_params.item()


def set_to(gates: Gates, assignment: Mapping[str, Any]) -> None:
    """Logits that choose an assignment of the active genes."""
    with torch.no_grad():
        for gene, value in assignment.items():
            if gene in gates.decisions:
                decision = gates.decisions[gene]
                place = torch.tensor(decision.index(value))
                if decision.ordered:
                    decision.logits.copy_(torch.where(torch.arange(len(decision.logits)) < place, 0.5, -0.5))
                else:
                    decision.logits.copy_(F.one_hot(place, len(decision.values)))


# Forward


@pytest.mark.parametrize("name", SPACES)
def test_open_gates_are_the_largest_architecture(evaluator: PackedEvaluator, name: str) -> None:
    gates = build(evaluator, name)
    largest = gates.space.decode(gates.space.largest()).architecture
    assert gates.space.decode(gates.chosen()).architecture == largest
    found, num_params = gated(gates)
    assert num_params == largest.num_params(evaluator.backbone)
    torch.testing.assert_close(found, ungated(gates, largest), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sizes", "stages", "types"])
def test_closed_gates_are_the_bare_model(evaluator: PackedEvaluator, name: str) -> None:
    gates = build(evaluator, name)
    set_to(gates, gates.space.smallest())
    found, num_params = gated(gates)
    assert num_params == 0
    torch.testing.assert_close(found, ungated(gates, Architecture()), rtol=0, atol=0)
    assert not gates.space.decode(gates.chosen()).architecture


@pytest.mark.parametrize("name", SPACES)
def test_any_setting_is_its_architecture(evaluator: PackedEvaluator, name: str) -> None:
    """Also of genes that do not count: what stands behind a closed gate changes nothing."""
    rng = Random(1)
    gates = build(evaluator, name)
    for _ in range(8):
        assignment = gates.space.sample(rng)
        set_to(gates, {gene.name: gene.domain.sample(rng) for gene in gates.space.genes} | assignment)
        architecture = gates.space.decode(assignment).architecture
        assert gates.space.decode(gates.chosen()).architecture == architecture
        found, num_params = gated(gates)
        assert num_params == architecture.num_params(evaluator.backbone)
        torch.testing.assert_close(found, ungated(gates, architecture), rtol=1e-4, atol=1e-5)


def test_sizes_are_nested() -> None:
    """A gate above a closed one does not count, and no weight but one is 1."""
    decision = Decision((1, 2, 4, 8), True, 8, torch.device("cpu"))
    cases = {(1, 1, 1): 8, (1, 1, -1): 4, (1, -1, 1): 2, (-1, 1, 1): 1, (-1, -1, -1): 1}
    for logits, value in cases.items():
        with torch.no_grad():
            decision.logits.copy_(torch.tensor(logits))
        assert decision.value() == value
        assert decision.weights().tolist() == [float(v == value) for v in decision.values]
        h = torch.tensor(logits).double().sigmoid()
        by_hand = [1 - h[0], h[0] * (1 - h[1]), h[0] * h[1] * (1 - h[2]), h[0] * h[1] * h[2]]
        torch.testing.assert_close(decision.probabilities(), torch.stack(by_hand).float())
    assert [decision.index(size) for size in (1, 3, 4, 7, 8)] == [0, 2, 2, 3, 3]


@pytest.mark.parametrize("ordered", [True, False])
def test_values_are_drawn_by_their_probability(ordered: bool) -> None:
    decision = Decision((0, 1, 2), ordered, 1, torch.device("cpu"))
    noise = torch.Generator().manual_seed(0)
    drawn = torch.stack([decision.weights(noise).detach() for _ in range(2000)])
    assert set(drawn.sum(1).tolist()) == {1.0}
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(drawn.mean(0), decision.probabilities().detach(), rtol=0, atol=0.04)
    assert decision.weights().tolist() == ([0.0, 0.0, 1.0] if ordered else [0.0, 1.0, 0.0])


# Backward


def loss_of(evaluator: PackedEvaluator, attachment: GatedAttachment, weights: Mapping[str, Tensor]) -> Tensor:
    """Of the task, in the model's precision, and of the parameters."""
    share = attachment.weigh(weights) / 1e3
    return F.cross_entropy(logits_of(evaluator), evaluator.batch("train", range(8))["targets"]) + 0.1 * share


@pytest.mark.parametrize("name", SPACES)
def test_gradients_of_the_logits(double: PackedEvaluator, name: str) -> None:
    """A gate's: the central difference of the loss in the gate's value, times the derivative of its sigmoid. A type's:
    differences in its weights, through the Jacobian of the softmax. With some gates open and others closed.
    """
    gates = build(double, name)
    gates.weights.double()
    for n, (gene, decision) in enumerate(gates.decisions.items()):
        with torch.no_grad():
            noise = torch.randn(decision.logits.shape, generator=torch.Generator().manual_seed(n))
            decision.logits.add_(noise * (name != "types" or gene.startswith(("net", "lora", "type"))))
        decision.logits.data = decision.logits.data.double()
    eps, moved = 1e-4, 0
    with gates.attach() as attachment:
        attachment.eval()
        attachment.double()
        loss_of(double, attachment, gates.value_weights()).backward()
        hard = {gene: weights.detach() for gene, weights in gates.value_weights().items()}

        @torch.no_grad()
        def difference(gene: str, plus: Tensor, minus: Tensor) -> float:
            up, down = (loss_of(double, attachment, hard | {gene: weights}) for weights in (plus, minus))
            return float(up - down) / (2 * eps)

        for gene, decision in gates.decisions.items():
            steps = eps * torch.eye(len(decision.logits), dtype=torch.float64)
            logits = decision.logits.detach()
            if decision.ordered:
                opens = (logits > 0).double()
                slopes = [difference(gene, nested(opens + step), nested(opens - step)) for step in steps]
                p = logits.sigmoid()
                expected = torch.tensor(slopes, dtype=torch.float64) * p * (1 - p)
            else:
                slopes = [difference(gene, hard[gene] + step, hard[gene] - step) for step in steps]
                p = logits.softmax(0)
                expected = (torch.diag(p) - torch.outer(p, p)) @ torch.tensor(slopes, dtype=torch.float64)
            found = torch.zeros_like(logits) if decision.logits.grad is None else decision.logits.grad
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)
            moved += int(found.count_nonzero())
    assert moved > 3


def test_an_adapter_at_the_identity_has_no_gradient(evaluator: PackedEvaluator) -> None:
    """To the bit: AdamW would make steps of noise."""
    space = SearchSpace(backbone=evaluator.backbone, **SPACES["sizes"])
    gates = Gates(evaluator, space, TRAINING, 0, 0.0)
    with gates.attach() as attachment:
        attachment.weigh(gates.value_weights())
        evaluator.scores(attachment, "train", range(8))["loss"].mean().backward()
    assert all(not decision.logits.grad.any() for decision in gates.decisions.values() if len(decision.logits))


# Training


@pytest.mark.parametrize("name", mostly_slow(SPACES, "several"))
def test_training(evaluator: PackedEvaluator, name: str) -> None:
    """Its choice is in the space, and a second run is the same to the bit."""
    runs = []
    for _ in range(2):
        gates = build(evaluator, name, penalty=0.3)
        losses = gates.train(24)
        runs.append((losses, {gene: d.logits.tolist() for gene, d in gates.decisions.items()}, gates.chosen()))
    assert runs[0] == runs[1]
    assert len(losses) == 24
    assert gates.space.contains(gates.chosen())
    if "training" in SPACES[name]:
        assert gates.chosen()["training.learning_rate"] == TRAINING.learning_rate
        assert gates.chosen()["training.batch_size"] == TRAINING.batch_size


def test_the_seed_decides(evaluator: PackedEvaluator) -> None:
    space = SearchSpace(backbone=evaluator.backbone, **SPACES["types"])
    first, other = (Gates(evaluator, space, TRAINING, seed, 0.1).train(4) for seed in (0, 1))
    assert first != other


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> PackedEvaluator:
    """It learns the task in a few steps, with adapters alone; a random BERT does not."""
    return over("llama", tmp_path_factory.mktemp("llama"))


def test_penalties(llama: PackedEvaluator) -> None:
    """A large one closes everything; without any, what is useful stays; between them, the more the cheaper."""
    space = SearchSpace(backbone=llama.backbone, **SPACES["sizes"])
    largest = space.decode(space.largest()).architecture.num_params(llama.backbone)
    found = []
    for penalty in (0.0, 0.3, 1e3):
        gates = Gates(llama, space, TRAINING, 0, penalty)
        losses = gates.train(60)
        assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
        found.append(space.decode(gates.chosen()).architecture.num_params(llama.backbone))
    assert found[0] > 0.7 * largest
    assert found[0] > found[1] > found[2] == 0


def test_sweep(llama: PackedEvaluator) -> None:
    space = SearchSpace(backbone=llama.backbone, **SPACES["sizes"])
    seen: list[tuple[int, int]] = []
    found = Gates(llama, space, TRAINING, 0, 0.0).sweep([1e3, 1e4, 0.0], 24, lambda *at: seen.append(at))
    assert len(found) == 2
    assert not space.decode(found[0]).architecture
    assert space.decode(found[1]).architecture
    assert seen == [(n, 72) for n in range(1, 73)]
    alone = Gates(llama, space, TRAINING, 0, 0.0)
    alone.train(24)
    assert found[1] == alone.chosen()


def test_dropout_is_the_same_for_all_sizes(evaluator: PackedEvaluator) -> None:
    """Else their differences would be noise: with B alike at every rank, rank 2 is rank 1 twice."""
    lora = replace(LORA, fields={"rank": Choice.of((1, 2)), "dropout": 0.5, "scaling": "alpha"})
    space = SearchSpace(backbone=evaluator.backbone, adapters={"lora": lora})
    gates = Gates(evaluator, space, TRAINING, 0, 0.0)
    with gates.attach() as attachment:
        bank = next(bank for bank in attachment.banks if bank.site.role == "attn.q")
        with torch.no_grad():
            bank.values["A"].fill_(1.0)
            bank.values["B"].fill_(1.0)
        x = torch.randn(2, 5, SHAPE["hidden_size"])[:1].expand(2, -1, -1)
        one, two = super(type(bank), bank).forward(x, torch.zeros_like(x))
    torch.testing.assert_close(one, two)  # alpha over the rank


# Scores


@pytest.mark.parametrize("name", SPACES)
def test_scores(evaluator: PackedEvaluator, name: str) -> None:
    """Minus the log-likelihood, by the genes."""
    gates = build(evaluator, name, penalty=0.1)
    gates.train(12)
    space, rng = gates.space, Random(0)
    probabilities = {gene: decision.probabilities().tolist() for gene, decision in gates.decisions.items()}
    architectures = [space.decode(space.sample(rng)).architecture for _ in range(5)]
    found = gates.scores(architectures)
    for architecture, score in zip(architectures, found, strict=True):
        assignment = locate(space, replace(space.decode(space.largest()), architecture=architecture))
        expected = 1.0
        for gene, value in (assignment or {}).items():
            if gene in probabilities:
                expected *= probabilities[gene][gates.decisions[gene].values.index(value)]
        assert score == pytest.approx(-math.log(expected), rel=1e-4)
    misplaced = Architecture.of({"layers.0.attn.v": [Lora(rank=2)]})
    assert math.isnan(gates.scores([misplaced])[0])
    assert gates.scores([]) == []
    seen: list[tuple[int, int]] = []
    gates.scores(architectures, lambda *at: seen.append(at))
    assert seen == [(n, 5) for n in range(1, 6)]


def test_probabilities_of_a_space_add_up(evaluator: PackedEvaluator) -> None:
    lora = replace(LORA, at=("attn.q",), layers=(0, 1))
    space = SearchSpace(backbone=evaluator.backbone, adapters={"lora": lora})
    gates = Gates(evaluator, space, TRAINING, 0, 0.0)
    sites = ("layers.0.attn.q", "layers.1.attn.q")
    architectures = [
        Architecture.of({site: [Lora(rank=rank)] if rank else [] for site, rank in zip(sites, ranks, strict=True)})
        for ranks in product(RANKS.choices, repeat=2)
    ]
    assert sum(math.exp(-score) for score in gates.scores(architectures)) == pytest.approx(1.0)


# What has no gates, or fewer than it has sizes


def test_prefixes_are_refused(evaluator: PackedEvaluator) -> None:
    adapters = {"mine": AdapterChoice(kind="prefix", placement="layer")}
    with pytest.raises(ValueError, match=r"'mine'.*'prefix'"):
        Gates(evaluator, SearchSpace(backbone=evaluator.backbone, adapters=adapters), TRAINING, 0, 0.0)
    full = {"mine": AdapterChoice(kind="full", placement="model")}
    with pytest.raises(ValueError, match=r"'mine'.*backbone"):
        Gates(evaluator, SearchSpace(backbone=evaluator.backbone, adapters=full), TRAINING, 0, 0.0)


def test_values_of_the_genes(evaluator: PackedEvaluator) -> None:
    """Wide ranges are thinned, continuous ones held at their middle, the others complete."""
    fields = {
        "rank": Int(low=1, high=64, log=True),
        "alpha": Float(low=1.0, high=9.0),
        "scaling": Choice(choices=("alpha", "rslora")),
    }
    lora = AdapterChoice(kind="lora", at=("attn.q",), placement="model", fields=fields)
    gates = Gates(evaluator, SearchSpace(backbone=evaluator.backbone, adapters={"lora": lora}), TRAINING, 0, 0.0)
    decisions = gates.decisions
    assert decisions["lora.on"].values == BOOLEAN.choices
    assert decisions["lora.on"].ordered
    ranks = decisions["lora.rank"].values
    assert (ranks[0], ranks[-1]) == (1, 64)
    assert len(ranks) <= 8
    assert list(ranks) == sorted(ranks)
    assert decisions["lora.alpha"].values == (5.0,)
    assert not len(decisions["lora.alpha"].logits)
    assert not decisions["lora.scaling"].ordered
    gates.train(2)
    between = Architecture.of({f"layers.{n}.attn.q": [Lora(rank=33, alpha=3.0)] for n in range(3)})
    assert math.isfinite(gates.scores([between])[0])


def test_a_space_without_a_choice(evaluator: PackedEvaluator) -> None:
    adapters = {"lora": AdapterChoice(kind="lora", fields={"rank": 2})}
    gates = Gates(evaluator, SearchSpace(backbone=evaluator.backbone, adapters=adapters), TRAINING, 0, 1.0)
    assert len(gates.train(2)) == 2
    assert gates.chosen() == {}
    assert gates.scores([gates.space.decode({}).architecture]) == [0.0]


def test_a_backbone_of_a_lower_precision(tmp_path: Path) -> None:
    evaluator = over("llama", tmp_path, dtype="bfloat16")
    gates = build(evaluator, "several", penalty=0.1)
    assert all(map(math.isfinite, gates.train(4)))
    assert all(decision.logits.dtype == torch.float32 for decision in gates.decisions.values())


def test_depth(evaluator: PackedEvaluator) -> None:
    """Layers below all gates run without gradient, as for any attachment."""
    space = SearchSpace(backbone=evaluator.backbone, adapters={"lora": replace(LORA, layers=(2,))})
    with Gates(evaluator, space, TRAINING, 0, 0.0).attach() as attachment:
        assert attachment.depth == 2
