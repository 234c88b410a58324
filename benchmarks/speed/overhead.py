"""Overhead of adapters: a packed step over the bare backbone's forward and backward pass.

Notation: K slots; rho as in "cost of a step against the bare frozen backbone on the same tokens".
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.attachment.layout import repeated
from autopeft.evaluators.costs.timing import REPEATS, Spread, interleaved, now
from autopeft.evaluators.training import batching
from autopeft.evaluators.training.optimizer import PackedAdamW
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.search_space.adapters.lora import Lora
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.training import Training

SLOTS = 8
RANK = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """Overhead of a packed step.

    `rho`: median of the ratios of consecutive measurements, and their quartiles. `bare_s`: the bare backbone's pass.
    """

    slots: int
    rank: int
    tokens: int
    rho: Spread
    bare_s: float


def attention_lora(backbone: Backbone, rank: int, lowest: int = 0) -> Architecture:
    """Return LoRA on query and value, or on a fused projection, of all layers from `lowest` on."""
    roles = ("attn.q", "attn.v") if "attn.q" in backbone.roles else ("attn.qkv",)
    sites = [site for site in backbone.sites if site.role in roles and (site.layer or 0) >= lowest]
    return Architecture.of({site.name: [Lora(rank=rank)] for site in sites})


def measure_overhead(evaluator: PackedEvaluator, training: Training, seed: int, *, repeats: int = REPEATS) -> Overhead:
    """Measure a step of `SLOTS` candidates over a pass of the same rows through the bare backbone.

    The bare pass is forward and backward, down to the output of the embedding. `evaluator`: one that shares no layer
    between candidates. `repeats`: pairs of the two, in turns.
    """
    batches = batching.ordered_batches(evaluator.lengths["train"], training.batch_size)
    indices = batches[len(batches) // 2]
    one = evaluator.batch("train", indices)
    batch = {name: repeated(tensor, SLOTS) for name, tensor in one.items()}
    architecture = attention_lora(evaluator.backbone, RANK)
    with Attachment(evaluator.model, evaluator.backbone, [architecture] * SLOTS, [seed] * SLOTS) as attachment:
        optimizer = PackedAdamW(attachment, [training] * SLOTS)
        rates = torch.full((SLOTS,), 0.0, device=evaluator.device)  # every step does the same work

        def packed() -> float:
            begin = now(evaluator.device)
            evaluator.scores(attachment, "train", indices)["loss"].mean(1).sum().backward()
            optimizer.step(1, rates)
            return now(evaluator.device) - begin

        taken: list[float] = []

        def bare() -> float:
            model: Any = evaluator.model
            with attachment.bare():
                hook = model.get_input_embeddings().register_forward_hook(_require_gradient)
                try:
                    begin = now(evaluator.device)
                    evaluator.task.scores(model, batch)["loss"].mean().backward()
                    taken.append(now(evaluator.device) - begin)
                finally:
                    hook.remove()
            return taken[-1]

        rho = interleaved(packed, bare, repeats=repeats)
    return Overhead(slots=SLOTS, rank=RANK, tokens=batch["input_ids"].numel(), rho=rho, bare_s=median(taken))


def _require_gradient(module: Any, args: Any, output: Tensor) -> Tensor:
    return output.requires_grad_()
