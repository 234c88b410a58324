"""No path of a language model makes the logits of all tokens: training, scores, measurements, forecasts, proxies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from autopeft.benchmarks.gpu import models
from autopeft.evaluators.base import Request
from autopeft.evaluators.costs.measurement import measure
from autopeft.evaluators.proxies.saliency import Snip
from autopeft.evaluators.tasks.output_layer import from_logits
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.search_space.adapters import Lora
from autopeft.search_space.architecture import Architecture, Candidate

from ...support.tiny_models import seeded

torch.set_num_threads(1)

#: A prime, which no other axis has.
VOCABULARY = 997
WORDS, ROWS = 24, 8


@contextmanager
def no_logits() -> Iterator[list[tuple[int, ...]]]:
    """Record the shapes of all tensors that are made with a number per word for more than a fifth of the tokens."""
    seen: list[tuple[int, ...]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            seen.extend(
                tuple(leaf.shape)
                for leaf in tree_leaves(out)
                if isinstance(leaf, Tensor)
                and VOCABULARY in leaf.shape
                and leaf.numel() > ROWS * WORDS * VOCABULARY / 5
            )
            return out

    with Watch():
        yield seen


@pytest.fixture(scope="module")
def evaluator() -> PackedEvaluator:
    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=VOCABULARY,
        pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    loaded = models.loaded(seeded(LlamaForCausalLM, config))
    return PackedEvaluator(loaded, "causal-lm", models.causal_splits(2 * ROWS, WORDS), max_length=WORDS, pack=2)


def wanted(evaluator: PackedEvaluator) -> Request:
    sites = [site.name for site in evaluator.backbone.sites if site.role in ("attn.q", "mlp.up")]
    training = {"learning_rate": 1e-3, "batch_size": ROWS, "epochs": 1}
    return Request(
        candidate=Candidate(architecture=Architecture.of({name: [Lora(rank=2)] for name in sites}), training=training),
        test=True,
    )


def test_the_watch_sees_logits(evaluator: PackedEvaluator) -> None:
    batch = evaluator.batch("train", range(ROWS))
    with no_logits() as seen:
        from_logits(evaluator.model(input_ids=batch["input_ids"]).logits, batch["targets"])
    assert (ROWS, WORDS, VOCABULARY) in seen


def test_trainings_and_scores(evaluator: PackedEvaluator) -> None:
    with no_logits() as seen:
        outcomes = evaluator.evaluate([wanted(evaluator)] * 2)
    assert all(outcome.measurement for outcome in outcomes)
    assert not seen


@pytest.mark.parametrize("metric", ["peak_memory_bytes", "step_s", "latency_s", "merged_latency_s"])
def test_measurements(evaluator: PackedEvaluator, metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from autopeft.evaluators.costs import measurement

    monkeypatch.setattr(measurement, "MAX_REPEATS", measurement.MIN_REPEATS)
    request = wanted(evaluator)
    with evaluator.attach(request) as attachment, no_logits() as seen:
        measure(attachment, evaluator.task, evaluator.longest_batch(request.candidate), frozenset({metric}))
    assert not seen


def test_forecasts_and_saliencies(evaluator: PackedEvaluator) -> None:
    with no_logits() as seen:
        evaluator.plans.note(wanted(evaluator))
        scores = Snip(evaluator).scores([wanted(evaluator).candidate.architecture])
    assert scores[0] < 0
    assert not seen
