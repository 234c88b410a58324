"""(h) Predicted memory of a pack (`evaluators/costs/pack_sizing.py`) against the allocator's high-water mark.

Without levers in packs of several sizes, and with micro-batches, checkpointing and both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from autopeft.benchmarks.gpu import models
from autopeft.benchmarks.gpu.phase import ResultRow, Run
from autopeft.evaluators.base import Request
from autopeft.evaluators.costs.pack_sizing import (
    FILLED,
    WITHOUT_LEVERS,
    Levers,
    forecasts,
    free_bytes,
    plan_pack,
)
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.search_space.adapters import AdapterSpec, Bottleneck, Lora
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.backbones.backbone import LINEAR_ROLES, Backbone

#: The model's layers, the minibatch of a slot, and steps.
LAYERS, ROWS, WORDS, STEPS = 8, 4, 512, 2
SLOTS = (1, 2, 4, 8, 16)
#: The levers, and the slots with which they are tried.
LEVERS, SLOTS_WITH_LEVERS = (Levers(1), Levers(checkpointing=True), Levers(1, checkpointing=True)), (1, 8)


def measure(run: Run) -> Iterator[ResultRow]:
    """Yield one row per model, adapter, number of slots and levers: predicted and measured bytes."""
    device = torch.device(run.device)
    dtype = torch.float32 if run.toy else torch.bfloat16
    rows, words = (2, 8) if run.toy else (ROWS, WORDS)
    slots_tried, slots_with_levers = ((1, 3), (3,)) if run.toy else (SLOTS, SLOTS_WITH_LEVERS)
    tried = [(slots, WITHOUT_LEVERS) for slots in slots_tried]
    tried += [(slots, levers) for levers in LEVERS for slots in slots_with_levers]
    for name in ("0.5B",) if run.toy else ("0.5B", "3B"):
        shape = models.TOY if run.toy else models.SHAPES[name]
        loaded = models.loaded(models.decoder(shape, device, dtype, None if run.toy else LAYERS))
        splits = models.causal_splits(rows * STEPS, words)
        for kind, architecture in _architectures(loaded.backbone).items():
            for slots, levers in tried:
                if not run.has_time(f"{name}, {kind}, {slots} slots, {levers}", 5.0):
                    continue
                evaluator = PackedEvaluator(
                    loaded, "causal-lm", splits, max_length=words, pack=slots, share_lower_layers=False,
                    micro_batch=levers.rows, checkpointing=levers.checkpointing,
                )  # fmt: skip
                training = {"learning_rate": 1e-3, "batch_size": rows, "epochs": 1}
                request = Request(candidate=Candidate(architecture=architecture, training=training))
                yield {
                    "model": name, "layers": loaded.backbone.num_layers, "adapter": kind, "slots": slots,
                    "levers": str(levers), "tokens": rows * words, "dtype": str(dtype),
                    **_of_pack(evaluator, request, slots, levers),
                }  # fmt: skip


def _of_pack(evaluator: PackedEvaluator, request: Request, slots: int, levers: Levers) -> dict[str, Any]:
    """Return forecast and high-water mark of `slots` such candidates, without the backbone's memory."""
    device = evaluator.device
    free = free_bytes(device)
    forecast = slots * forecasts(evaluator, request, lambda needed: needed <= free)(levers)
    fitting = plan_pack(evaluator, [request], [levers]).slots
    row: dict[str, Any] = {"forecast_bytes": forecast, "fitting_slots": fitting}
    models.free_memory()
    before = 0
    if device.type == "cuda":
        if forecast > FILLED * free_bytes(device):
            return row | {"note": "more than the memory for a pack here"}
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    outcomes = evaluator.evaluate([request] * slots)
    failed = [outcome.reason for outcome in outcomes if outcome.measurement is None]
    if failed:
        return row | {"passed": False, "error": failed[0]}
    if device.type != "cuda":
        return row | {"note": "measured only on CUDA, by its allocator"}
    measured = torch.cuda.max_memory_allocated(device) - before
    # By its forecast a pack may fill this share of the free memory; its actual memory has to fit into all of it.
    return row | {"measured_bytes": measured, "ratio": measured / forecast, "passed": FILLED * measured <= forecast}


def _architectures(backbone: Backbone) -> dict[str, Architecture]:
    def at(spec: AdapterSpec, roles: tuple[str, ...]) -> Architecture:
        return Architecture.of({site.name: [spec] for site in backbone.sites if site.role in roles})

    return {
        "lora, query and value": at(Lora(rank=16), ("attn.q", "attn.v")),
        "lora with dropout, all linears": at(Lora(rank=16, dropout=0.1), LINEAR_ROLES),
        "bottleneck": at(Bottleneck(size=16), Bottleneck.default_roles),
    }
