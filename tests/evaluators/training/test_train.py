"""The training loop: it learns, repeats itself to the bit, stops where it should, and leaves the backbone as it was."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from autopeft.evaluators.backbones import load_backbone
from autopeft.evaluators.base import Outcome, OutOfMemoryError, Request
from autopeft.evaluators.data.splits import Splits
from autopeft.evaluators.errors import DataError
from autopeft.evaluators.tasks.text import max_tokens
from autopeft.evaluators.training import batching, train
from autopeft.evaluators.training.schedule import rate
from autopeft.evaluators.training.train import TrainEvaluator
from autopeft.search_space.adapters import Bottleneck, Full, Ia3, Lora, Prefix
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.problem import Fidelity, Measurement
from autopeft.search_space.spaces.presets import everywhere, linears
from autopeft.search_space.training import Training

from ...support.slow import slow
from ...support.tiny_models import WORDS, byte_tokenizer, save, seeded, word_tokenizer

torch.set_num_threads(1)

LABELS = ("a", "b", "c")
BATCH, EPOCHS = 8, 5
ROWS = {"train": 96, "validation": 50, "test": 20}
STEPS = ROWS["train"] // BATCH * EPOCHS


def rows(split: str, count: int) -> list[dict[str, str]]:
    """The label of a text is the third of the vocabulary that most of its words are from."""
    rng = Random(split)
    found = []
    for _ in range(count):
        label = rng.randrange(3)
        own = WORDS[10 * label : 10 * label + 10]
        words = [rng.choice(own if rng.random() < 0.9 else WORDS) for _ in range(rng.randint(4, 9))]
        found.append({"text": " ".join(words), "label": LABELS[label]})
    return found


SPLITS = Splits(*(rows(split, count) for split, count in ROWS.items()), LABELS)


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> TrainEvaluator:
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    model = seeded(BertForSequenceClassification, BertConfig(**shape, vocab_size=40, initializer_range=0.2))
    folder = save(model, tmp_path_factory.mktemp("bert"), word_tokenizer())
    loaded = load_backbone(folder, task="classification", labels=LABELS)
    # A new head for every slot, as for a checkpoint without one.
    return TrainEvaluator(replace(loaded, pretrained_head=False), "classification", SPLITS, max_length=16)


@pytest.fixture(autouse=True)
def unchanged(evaluator: TrainEvaluator) -> Iterator[None]:
    """After every test the backbone is what it was, bit for bit."""
    before = {name: value.clone() for name, value in evaluator.model.state_dict().items()}
    yield
    torch.testing.assert_close(evaluator.model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in evaluator.model.parameters())
    assert not any(module.training for module in evaluator.model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in evaluator.model.modules())


KINDS: dict[str, Any] = {
    "head": lambda backbone: Architecture(),
    "lora": lambda backbone: everywhere(backbone, Lora(rank=4, dropout=0.1), linears(backbone)),
    "bottleneck": lambda backbone: everywhere(backbone, Bottleneck(size=8)),
    "prefix": lambda backbone: everywhere(backbone, Prefix(length=4)),
    "ia3": lambda backbone: everywhere(backbone, Ia3()),
    "full": lambda backbone: everywhere(backbone, Full()),
}


def candidate(evaluator: TrainEvaluator, kind: str = "lora", **training: Any) -> Candidate:
    defaults = {"learning_rate": 1e-2, "batch_size": BATCH, "epochs": EPOCHS}
    return Candidate(architecture=KINDS[kind](evaluator.backbone), training={**defaults, **training})


def request(evaluator: TrainEvaluator, kind: str = "lora", training: Any = {}, **settings: Any) -> Request:  # noqa: B006
    return Request(candidate=candidate(evaluator, kind, **training), **settings)


def evaluate(evaluator: TrainEvaluator, kind: str = "lora", training: Any = {}, **settings: Any) -> Outcome:  # noqa: B006
    return evaluator.evaluate([request(evaluator, kind, training, **settings)])[0]


def measured(evaluator: TrainEvaluator, kind: str = "lora", training: Any = {}, **settings: Any) -> Measurement:  # noqa: B006
    outcome = evaluate(evaluator, kind, training, **settings)
    assert outcome.measurement is not None, outcome.reason
    return outcome.measurement


def timeless(measurement: Measurement) -> Measurement:
    return replace(measurement, wall_s=0.0, train_s=0.0)


@pytest.fixture
def spied(monkeypatch) -> list[dict[str, Any]]:
    """What the optimiser sees at each step: the rates, the decay of each tensor and the norm of all gradients."""
    seen: list[dict[str, Any]] = []

    class Spied(AdamW):
        def step(self, closure=None):
            own = [(p, group) for group in self.param_groups for p in group["params"]]
            squares = sum(float(p.grad.square().sum()) for p, _ in own)
            seen.append({
                "rates": {group["lr"] for group in self.param_groups},
                "decay": {p: group["weight_decay"] for p, group in own},
                "norm": math.sqrt(squares),
            })  # fmt: skip
            return super().step(closure)

    monkeypatch.setattr(train, "AdamW", Spied)
    return seen


# It learns


#: What suits each on this task.
RATES = {"head": 1e-1, "lora": 1e-2, "bottleneck": 1e-2, "prefix": 1e-1, "ia3": 5e-2, "full": 2e-3}


@pytest.mark.parametrize("kind", KINDS)
def test_learns(evaluator, kind):
    found = measured(evaluator, kind, {"learning_rate": RATES[kind]})
    assert len(found.losses) == STEPS
    first, last = sum(found.losses[:5]) / 5, sum(found.losses[-5:]) / 5
    assert last < 0.8 * first
    assert found.values["accuracy"] > 0.6  # by chance: 0.33
    assert found.values["loss"] < math.log(3)


def test_adapters_matter(evaluator):
    assert measured(evaluator, "lora").losses != measured(evaluator, "head").losses


# It repeats itself


@pytest.mark.parametrize("kind", ["lora", slow("full")])
def test_a_seed_decides_everything(evaluator, kind):
    torch.manual_seed(1)
    first = timeless(measured(evaluator, kind, seed=3))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = timeless(measured(evaluator, kind, seed=3))
    assert first == again
    assert first.seed == 3
    assert torch.equal(torch.get_rng_state(), state), "the random numbers of the process are left alone"
    other = timeless(measured(evaluator, kind, seed=4))
    assert other.losses != first.losses
    assert other.values != first.values


def test_the_position_in_a_batch_of_requests_does_not_matter(evaluator):
    requests = [request(evaluator, kind, seed=1) for kind in ("lora", "full", "prefix", "lora")]
    found = [timeless(outcome.measurement) for outcome in evaluator.evaluate(requests)]
    assert found[0] == found[3] == timeless(measured(evaluator, "lora", seed=1))


def test_candidates_of_a_seed_see_the_same_batches(evaluator, monkeypatch):
    seen: list[list[Any]] = []

    def batch(split, indices, *part, original=evaluator.batch):
        if split == "train":
            seen[-1].append(tuple(indices))
        return original(split, indices, *part)

    monkeypatch.setattr(evaluator, "batch", batch)
    for kind, seed, share in (("lora", 0, 1.0), ("full", 0, 1.0), ("ia3", 0, 0.4), ("lora", 1, 1.0)):
        seen.append([])
        measured(evaluator, kind, seed=seed, fidelity=Fidelity(share=share))
    lora, full, partial, other = seen
    assert lora == full
    assert partial == lora[: len(partial)]
    assert other != lora
    # An epoch is every row once, and each epoch has an order of its own.
    per_epoch = STEPS // EPOCHS
    epochs = [sum(lora[i : i + per_epoch], ()) for i in range(0, STEPS, per_epoch)]
    assert all(sorted(epoch) == list(range(ROWS["train"])) for epoch in epochs)
    assert len(set(epochs)) == EPOCHS


# Fidelity


@pytest.mark.parametrize(("share", "steps"), [(0.37, 23), slow(0.05, 3), slow(0.001, 1), slow(1.0, 60)])
@pytest.mark.parametrize("schedule", [slow("linear"), "cosine"])
def test_a_share_is_the_beginning_of_the_full_run(evaluator, share, steps, schedule, spied):
    training = {"schedule": schedule}
    full = measured(evaluator, "lora", training)
    rates = [step["rates"] for step in spied]
    spied.clear()
    part = measured(evaluator, "lora", training, fidelity=Fidelity(share=share))
    assert len(part.losses) == steps
    assert part.share == share
    assert part.losses == full.losses[:steps]
    assert [step["rates"] for step in spied] == rates[:steps]


def test_shares_are_exact(evaluator):
    """0.07 x 100 is 7.000000000000001 in binary."""
    hundred = {"epochs": 100 / 12}
    assert evaluator.num_steps(request(evaluator, training=hundred)) == 100
    for percent in range(1, 101):
        fidelity = Fidelity(share=percent / 100)
        assert evaluator.num_steps(request(evaluator, training=hundred, fidelity=fidelity)) == percent
    # Of an epoch that does not divide by the batch size, the last batch is smaller.
    assert batching.num_steps(33, 8, 1.0) == 5
    assert batching.num_steps(33, 8, 0.01) == 1
    assert batching.num_steps(100, 10, 0.7) == 7


def test_rungs(evaluator):
    rungs = (0.25, 0.5, 1.0)
    found = measured(evaluator, fidelity=Fidelity(rungs=rungs))
    assert timeless(replace(found, rungs=())) == timeless(measured(evaluator)), "to look changes nothing"
    assert [share for share, _ in found.rungs] == [0.25, 0.5]  # the last one is the result
    for share, values in found.rungs:
        assert values == measured(evaluator, fidelity=Fidelity(share=share)).values
    # Rungs are shares of the full run, whatever part of it is run.
    partial = measured(evaluator, fidelity=Fidelity(share=0.4, rungs=rungs))
    assert partial.rungs == found.rungs[:1]


# What is measured


def test_scores_of_each_example_in_the_order_of_the_file(evaluator):
    outcome = evaluate(evaluator, test=True, keep_weights=True)
    found = outcome.measurement
    with evaluator.attach(request(evaluator)) as attachment:
        attachment.load_state(dict(outcome.weights))
        attachment.eval()
        for split, columns in (("validation", found.per_example), ("test", found.test_per_example)):
            assert {len(column) for column in columns.values()} == {ROWS[split]}
            for i, row in enumerate(getattr(SPLITS, split)):
                ids = torch.tensor([word_tokenizer()(row["text"])["input_ids"]])
                with torch.no_grad():
                    chances = evaluator.model(input_ids=ids).logits[0].log_softmax(-1)
                label = LABELS.index(row["label"])
                assert columns["loss"][i] == pytest.approx(-float(chances[label]), abs=1e-4)
                assert columns["accuracy"][i] == float(chances.argmax() == label)
    for name, column in found.per_example.items():
        n = len(column)
        mean = sum(column) / n
        assert found.values[name] == pytest.approx(mean, abs=1e-4)
        spread = sum((x - mean) ** 2 for x in column) / (n - 1)
        assert found.std_err[name] == pytest.approx(math.sqrt(spread / n), abs=1e-4)
        assert found.test[name] == pytest.approx(sum(found.test_per_example[name]) / ROWS["test"], abs=1e-4)
    assert 0 < found.train_s <= found.wall_s
    assert found.evaluator == "train"
    assert Measurement.from_dict(found.to_dict()) == found


def test_test_rows_are_scored_only_when_asked_for(evaluator, monkeypatch):
    seen = set()

    def batch(split, indices, *part, original=evaluator.batch):
        seen.add(split)
        return original(split, indices, *part)

    monkeypatch.setattr(evaluator, "batch", batch)
    found = measured(evaluator, "head", fidelity=Fidelity(share=0.1, rungs=(0.05,)))
    assert found.test == {}
    assert found.test_per_example == {}
    assert seen == {"train", "validation"}


@pytest.mark.parametrize("kind", ["lora", "prefix", "full"])
def test_kept_weights_score_the_same(evaluator, kind):
    outcome = evaluate(evaluator, kind, keep_weights=True)
    again = request(evaluator, kind, seed=77)
    with evaluator.attach(again) as attachment:
        attachment.load_state(dict(outcome.weights))
        (scores,) = evaluator.columns(attachment, "validation")
        assert attachment.training
    for name, column in outcome.measurement.per_example.items():
        assert tuple(round(x, 4) for x in scores[name]) == column
    assert evaluate(evaluator, kind).weights is None


def test_progress(evaluator):
    requests = [
        request(evaluator, "head", fidelity=Fidelity(share=0.1)),
        request(evaluator, "lora", {"learning_rate": 1e30}),
        request(evaluator, "lora", fidelity=Fidelity(share=0.05)),
    ]
    assert [evaluator.num_steps(r) for r in requests] == [6, 60, 3]
    calls: list[tuple[int, int]] = []
    outcomes = evaluator.evaluate(requests, lambda done, total: calls.append((done, total)))
    assert outcomes[1].failure == "failed"
    assert {total for _, total in calls} == {69}
    done = [done for done, _ in calls]
    assert done == sorted(done)
    assert done[:6] == [1, 2, 3, 4, 5, 6]
    assert done[-3:] == [67, 68, 69]


# The optimiser


def test_weight_decay_is_for_matrices(evaluator, spied):
    with evaluator.attach(request(evaluator, "bottleneck")) as attachment:
        named = {name: value.dim() for name, value in attachment.state().items()}
    measured(evaluator, "bottleneck", {"weight_decay": 0.3}, fidelity=Fidelity(share=0.01))
    decays = sorted(spied[0]["decay"].values())
    matrices = sum(dim > 1 for dim in named.values())
    assert decays == [0.0] * (len(named) - matrices) + [0.3] * matrices
    assert 0 < matrices < len(named)
    spied.clear()
    measured(evaluator, "full", {"weight_decay": 0.3}, fidelity=Fidelity(share=0.01))
    for parameter, decay in spied[0]["decay"].items():
        if any(parameter is p for p in evaluator.model.parameters()):
            assert decay == (0.3 if parameter.dim() > 1 else 0.0)


def test_gradients_are_clipped(evaluator, spied):
    share = Fidelity(share=0.2)
    measured(evaluator, "lora", {"max_grad_norm": 0}, fidelity=share)
    free = [step["norm"] for step in spied]
    spied.clear()
    measured(evaluator, "lora", {"max_grad_norm": 1e-3}, fidelity=share)
    assert min(free) > 0.1
    assert all(step["norm"] == pytest.approx(1e-3, rel=1e-2) for step in spied)
    spied.clear()
    measured(evaluator, "lora", {"max_grad_norm": 1e6}, fidelity=share)
    assert [step["norm"] for step in spied] == free


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [1 / 3, 2 / 3, *(1 - i / 8 for i in range(8))]),
        ("cosine", [1 / 3, 2 / 3, *((1 + math.cos(math.pi * i / 8)) / 2 for i in range(8))]),
        ("constant", [1 / 3, 2 / 3, *[1.0] * 8]),
    ],
)
def test_schedules(schedule, expected):
    training = Training(schedule=schedule, warmup=0.15)  # of 10 steps: 2
    assert [rate(step, 10, training) for step in range(10)] == pytest.approx(expected)
    without = Training(schedule=schedule, warmup=0.0)
    assert rate(0, 10, without) == 1.0
    assert rate(0, 1, Training(schedule=schedule)) == 0.5
    assert rate(0, 1, without) == 1.0
    assert all(0 < rate(step, 100, Training(schedule=schedule, warmup=0.99)) <= 1 for step in range(100))


def test_schedule_in_use(evaluator, spied):
    measured(evaluator, "head", {"warmup": 0.1, "learning_rate": 0.5})
    training = Training(warmup=0.1)
    assert [step["rates"] for step in spied] == [{0.5 * rate(step, STEPS, training)} for step in range(STEPS)]


# What goes wrong


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_loss_that_is_not_a_number(evaluator, kind):
    outcome = evaluate(evaluator, kind, {"learning_rate": 1e30, "max_grad_norm": 0})
    assert outcome.measurement is None
    assert outcome.failure == "failed"
    assert outcome.reason in [f"the training loss became {bad} at step {step} of 60"
                              for bad in ("nan", "inf") for step in range(2, 9)]  # fmt: skip


def test_a_score_that_is_not_a_number(evaluator):
    """The last step may be the one that diverges."""
    outcome = evaluate(evaluator, "full", {"learning_rate": 1e30}, fidelity=Fidelity(share=0.01))
    assert (outcome.failure, outcome.reason) == ("failed", "the held-out loss is not finite")


def breaking(monkeypatch, evaluator: TrainEvaluator, error: BaseException, at: int = 3) -> None:
    """The model breaks in its nth call, once."""
    calls = 0

    def score(logits: Tensor, targets: Tensor, original=evaluator.task.score) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return original(logits, targets)

    monkeypatch.setattr(evaluator.task, "score", score)


@pytest.mark.parametrize("kind", ["lora", slow("prefix"), slow("full")])
@pytest.mark.parametrize(
    ("error", "failure", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "infeasible",
         "out of memory: CUDA out of memory. Tried"),
        (MemoryError(), "infeasible", "out of memory: "),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "infeasible",
         "out of memory: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        (RuntimeError("CUDA error: out of memory"), "infeasible", "out of memory: CUDA error: out of memory"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when"), "infeasible",
         "out of memory: CUBLAS_STATUS_ALLOC_FAILED when"),
        (RuntimeError("shapes do not fit"), "failed", "RuntimeError: shapes do not fit"),
        (KeyError("x"), "failed", "KeyError: 'x'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)  # fmt: skip
def test_a_candidate_that_breaks_takes_no_other_along(evaluator, monkeypatch, kind, error, failure, reason):
    expected = timeless(measured(evaluator, "lora", fidelity=Fidelity(share=0.1)))
    breaking(monkeypatch, evaluator, error)
    good = request(evaluator, "lora", fidelity=Fidelity(share=0.1))
    broken, following = evaluator.evaluate([request(evaluator, kind), good])
    assert (broken.measurement, broken.failure, broken.reason) == (None, failure, reason)
    assert timeless(following.measurement) == expected


def test_interrupts_pass(evaluator, monkeypatch):
    breaking(monkeypatch, evaluator, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        evaluate(evaluator, "full")


def test_costs_pass_on_memory_errors(evaluator, monkeypatch):
    breaking(monkeypatch, evaluator, MemoryError("too much"), at=1)
    with pytest.raises(OutOfMemoryError, match="out of memory: too much"):
        evaluator.costs(candidate(evaluator), frozenset({"peak_memory_bytes"}))


def test_costs_leave_no_trace(evaluator):
    before = timeless(measured(evaluator, "lora"))
    costs = evaluator.costs(candidate(evaluator), frozenset({"peak_memory_bytes"}))
    assert costs.values["num_params"] == candidate(evaluator).architecture.num_params(evaluator.backbone)
    assert costs.values["peak_memory_bytes"] > 0
    assert timeless(measured(evaluator, "lora")) == before


def test_an_adapter_that_cannot_be_attached(evaluator):
    wrong = Candidate(architecture=Architecture.of({"layers.9.attn.q": [Lora()]}), training={"epochs": 1.0})
    (outcome,) = evaluator.evaluate([Request(candidate=wrong)])
    assert outcome.failure == "failed"
    assert "no site 'layers.9.attn.q'" in outcome.reason


# Rows that the model cannot read


def causal(tmp_path: Path, text: str, positions: int = 64, vocabulary: int = 300, **settings: Any) -> TrainEvaluator:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = LlamaConfig(**shape, vocab_size=vocabulary, max_position_embeddings=positions, **settings)
    folder = save(seeded(LlamaForCausalLM, config), tmp_path, byte_tokenizer([text]))
    splits = Splits(*[[{"text": text}]] * 3, None)
    return TrainEvaluator(load_backbone(folder, task="causal-lm"), "causal-lm", splits, max_length=32)


def test_nothing_to_train(tmp_path):
    evaluator = causal(tmp_path, "a b c")
    outcome = evaluate(evaluator, "head")
    assert (outcome.failure, outcome.reason) == (
        "failed",
        "nothing to train: no adapter is on and the model has no task head",
    )


def test_rows_longer_than_the_model_takes(tmp_path):
    text = " ".join("abcdefghijkl")
    assert causal(tmp_path, "a b c", positions=8)
    with pytest.raises(
        DataError, match=r"train row 1: has more tokens than the model takes: set data\.max_length to at most 8"
    ):
        causal(tmp_path, text, positions=8)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = RobertaConfig(**shape, vocab_size=40, max_position_embeddings=20, pad_token_id=1)
    model = seeded(RobertaForSequenceClassification, config)
    assert max_tokens(model) == 18
    model(input_ids=torch.full((1, 18), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 19), 5))


def test_tokens_without_embeddings(tmp_path):
    with pytest.raises(DataError, match="beyond the model's 100 embeddings"):
        causal(tmp_path, "a b c", vocabulary=100)


def test_scoring_before_training_with_rotary_tables_that_grow(tmp_path):
    """What the model keeps from a validation must be fit for the training after it."""
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    evaluator = causal(tmp_path, "a b c " * 9, positions=64, rope_parameters=dynamic)
    evaluator.model.model.rotary_emb.original_max_seq_len = evaluator.model.model.rotary_emb.max_seq_len_cached = 4
    measured(evaluator, "lora", fidelity=Fidelity(rungs=(0.2, 0.4)))
