"""Measured costs are repeatable where they are counted, normalised where they are timed, and leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, repeat
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.costs import measurement, timing
from autopeft.evaluators.costs.measurement import measure, step_times
from autopeft.evaluators.tasks import Batch
from autopeft.evaluators.tasks.causal_lm import CausalLM
from autopeft.evaluators.tasks.classification import Classification
from autopeft.search_space.adapters import AdapterSpec
from autopeft.search_space.adapters.bottleneck import Bottleneck
from autopeft.search_space.adapters.full import Full
from autopeft.search_space.adapters.lora import Lora
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.backbones.introspection import describe
from autopeft.search_space.problem import METRICS

from ...support.tiny_models import byte_tokenizer

LAYERS, LABELS = 3, ("a", "b", "c")
MEASURED = frozenset(name for name, metric in METRICS.items() if metric.source == "measured")


@pytest.fixture
def bert() -> tuple[nn.Module, Backbone]:
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=LAYERS,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        vocab_size=50,
        num_labels=len(LABELS),
    )
    model = BertForSequenceClassification(config).eval()
    return model, describe(model, id="tiny")


@pytest.fixture
def batch() -> Batch:
    ids = torch.randint(1, 50, (4, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "targets": torch.tensor([0, 1, 2, 0])}


@pytest.fixture
def task() -> Classification:
    return Classification(None, 9, LABELS)


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asserts a speed: few repeats will do."""
    monkeypatch.setattr(measurement, "MAX_REPEATS", measurement.MIN_REPEATS)


def placed(backbone: Backbone, spec: AdapterSpec, layers: range | None = None) -> Architecture:
    sites = backbone.select(roles=spec.default_roles, layers=layers)
    return Architecture.of({site.name: [spec] for site in sites})


def attach(bert: tuple[nn.Module, Backbone], *architectures: Architecture) -> Attachment:
    return Attachment(*bert, architectures, range(len(architectures)))


def memory(bert: tuple[nn.Module, Backbone], task: Classification, batch: Batch, architecture: Architecture) -> float:
    with attach(bert, architecture) as attachment:
        return measure(attachment, task, batch, frozenset({"peak_memory_bytes"})).values["peak_memory_bytes"]


# Memory


def test_counted_memory_is_the_same_every_time(bert, task, batch) -> None:
    architecture = placed(bert[1], Lora(rank=2, dropout=0.1))
    assert len({memory(bert, task, batch, architecture) for _ in range(4)}) == 1


def test_memory_ranks_depth_rank_and_full_fine_tuning(bert, task, batch) -> None:
    backbone = bert[1]
    ladder = [
        Architecture(),
        placed(backbone, Lora(rank=2), range(LAYERS - 1, LAYERS)),
        placed(backbone, Lora(rank=2), range(1, LAYERS)),
        placed(backbone, Lora(rank=2)),
        placed(backbone, Lora(rank=16)),
        placed(backbone, Full()),
    ]
    found = [memory(bert, task, batch, architecture) for architecture in ladder]
    assert found == sorted(set(found))


def test_memory_is_parameters_gradients_moments_and_what_the_batch_keeps(bert, task, batch) -> None:
    backbone = bert[1]
    architecture = placed(backbone, Lora(rank=2))
    double = {name: torch.cat([tensor, tensor]) for name, tensor in batch.items()}
    one, two = (memory(bert, task, b, architecture) for b in (batch, double))
    trained = architecture.num_params(backbone) + backbone.num_head_params
    held = 4 * (backbone.num_params + backbone.num_head_params + 4 * trained)
    # What is kept for the backward pass leads with the batch, so that the rest is what one batch lacks of two.
    # A few numbers do not: the loss keeps one, and so does each product with a scale.
    assert held <= 2 * one - two <= held + 4 * (1 + len(architecture.adapters))


# No trace


@pytest.mark.parametrize("spec", [Lora(rank=2, dropout=0.3), Full()], ids=lambda spec: spec.kind)
def test_measuring_leaves_no_trace(bert, task, batch, spec) -> None:
    model, backbone = bert
    with attach(bert, placed(backbone, spec)) as attachment:
        attachment.train()
        with torch.no_grad():
            next(attachment.trainable())[0].view(-1)[0] = -0.0  # x + 0 * update would turn its sign
        streams = [stream for bank in attachment.banks for stream in bank.dropout_streams]

        def snapshot() -> list[torch.Tensor]:
            tensors = [*model.state_dict().values(), *attachment.state_dict().values()]
            return [t.detach().clone().view(torch.uint8) for t in tensors] + [
                torch.get_rng_state(),
                *(stream.get_state() for stream in streams),
            ]

        before, modes = snapshot(), [m.training for m in (*model.modules(), *attachment.modules())]
        measure(attachment, task, batch, MEASURED)
        assert all(torch.equal(old, new) for old, new in zip(before, snapshot(), strict=True))
        assert modes == [m.training for m in (*model.modules(), *attachment.modules())]
        assert all(p.grad is None for p in (*model.parameters(), *attachment.parameters()))


def test_what_a_failing_step_changed_is_put_back(bert, task, batch, monkeypatch) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (_ for _ in ()).throw(MemoryError("no room")))
    with attach(bert, placed(bert[1], Lora(dropout=0.3))) as attachment:
        states = [bank.dropout_streams[0].get_state() for bank in attachment.banks]
        with pytest.raises(MemoryError):
            measure(attachment, task, batch, frozenset({"step_s"}))
        assert all(parameter.grad is None for parameter, _ in attachment.trainable())
        assert all(
            torch.equal(s, b.dropout_streams[0].get_state()) for s, b in zip(states, attachment.banks, strict=True)
        )


# Which metrics


@pytest.mark.parametrize("wanted", [frozenset(), *(frozenset({name}) for name in sorted(MEASURED)), MEASURED])
def test_only_what_is_wanted_is_measured(bert, task, batch, wanted) -> None:
    with attach(bert, placed(bert[1], Lora())) as attachment:
        costs = measure(attachment, task, batch, wanted)
    assert set(costs.values) == set(costs.spread) == wanted
    assert all(value > 0 for value in costs.values.values())
    assert all(spread >= 0 for spread in costs.spread.values())


def test_unknown_metrics_are_refused_by_name(bert, task, batch) -> None:
    with attach(bert, Architecture()) as attachment, pytest.raises(ValueError, match="accuracy, speed"):
        measure(attachment, task, batch, frozenset({"step_s", "accuracy", "speed"}))


def test_nothing_to_train_costs_a_forward_pass(bert, task, batch, monkeypatch) -> None:
    with attach(bert, Architecture()) as attachment:
        monkeypatch.setattr(attachment, "trainable", lambda: iter(()))
        assert set(measure(attachment, task, batch, MEASURED).values) == MEASURED


# Time, by a clock that the model itself moves


class Clock:
    """Passes `speed` seconds per forward pass of the model and a tenth of it per adapter that runs."""

    def __init__(self, model: nn.Module) -> None:
        self.time, self.speed = 0.0, 1.0
        self.speeds: Iterator[float] = repeat(1.0)
        model.register_forward_pre_hook(self._pass)

    def perf_counter(self) -> float:
        return self.time

    def _pass(self, *_: object) -> None:
        self.speed = next(self.speeds)
        self.time += self.speed

    def watch(self, attachment: Attachment) -> Attachment:
        for bank in attachment.banks:
            bank.slots = self._taking_time(bank.slots)
        return attachment

    def _taking_time(self, slots: Callable[[], Any]) -> Callable[[], Any]:
        def read() -> Any:
            self.time += self.speed / 10
            return slots()

        return read


@pytest.fixture
def clock(bert, monkeypatch) -> Clock:
    clock = Clock(bert[0])
    for module in (measurement, timing):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


TIMES = frozenset({"step_s", "latency_s", "merged_latency_s"})


@pytest.mark.parametrize("spec", [Lora(), Bottleneck()], ids=lambda spec: spec.kind)
def test_a_machine_that_slows_down_between_candidates_changes_nothing(bert, task, batch, clock, spec) -> None:
    found = []
    for slowness in (1.0, 2.0, 0.5):
        clock.speeds = repeat(slowness)
        with clock.watch(attach(bert, placed(bert[1], spec))) as attachment:
            banks = len(attachment.banks)
            found.append(measure(attachment, task, batch, TIMES))
    for costs in found:
        assert costs.values["latency_s"] == pytest.approx(1.0 + banks / 10)
        # The head is merged, and with it a LoRA; a bottleneck keeps its hooks.
        kept = 0 if spec.mergeable else banks - 1
        assert costs.values["merged_latency_s"] == pytest.approx(1.0 + kept / 10)
        assert costs.values["step_s"] == pytest.approx(1.0 + banks / 10)
        assert all(spread == pytest.approx(0.0, abs=1e-9) for spread in costs.spread.values())


def test_a_jump_within_a_measurement_spoils_one_pair_and_not_the_median(bert, task, batch, clock) -> None:
    reference_and_warm_up = measurement.MIN_REPEATS + 1 + 2
    clock.speeds = chain(repeat(1.0, reference_and_warm_up + 5), repeat(3.0))
    with clock.watch(attach(bert, placed(bert[1], Lora()))) as attachment:
        costs = measure(attachment, task, batch, frozenset({"latency_s"}))
        assert costs.values["latency_s"] == pytest.approx(1.0 + len(attachment.banks) / 10)


def test_the_reference_is_taken_once_per_model_and_shape(bert, task, batch, clock) -> None:
    passes = []
    bert[0].register_forward_pre_hook(lambda *_: passes.append(1))

    def counted(examples: int) -> int:
        passes.clear()
        part = {name: tensor[:examples] for name, tensor in batch.items()}
        with attach(bert, placed(bert[1], Lora())) as attachment:
            measure(attachment, task, part, frozenset({"latency_s"}))
        return len(passes)

    arm = 1 + measurement.MIN_REPEATS
    assert [counted(4), counted(4), counted(2), counted(2)] == [3 * arm, 2 * arm, 3 * arm, 2 * arm]


def test_several_slots_are_timed_together_and_not_merged(bert, task, batch) -> None:
    lora = placed(bert[1], Lora())
    with attach(bert, lora, lora) as attachment:
        assert measure(attachment, task, batch, frozenset({"step_s", "latency_s"})).values["latency_s"] > 0
        with pytest.raises(ValueError, match="single slot"):
            measure(attachment, task, batch, frozenset({"merged_latency_s"}))


# Repeats


def test_the_pace_of_a_slow_model_is_that_of_fewer_rows(
    bert: tuple[nn.Module, Backbone], task: Classification, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []

    def timed(bench: Any, run: Callable[[], None]) -> float:
        rows.append(len(bench.batch["targets"]))
        return 0.5 * rows[-1]

    monkeypatch.setattr(measurement._Bench, "timed", timed)
    with attach(bert, placed(bert[1], Lora(rank=2))) as attachment:
        found = step_times(attachment, task, batch, within_s=4.0)
        assert set(rows) == {1, 2}, "two of the four rows: eight passes of theirs would take eight seconds"
        assert (found.step_s, found.scores_s, found.spread, found.share) == (2.0, 2.0, 0.0, 0.5)
        assert step_times(attachment, task, batch, within_s=0.1).share == 0.25, "one row at least"
        assert step_times(attachment, task, batch, within_s=60.0).share == 1.0
        found = step_times(attachment, task, batch, within_s=60.0, at_a_time=3)
        assert (found.step_s, found.share) == (2.0, 0.75), "of all rows, by three of the four"
        assert rows[-1] == 3


def test_the_pace_is_measured_on_the_real_step_and_leaves_no_trace(
    bert: tuple[nn.Module, Backbone], task: Classification, batch: Batch
) -> None:
    with attach(bert, placed(bert[1], Lora(rank=2))) as attachment:
        before = attachment.state()
        found = step_times(attachment, task, batch, within_s=0.5)
        assert found.step_s > found.scores_s > 0.0
        assert found.share == 1.0
        assert all(torch.equal(value, before[name]) for name, value in attachment.state().items())
        assert all(parameter.grad is None for parameter, _ in attachment.trainable())


def test_the_pace_of_scores_is_that_of_all_logits() -> None:
    """A latency reads the last token's logits alone; the output layer takes a fifth of a language model."""
    config = LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                         vocab_size=40)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    rows = torch.arange(10).view(2, 5)
    batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "targets": rows}
    scored: list[int] = []

    class Watched(CausalLM):
        def scores(self, model: nn.Module, batch: Batch) -> Any:
            scored.append(len(batch["targets"]) if not torch.is_grad_enabled() else 0)
            return super().scores(model, batch)

    backbone = describe(model, id="tiny")
    with attach((model, backbone), placed(backbone, Lora(rank=2))) as attachment:
        step_times(attachment, Watched(byte_tokenizer(["a text"]), 5, None), batch, within_s=0.2)
    assert 2 in scored


def test_equal_draws_stop_early_and_noisy_ones_go_on_to_the_limits(monkeypatch) -> None:
    monkeypatch.setattr(measurement, "MAX_REPEATS", 40)
    drawn = []

    def draws(values: Iterator[float]) -> int:
        def draw() -> float:
            drawn.append(next(values))
            return drawn[-1]

        drawn.clear()
        measurement._sample(draw)
        return len(drawn) - 1  # without the warm-up

    assert draws(repeat(1.0)) == measurement.MIN_REPEATS
    assert draws(iter([1.0, 2.0] * 30)) == 40
    monkeypatch.setattr(measurement, "MAX_SECONDS", -1.0)
    assert draws(iter([1.0, 2.0] * 30)) == measurement.MIN_REPEATS


def test_the_median_ignores_the_warm_up_and_outliers() -> None:
    values = iter([100.0, *([1.0, 2.0, 3.0] * 20), 1000.0])
    median, spread = measurement._sample(lambda: next(values))
    assert (median, spread) == (2.0, pytest.approx(1.0, abs=0.5))
