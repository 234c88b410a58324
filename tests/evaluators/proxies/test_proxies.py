"""Zero-cost proxies against slow, obvious references; a candidate in a pack scores what it scores alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Olmo2Config,
    Olmo2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.backbones import LoadedBackbone, load_backbone
from autopeft.evaluators.data.splits import Splits
from autopeft.evaluators.proxies import PROXIES, damping, saliency, zero_cost
from autopeft.evaluators.proxies.damping import FACTOR, Damping
from autopeft.evaluators.proxies.importance import Branch, Importance, residual_branches
from autopeft.evaluators.proxies.saliency import JITTER
from autopeft.evaluators.proxies.similarity import Similarity
from autopeft.evaluators.training import batching
from autopeft.evaluators.training.activations import ActivationCache
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.search_space.adapters import AdapterSpec, Bottleneck, Full, Ia3, Lora, Norm, Prefix
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.runtime.bank import stream
from tests.evaluators.tasks import test_causal_lm

from ...support import conformance
from ...support.slow import QUICK_FAMILY, mostly_slow
from ...support.tiny_models import byte_tokenizer, save, seeded, word_tokenizer
from ..training.test_train import LABELS, rows

torch.set_num_threads(1)

SPLITS = Splits(rows("train", 80), rows("validation", 50), rows("test", 20), LABELS)
LAYERS = 3
SHAPE = {"hidden_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 40}
CLASSIFIER = SHAPE | {"vocab_size": 40, "num_labels": 3, "pad_token_id": 0}
CAUSAL = SHAPE | {"vocab_size": 300, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
_GPT2 = {"n_embd": 24, "n_layer": LAYERS, "n_head": 2, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 1}
CLASSIFIERS: dict[str, Any] = {
    "bert": (BertForSequenceClassification, BertConfig(**CLASSIFIER)),
    "roberta": (RobertaForSequenceClassification, RobertaConfig(**CLASSIFIER)),
    "llama": (LlamaForSequenceClassification, LlamaConfig(**CLASSIFIER)),
}
CAUSALS: dict[str, Any] = {
    "llama-causal": (LlamaForCausalLM, LlamaConfig(**CAUSAL)),
    "gpt2-causal": (GPT2LMHeadModel, GPT2Config(**_GPT2, vocab_size=300)),
    "gemma2-causal": (Gemma2ForCausalLM, Gemma2Config(**CAUSAL, head_dim=12)),
    "olmo2-causal": (Olmo2ForCausalLM, Olmo2Config(**CAUSAL)),
    "cohere-causal": (CohereForCausalLM, CohereConfig(**CAUSAL)),
}
SALIENCIES = [name for name, proxy in PROXIES.items() if issubclass(proxy, saliency.Saliency)]
IMPORTANCES = [name for name, proxy in PROXIES.items() if issubclass(proxy, Importance)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def build(name: str, folder: Path, **settings: Any) -> PackedEvaluator:
    make, config = (CLASSIFIERS | CAUSALS)[name]
    if name in CLASSIFIERS:
        loaded = load_backbone(
            save(seeded(make, config), folder / name, word_tokenizer()), task="classification", labels=LABELS
        )
        return PackedEvaluator(without_head(loaded), "classification", SPLITS, max_length=16, **settings)
    train = test_causal_lm.TRAIN[:80]
    tokenizer = byte_tokenizer([row["prompt"] + row["completion"] for row in train])
    loaded = load_backbone(save(seeded(make, config), folder / name, tokenizer), task="causal-lm")
    return PackedEvaluator(loaded, "causal-lm", Splits(train, train[:20], train[:20], None), max_length=32, **settings)


def without_head(loaded: LoadedBackbone) -> LoadedBackbone:
    return replace(loaded, pretrained_head=False)


def unchanged(evaluator: PackedEvaluator) -> Iterator[None]:
    model = evaluator.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    yield
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@pytest.fixture(scope="module", params=mostly_slow(("bert", "llama"), QUICK_FAMILY))
def kept(request: pytest.FixtureRequest, folders: Path) -> PackedEvaluator:
    return build(request.param, folders, pack=4)


@pytest.fixture
def evaluator(kept: PackedEvaluator) -> Iterator[PackedEvaluator]:
    """Packs as they are on a GPU; after every test the backbone is what it was, bit for bit."""
    kept.pack, kept.mixes_depths = 4, True
    for _ in unchanged(kept):
        yield kept


@pytest.fixture(scope="module", params=mostly_slow([*CLASSIFIERS, *CAUSALS], "llama", "gpt2-causal", "cohere-causal"))
def family(request: pytest.FixtureRequest, folders: Path) -> PackedEvaluator:
    return build(request.param, folders / "families", pack=4)


def at(evaluator: PackedEvaluator, spec: AdapterSpec, layers: Sequence[int], roles: Sequence[str] = ()) -> Architecture:
    sites = [s for s in evaluator.backbone.sites if s.role in (roles or spec.default_roles) and s.layer in layers]
    return Architecture.of({site.name: [spec] for site in sites if spec.fits(site)})


def mixed(evaluator: PackedEvaluator) -> list[Architecture]:
    """Of several kinds, sizes and depths, with dropout, and two adapters of a kind at a site."""
    twice = [Bottleneck(size=2, form="parallel"), Bottleneck(size=3), Bottleneck(size=4)]
    return [
        at(evaluator, Lora(rank=3, dropout=0.2), range(1, LAYERS), ("attn.q", "mlp.down")),
        at(evaluator, Prefix(length=3), range(LAYERS)),
        at(evaluator, Lora(rank=5), [LAYERS - 1], ("mlp.up",)),
        Architecture.of({site.name: twice for site in evaluator.backbone.sites if site.role == "mlp"}),
        at(evaluator, Norm(), range(LAYERS)),
        at(evaluator, Lora(rank=1), [1], ("attn.q", "attn.v")),
    ]


# Saliencies, one candidate after the other, by the book


def reference(evaluator: PackedEvaluator, architecture: Architecture, seed: int) -> tuple[Tensor, list[Tensor]]:
    """All values of the adapters' parameters [P], and their gradients in each minibatch."""
    model, task = evaluator.model, evaluator.task
    with Attachment(model, evaluator.backbone, [architecture], [seed]) as attachment:
        attachment.eval()
        adapters = [bank for bank in attachment.banks if bank.site.role != "head"]
        seen: dict[str, int] = {}
        for bank in adapters:
            key = f"{bank.site.name}/{bank.specs[0].kind}"
            seen[key] = seen.get(key, 0) + 1
            key += f"#{seen[key]}" if seen[key] > 1 else ""
            for name, value in bank.values.items():
                if not value.any():
                    drawn = torch.randn(value.shape[1:], generator=stream(seed, f"{key}/{name}", "jitter"))
                    value.data[0] = JITTER * drawn
        parameters = [value for bank in adapters for value in bank.values.values()]
        gradients = []
        order = batching.training_batches(evaluator.lengths["train"], zero_cost.BATCH_SIZE, seed)
        for _ in range(zero_cost.BATCHES):
            task.scores(model, evaluator.batch("train", next(order)))["loss"].mean().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
            attachment.zero_grad()
        return torch.cat([p.detach().flatten() for p in parameters]), gradients


@dataclass(frozen=True)
class Row:
    """One proxy. `expected`: the score of an architecture with a seed, slowly; None where a test of its own says it."""

    name: str
    expected: Callable[[PackedEvaluator, Architecture, int], float] | None = None


def by_gradient(formula: Callable[[Tensor, list[Tensor]], Tensor]) -> Callable[..., float]:
    return lambda *words: -float(formula(*reference(*words)))


ROWS = (
    Row("num_params", lambda evaluator, architecture, seed: -architecture.num_params(evaluator.backbone)),
    Row("snip", by_gradient(lambda p, g: sum((sum(g)[i] / len(g) * p[i]).abs() for i in range(len(p))))),
    Row("grad_norm", by_gradient(lambda p, g: sum((x / len(g)) ** 2 for x in sum(g)) ** 0.5)),
    Row("fisher", by_gradient(lambda p, g: 0.5 * (p**2 * sum(x**2 for x in g) / len(g)).sum())),
    Row("damping"),
    Row("similarity"),
)


def test_every_proxy_has_a_row() -> None:
    assert [row.name for row in ROWS] == list(PROXIES)
    assert all(proxy.name == name and proxy.summary and proxy.source for name, proxy in PROXIES.items())


@pytest.mark.parametrize("row", [row for row in ROWS if row.expected], ids=lambda row: row.name)
def test_reference(evaluator: PackedEvaluator, row: Row) -> None:
    proxy = PROXIES[row.name](evaluator, 3)
    architectures = mixed(evaluator)
    assert row.expected is not None
    expected = [row.expected(evaluator, architecture, 3) for architecture in architectures]
    assert all(x < 0 for x in expected)
    assert proxy.scores(architectures) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_alone_and_in_a_pack(evaluator: PackedEvaluator) -> None:
    """Of every adapter type; on a CPU depths are kept apart, and a cache holds the layers below."""
    proxy = PROXIES["fisher"](evaluator, 1)
    architectures = mixed(evaluator)
    for row in conformance.ROWS:
        if row.kind != "full":
            architectures += [a for spec in row.specs if (a := at(evaluator, spec, range(LAYERS), row.roles))]
    alone = [proxy.scores([architecture])[0] for architecture in architectures]
    assert all(math.isfinite(score) and score < 0 for score in alone)
    assert proxy.scores(architectures) == pytest.approx(alone, rel=1e-4)
    assert proxy.scores(architectures[::-1])[::-1] == pytest.approx(alone, rel=1e-4)
    evaluator.pack, evaluator.mixes_depths = None, False
    evaluator.cache, evaluator._model_key = ActivationCache(10**7), "key"
    try:
        assert proxy.scores(architectures) == pytest.approx(alone, rel=1e-4)
    finally:
        evaluator.cache = None


@pytest.mark.parametrize("name", PROXIES)
def test_the_seed_decides(evaluator: PackedEvaluator, name: str) -> None:
    architectures = mixed(evaluator)[:3]
    first, again, other = (PROXIES[name](evaluator, seed).scores(architectures) for seed in (0, 0, 1))
    assert first == again
    assert (first == other) == (name == "num_params")


@pytest.mark.parametrize("name", SALIENCIES)
def test_what_fails_scores_nan_alone(evaluator: PackedEvaluator, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overflow, an adapter where it cannot sit, the backbone itself. No adapter is the worst score there is."""
    proxy = PROXIES[name](evaluator, 0)
    good = mixed(evaluator)[:2]
    wild = at(evaluator, Lora(rank=2, alpha=math.inf), range(LAYERS))
    misplaced = Architecture.of({"layers.0.attn.q": [Bottleneck()]})
    full = Architecture.of({"backbone": [Full()]})
    expected = proxy.scores(good)
    found = proxy.scores([good[0], wild, full, misplaced, Architecture(), good[1]])
    assert [found[0], found[5]] == pytest.approx(expected, rel=1e-4)
    assert all(math.isnan(score) for score in found[1:4])
    assert found[4] == 0.0
    assert proxy.scores([]) == []
    assert proxy.scores([Architecture()]) == [0.0]

    together = saliency.Saliency._scores_together

    def scarce(self: Any, pack: Sequence[Architecture]) -> list[float]:
        if len(pack) > 1 or pack[0] == good[1]:
            raise torch.OutOfMemoryError
        return together(self, pack)

    monkeypatch.setattr(saliency.Saliency, "_scores_together", scarce)
    found = proxy.scores(good)
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    assert math.isnan(found[1])


@pytest.mark.parametrize("name", PROXIES)
def test_progress(evaluator: PackedEvaluator, name: str) -> None:
    seen: list[tuple[int, int]] = []
    PROXIES[name](evaluator, 0).scores([Architecture(), *mixed(evaluator)], lambda *at: seen.append(at))
    assert seen == sorted(seen)
    assert name == "num_params" or seen[-1][0] == seen[-1][1]


# Layer importance


def parts(name: str, layer: int) -> dict[str, Branch]:
    """Where x enters and c leaves, by hand."""
    bert = f"bert.encoder.layer.{layer}"
    llama = f"model.layers.{layer}"
    by_hand = {
        "bert": (f"{bert}.attention.self.query", f"{bert}.attention.output.dense", f"{bert}.intermediate.dense",
                 f"{bert}.output.dense"),
        "llama": (f"{llama}.input_layernorm", f"{llama}.self_attn.o_proj", f"{llama}.post_attention_layernorm",
                  f"{llama}.mlp.down_proj"),
        "gpt2": (f"transformer.h.{layer}.ln_1", f"transformer.h.{layer}.attn.c_proj", f"transformer.h.{layer}.ln_2",
                 f"transformer.h.{layer}.mlp.c_proj"),
        "gemma2": (f"{llama}.input_layernorm", f"{llama}.post_attention_layernorm",
                   f"{llama}.pre_feedforward_layernorm", f"{llama}.post_feedforward_layernorm"),
        "olmo2": (f"{llama}.self_attn.q_proj", f"{llama}.post_attention_layernorm", f"{llama}.mlp.gate_proj",
                  f"{llama}.post_feedforward_layernorm"),
        # Both branches start at one norm and run side by side.
        "cohere": (f"{llama}.input_layernorm", f"{llama}.self_attn.o_proj", f"{llama}.input_layernorm",
                   f"{llama}.mlp.down_proj"),
    }  # fmt: skip
    by_hand["roberta"] = tuple(path.replace("bert", "roberta", 1) for path in by_hand["bert"])
    attn_in, attn_out, mlp_in, mlp_out = by_hand[name]
    return {
        "attn": Branch(layer=layer, sublayer="attn", entrance=attn_in, exit=attn_out),
        "mlp": Branch(layer=layer, sublayer="mlp", entrance=mlp_in, exit=mlp_out),
    }


def test_branches_of_every_family(family: PackedEvaluator) -> None:
    name = family.backbone.family
    expected = [branch for layer in range(LAYERS) for branch in parts(name, layer).values()]
    for _ in unchanged(family):
        assert residual_branches(family) == expected


@pytest.mark.parametrize("name", PROXIES)
def test_every_family(family: PackedEvaluator, name: str) -> None:
    architectures = [
        at(family, Lora(rank=2), range(LAYERS), ("attn.q", "attn.qkv", "mlp.up")),
        at(family, Ia3(), [1]),
    ]
    for _ in unchanged(family):
        scores = PROXIES[name](family, 0).scores(architectures)
    assert all(math.isfinite(score) and score < 0 for score in scores)


@torch.no_grad()
def test_similarity_reference(family: PackedEvaluator) -> None:
    """Token by token, from examples without padding."""
    proxy = Similarity(family, 0)
    found = proxy.importances()
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(path: str) -> Any:
        def hook(module: Any, args: tuple, output: Tensor) -> None:
            kept[path] = args[0][0], output[0]

        return family.model.get_submodule(path).register_forward_hook(hook)

    handles = [keep(path) for path in {path for branch in found for path in (branch.entrance, branch.exit)}]
    turns: dict[Branch, list[float]] = {branch: [] for branch in found}
    for i in (i for indices in proxy.minibatches() for i in indices):
        family.task.scores(family.model, family.batch("train", [i]))
        for branch, seen in turns.items():
            for x, c in zip(kept[branch.entrance][0], kept[branch.exit][1], strict=True):
                seen.append(1 - float(x @ (x + c) / (x.norm() * (x + c).norm())))
    for handle in handles:
        handle.remove()
    for branch, seen in turns.items():
        assert found[branch] == pytest.approx(sum(seen) / len(seen), rel=1e-3, abs=1e-6)


def test_damping_reference(family: PackedEvaluator) -> None:
    """The last linear of a sub-layer, scaled in its weights, gives the same; a norm's scale where c leaves a norm."""
    proxy = Damping(family, 0)
    head = proxy._head()
    assert bool(head) == (family.task.name == "classification")
    found = proxy.importances()
    attachment = Attachment(family.model, family.backbone, [Architecture()], [0])
    attachment.eval()
    if head:
        attachment.load_state(dict(head))
    intact = proxy._loss()
    one = 1.0 if family.backbone.family.startswith("gemma") else 0.0  # its norms store their scale minus one
    for branch, importance in found.items():
        parameters = list(family.model.get_submodule(branch.exit).parameters())
        before = [p.detach().clone() for p in parameters]
        for p, value in zip(parameters, before, strict=True):
            p.data = FACTOR * (value + one) - one
        assert importance == pytest.approx(abs(proxy._loss() - intact), rel=1e-3, abs=1e-6)
        for p, value in zip(parameters, before, strict=True):
            p.data = value
    attachment.detach()
    assert any(found.values())


def test_a_head_that_cannot_be_trained(evaluator: PackedEvaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importances behind an untrained head would look like any others."""
    monkeypatch.setattr(damping, "HEAD_LEARNING_RATE", math.inf)
    with pytest.raises(RuntimeError, match="the task head cannot be trained"):
        Damping(evaluator, 0).scores([Architecture()])


@pytest.mark.parametrize("name", IMPORTANCES)
def test_adapters_at_important_layers_score_better(evaluator: PackedEvaluator, name: str) -> None:
    proxy = PROXIES[name](evaluator, 0)
    assert isinstance(proxy, Importance)
    known = proxy.importances()
    order = sorted((b for b in known if b.sublayer == "mlp"), key=lambda b: known[b])
    least, most = order[0].layer, order[-1].layer
    small, large = Lora(rank=2), Lora(rank=8)
    one, same, both, bigger = proxy.scores(
        [
            at(evaluator, small, [most], ("mlp.up",)),
            at(evaluator, small, [least], ("mlp.up",)),
            at(evaluator, small, [least, most], ("mlp.up",)),
            at(evaluator, large, [most], ("mlp.up",)),
        ]
    )
    assert both < one < same < 0
    assert bigger < one


@pytest.mark.parametrize("name", IMPORTANCES)
def test_arithmetic(evaluator: PackedEvaluator, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What sits in no sub-layer has a mean importance; full training is in all; a NaN stays where it is."""
    backbone = evaluator.backbone
    proxy = PROXIES[name](evaluator, 0)
    branches = residual_branches(evaluator)
    values = [float(n + 1) for n in range(len(branches))]
    monkeypatch.setattr(type(proxy), "measure", lambda self, branches, progress: values)
    mean = sum(values) / len(values)
    lora, norm = Lora(rank=2), Norm()
    outer = next(site for site in backbone.sites if site.role == "norm" and site.layer is None)
    inner = next(site for site in backbone.sites if site.role == "norm" and site.layer == 1)
    q, full = backbone.site("layers.1.attn.q"), backbone.site("backbone")

    def log_size(site: Site, spec: AdapterSpec) -> float:
        return math.log(1 + spec.num_params(site))

    expected = {
        Architecture(): 0.0,
        Architecture.of({q.name: [lora]}): -3 * log_size(q, lora),
        Architecture.of({q.name: [lora], inner.name: [norm]}): -3 * log_size(q, lora) - 3.5 * log_size(inner, norm),
        Architecture.of({outer.name: [norm]}): -mean * log_size(outer, norm),
        Architecture.of({full.name: [Full()]}): -sum(values) * math.log(1 + full.num_params / len(values)),
    }
    assert proxy.scores(list(expected)) == pytest.approx(list(expected.values()))

    broken = PROXIES[name](evaluator, 0)
    values[0] = math.nan
    found = broken.scores([at(evaluator, lora, [0], ("attn.q",)), at(evaluator, lora, [1], ("attn.q",))])
    assert math.isnan(found[0])
    assert math.isfinite(found[1])


def test_common_minibatches(evaluator: PackedEvaluator) -> None:
    """All proxies of a seed see the first batches of a training with it."""
    seen = {name: proxy(evaluator, 5).minibatches() for name, proxy in PROXIES.items()}
    order = batching.training_batches(evaluator.lengths["train"], zero_cost.BATCH_SIZE, 5)
    expected = [next(order) for _ in range(zero_cost.BATCHES)]
    assert all(batches == expected for batches in seen.values())
    assert PROXIES["snip"](evaluator, 6).minibatches() != expected
