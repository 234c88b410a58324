"""(c) Candidates of every adapter type in one pack against the same candidates alone: the losses of 20 steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch

from autopeft.benchmarks.gpu import models
from autopeft.benchmarks.gpu.phase import ResultRow, Run
from autopeft.evaluators.base import Outcome, Request
from autopeft.evaluators.training.base import TrainingEvaluator
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.evaluators.training.train import TrainEvaluator
from autopeft.search_space.adapters import ADAPTERS, AdapterSpec, Lora, Mixture
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.backbones.backbone import Backbone

DROPOUT = 0.1
#: Sizes of the candidates of a pack, for types that have one.
SIZES = (8, 1, 5)
#: Training of each candidate; no two have the same optimiser.
TRAININGS: tuple[dict[str, Any], ...] = (
    {"learning_rate": 3e-3, "weight_decay": 0.1, "max_grad_norm": 0.3, "schedule": "cosine"},
    {"learning_rate": 1e-3, "warmup": 0.2},
    {"learning_rate": 5e-3, "weight_decay": 0.01, "schedule": "constant", "max_grad_norm": 0.0},
    {"learning_rate": 2e-3},
)
#: Allowed relative difference of a loss at any step. In float32, that of another order of summation.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
#: Steps that are compared, None for all and the held-out loss. Later, rounding changes the routers' choices.
COMPARED = {torch.float32: None, torch.bfloat16: 5}
#: Losses are recorded to five digits after the point.
ROUNDING = 1.1e-5


def measure(run: Run) -> Iterator[ResultRow]:
    """Yield one row per adapter type, model and type: the largest difference and whether the test passed."""
    device = torch.device(run.device)
    steps, batch, words = (4, 2, 6) if run.toy else (20, 8, 48)
    hidden, layers = (32, 2) if run.toy else (256, 4)
    shape = models.DecoderShape(hidden, layers, 4, 2, 2 * hidden, models.WORDS + 2)
    cases = (
        ("decoder", torch.float32, "causal-lm", models.causal_splits(batch * steps, words)),
        ("decoder", torch.bfloat16, "causal-lm", models.causal_splits(batch * steps, words)),
        ("encoder", torch.float32, "classification", models.labelled_splits(batch * steps, words)),
        ("encoder", torch.bfloat16, "classification", models.labelled_splits(batch * steps, words)),
    )
    for family, dtype, task, splits in cases:
        made = (
            models.decoder(shape, device, dtype)
            if family == "decoder"
            else models.encoder(device, dtype, hidden, layers)
        )
        loaded = models.loaded(made)
        pair = (
            TrainEvaluator(loaded, task, splits, max_length=words),
            PackedEvaluator(loaded, task, splits, max_length=words, pack=len(TRAININGS)),
        )
        # As on a GPU, in the dry run too.
        pair[1].mixes_depths = True
        for kind in (*(kind for kind in ADAPTERS if kind != "full"), Mixture.kind):
            if run.has_time(f"{kind}, {family}, {dtype}", 4.0):
                yield _compared(kind, family, dtype, pair, batch, steps)


def _compared(
    kind: str,
    family: str,
    dtype: torch.dtype,
    pair: tuple[TrainingEvaluator, TrainingEvaluator],
    batch: int,
    steps: int,
) -> ResultRow:
    backbone = pair[0].backbone
    row: ResultRow = {
        "adapter": kind,
        "model": family,
        "dtype": str(dtype),
        "steps": steps,
        "tolerance": TOLERANCES[dtype],
    }
    placed = [_placed(spec, backbone, lowest) for lowest, spec in enumerate(_variants(kind))]
    if not all(placed):
        return row | {"note": "this model has no site for it"}
    placed.append(_placed(Lora(rank=2, dropout=DROPOUT), backbone, 0))
    wanted = [
        Request(candidate=Candidate(architecture=own, training={"epochs": 1, "batch_size": batch, **training}))
        for own, training in zip(placed, TRAININGS, strict=False)
    ]
    alone, together = (evaluator.evaluate(wanted) for evaluator in pair)
    broken = [outcome.reason for outcome in (*alone, *together) if outcome.measurement is None]
    if broken:
        return row | {"passed": False, "error": "; ".join(sorted(set(broken)))}
    worst = max(_difference(*outcomes, COMPARED[dtype]) for outcomes in zip(together, alone, strict=True))
    ends = [outcome.measurement.losses[-1] for outcome in alone if outcome.measurement is not None]
    return row | {
        "passed": worst <= TOLERANCES[dtype],
        "relative_difference": worst,
        "candidates": len(wanted),
        # About the difference that a slot with another's values would have.
        "between_candidates": (max(ends) - min(ends)) / max(ends),
    }


def _difference(packed: Outcome, alone: Outcome, steps: int | None) -> float:
    """Return the largest relative difference of the first `steps` losses (None: all, and the held-out loss)."""
    assert packed.measurement is not None
    assert alone.measurement is not None
    pairs = list(zip(packed.measurement.losses, alone.measurement.losses, strict=True))[:steps]
    if steps is None:
        pairs.append((packed.measurement.values["loss"], alone.measurement.values["loss"]))
    return max(max(0.0, abs(a - b) - ROUNDING) / abs(b) for a, b in pairs)


def _variants(kind: str) -> list[AdapterSpec]:
    """Return a type in three sizes, the last one without dropout."""
    if kind == Mixture.kind:
        return [
            Mixture(expert=Lora(rank=2, dropout=dropout), experts=experts)
            for experts, dropout in ((4, DROPOUT), (2, DROPOUT), (3, 0.0))
        ]
    spec = ADAPTERS[kind]()
    found = []
    for size, dropout in zip(SIZES, (DROPOUT, DROPOUT, 0.0), strict=True):
        changes: dict[str, Any] = {} if spec.size_field is None else {spec.size_field: size}
        if any(field.name == "dropout" for field in fields(spec)):
            changes["dropout"] = dropout
        found.append(replace(spec, **changes))
    return found


def _placed(spec: AdapterSpec, backbone: Backbone, lowest: int) -> Architecture:
    """Return `spec` at its default roles in the layers from `lowest` on: candidates of a pack differ in depth."""
    lowest = min(lowest, backbone.num_layers - 1)
    return Architecture.of(
        {
            site.name: [spec]
            for site in backbone.sites
            if site.role in spec.default_roles and site.layer is not None and site.layer >= lowest and spec.fits(site)
        }
    )
