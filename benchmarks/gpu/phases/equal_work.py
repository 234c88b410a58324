"""(f) Eight LoRAs of rank 16 by our packed evaluator and by a loop over peft and Trainer: the same steps and rows.

Starved: a minibatch of a candidate is too small to fill the card. Saturated: it fills it. The loop is a careful one
(`studies/bench/trainer.py`), on the very same model; its initial values are ours, and its losses have to be ours.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from autopeft.benchmarks.gpu import models
from autopeft.benchmarks.gpu.phase import Row, Run
from autopeft.evaluators.base import Request
from autopeft.evaluators.packed import PackedEvaluator
from autopeft.evaluators.timing import Spread, now
from autopeft.search_space.adapters import Lora
from autopeft.search_space.architecture import Candidate
from autopeft.studies.bench.overhead import RANK, SLOTS, attention_lora
from autopeft.studies.bench.trainer import order_trainer

MODEL = "0.5B"
#: After one to warm up.
ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Regime:
    """`rows` x `words`: a minibatch of one candidate. `target`: how many times faster a pack is to be."""

    name: str
    rows: int
    words: int
    steps: int
    target: float


REGIMES = (Regime("starved", 4, 128, 24, 4.0), Regime("saturated", 8, 512, 8, 1.25))
TOY = (Regime("starved", 1, 8, 3, 4.0), Regime("saturated", 2, 16, 3, 1.25))
#: Relative difference of losses between the arms; in less than float32 the order of summation shows earlier.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


def measure(run: Run) -> Iterator[Row]:
    device = torch.device(run.device)
    dtype = torch.float32 if run.toy else torch.bfloat16
    model = models.decoder(models.TOY if run.toy else models.SHAPES[MODEL], device, dtype)
    loaded = models.loaded(model)
    slots = 2 if run.toy else SLOTS
    for regime in TOY if run.toy else REGIMES:
        if not run.has_time(regime.name, 20.0):
            continue
        evaluator = PackedEvaluator(
            loaded,
            "causal-lm",
            models.causal_splits(regime.rows * regime.steps, regime.words),
            max_length=regime.words,
            pack=slots,
            share_prefix=False,
        )
        architecture = attention_lora(loaded.backbone, RANK)
        requests = [
            Request(
                candidate=Candidate(
                    architecture=architecture,
                    training={"learning_rate": 1e-3 * 0.8**k, "batch_size": regime.rows, "epochs": 1},
                )
            )
            for k in range(slots)
        ]
        yield _compared(run, regime, evaluator, requests, dtype, rounds=1 if run.toy else ROUNDS)
        del evaluator
        gc.collect()


def _compared(
    run: Run, regime: Regime, evaluator: PackedEvaluator, requests: Sequence[Request], dtype: torch.dtype, rounds: int
) -> Row:
    """Both arms in turns, after one round each to warm up."""
    taken: list[tuple[float, float, float, float]] = []  # of each round: pack and loop, whole and steps alone
    worst = 0.0
    for number in range(rounds + 1):
        if number > 1 and not run.has_time(f"{regime.name}, round {number}", 1.5 * sum(taken[-1][:2])):
            break
        begin = now(evaluator.device)
        outcomes = evaluator.evaluate(requests)
        packed = now(evaluator.device) - begin
        looped, stepped, losses = _loop(evaluator, requests)
        for outcome, theirs in zip(outcomes, losses, strict=True):
            if outcome.measurement is None:
                raise RuntimeError(f"a candidate of the pack failed: {outcome.reason}")
            pairs = zip(outcome.measurement.losses, theirs, strict=True)
            worst = max(worst, *(abs(ours - other) / other for ours, other in pairs))
        ours = sum(outcome.measurement.train_s for outcome in outcomes if outcome.measurement is not None)
        taken.append((packed, looped, ours, stepped))
    pack_s, loop_s, pack_steps_s, loop_steps_s = zip(*taken[1:], strict=True)
    whole, steps = _ratios(loop_s, pack_s), _ratios(loop_steps_s, pack_steps_s)
    return {
        "regime": regime.name, "model": MODEL, "dtype": str(dtype), "slots": len(requests), "rank": RANK,
        "tokens": regime.rows * regime.words, "steps": regime.steps, "rounds": len(pack_s), "target": regime.target,
        "speedup": whole.median, "speedup_low": whole.low, "speedup_high": whole.high,
        "steps_speedup": steps.median, "steps_speedup_low": steps.low, "steps_speedup_high": steps.high,
        "pack_s": Spread.of(pack_s).median, "loop_s": Spread.of(loop_s).median,
        "tolerance": TOLERANCES[dtype], "relative_difference": worst, "passed": worst <= TOLERANCES[dtype],
    }  # fmt: skip


def _ratios(others: Sequence[float], own: Sequence[float]) -> Spread:
    return Spread.of([other / mine for other, mine in zip(others, own, strict=True)])


def _loop(evaluator: PackedEvaluator, requests: Sequence[Request]) -> tuple[float, float, list[list[float]]]:
    """Seconds of the whole loop and of its steps, and the losses of each candidate."""
    losses, whole_s, steps_s = [], 0.0, 0.0
    for request in requests:
        with evaluator.attach(request) as attachment:
            state = attachment.state()
        with TemporaryDirectory() as folder:
            begin = now(evaluator.device)
            model = _with_peft(evaluator, request, state)
            trainer = order_trainer(evaluator, model, request, folder)
            prepared = now(evaluator.device)
            trainer.train()
            steps_s += now(evaluator.device) - prepared
            trainer.evaluate()
            whole_s += now(evaluator.device) - begin
        losses.append(torch.stack(trainer.losses).tolist())
        del model, trainer
        gc.collect()
    return whole_s, steps_s, losses


def _with_peft(evaluator: PackedEvaluator, request: Request, state: dict[str, torch.Tensor]) -> Any:
    """A copy of the backbone with peft's LoRA at the sites of the candidate, and our initial values in it."""
    backbone = evaluator.backbone
    placed = [(backbone.site(name), specs) for name, specs in request.candidate.architecture.adapters]
    spec = placed[0][1][0]
    assert isinstance(spec, Lora)
    targets = [site.module for site, _ in placed]
    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=targets, task_type="CAUSAL_LM")
    model: Any = get_peft_model(copy.deepcopy(evaluator.model), config)
    with torch.no_grad():
        for site, _ in placed:
            module = model.base_model.model.get_submodule(site.module)
            module.lora_A["default"].weight.copy_(state[f"{site.name}/lora/A"])
            module.lora_B["default"].weight.copy_(state[f"{site.name}/lora/B"])
    return model
