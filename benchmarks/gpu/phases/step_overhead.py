"""(e) rho: a packed step of eight LoRAs of rank 16 over forward and backward pass of the bare frozen backbone.

A few layers of a model are measured, at two depths. Whole models are extrapolated: the time of embedding and output
layer is constant, that of the layers grows with their number. The packed step also collates its minibatch and copies it
to the card, as in a study; for the bare pass it is already there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from autopeft.benchmarks.gpu import models
from autopeft.benchmarks.gpu.phase import ResultRow, Run
from autopeft.benchmarks.speed.overhead import Overhead, measure_overhead
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.search_space.training import Training

#: Layers that are measured, few and more.
DEPTHS = (2, 6)
#: A minibatch of a slot.
ROWS, WORDS = 2, 512
REPEATS = 9
#: Targets of rho for whole models.
TARGETS = {"8B": 1.15, "3B": 1.2, "1.5B": 1.2, "0.5B": 1.3}


def measure(run: Run) -> Iterator[ResultRow]:
    """Yield one row per model and depth, and an extrapolated one per model: rho and the bare backbone's seconds."""
    device = torch.device(run.device)
    dtype = torch.float32 if run.toy else torch.bfloat16
    rows, words, repeats = (1, 8, 2) if run.toy else (ROWS, WORDS, REPEATS)
    for name, target in TARGETS.items():
        if not run.has_time(name, 15.0):
            continue
        shape = models.TOY if run.toy else models.SHAPES[name]
        found: list[Overhead] = []
        for layers in DEPTHS:
            evaluator = PackedEvaluator(
                models.loaded(models.decoder(shape, device, dtype, layers)),
                "causal-lm",
                models.causal_splits(rows, words),
                max_length=words,
                share_lower_layers=False,
            )
            training = Training(learning_rate=1e-3, batch_size=rows, epochs=1)
            found.append(measure_overhead(evaluator, training, seed=0, repeats=repeats))
            yield {
                "model": name, "layers": layers, "slots": found[-1].slots, "rank": found[-1].rank,
                "tokens": found[-1].tokens, "dtype": str(dtype), "bare_s": found[-1].bare_s,
                "rho": found[-1].rho.median, "rho_low": found[-1].rho.low, "rho_high": found[-1].rho.high,
            }  # fmt: skip
            del evaluator
            models.free_memory()
        yield {
            "model": name,
            "layers": shape.layers,
            "extrapolated": True,
            "target": target,
            **_whole(found, shape.layers),
        }


def _whole(found: list[Overhead], layers: int) -> ResultRow:
    """Extrapolate both times linearly from the two depths to the depth of the whole model."""
    few, more = DEPTHS

    def at(short: float, long: float) -> float:
        return short + (long - short) * (layers - few) / (more - few)

    bare = at(*(overhead.bare_s for overhead in found))
    packed = at(*(overhead.rho.median * overhead.bare_s for overhead in found))
    return {"bare_s": bare, "packed_s": packed, "rho": packed / bare}
