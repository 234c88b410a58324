"""(f) Eight LoRAs of rank 16 by our packed evaluator and by a loop over peft and Trainer: the same steps and rows.

Starved: a minibatch of a candidate is too small to fill the card. Saturated: it fills it. The loop is a careful one
(`benchmarks/speed/trainer.py`) on the same model; its initial values are ours, and its losses must be equal to ours.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from autopeft.benchmarks.gpu import models
from autopeft.benchmarks.gpu.phase import ResultRow, Run
from autopeft.benchmarks.speed.overhead import RANK, SLOTS, attention_lora
from autopeft.benchmarks.speed.trainer import order_trainer
from autopeft.evaluators.base import Request
from autopeft.evaluators.costs.timing import Spread, now
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.search_space.adapters import Lora
from autopeft.search_space.architecture import Candidate
from autopeft.search_space.problem import Fidelity

MODEL = "0.5B"
#: Rounds after one to warm up.
ROUNDS = 2
#: Share of the steps in the shorter of two trainings.
PART = 1 / 3


@dataclass(frozen=True, slots=True)
class Regime:
    """A size of minibatch. `rows` x `words`: of one candidate. `target`: required speed-up of a pack over the loop."""

    name: str
    rows: int
    words: int
    steps: int
    target: float


REGIMES = (Regime("starved", 4, 128, 18, 4.0), Regime("saturated", 8, 512, 9, 1.25))
TOY = (Regime("starved", 1, 8, 3, 4.0), Regime("saturated", 2, 16, 3, 1.25))
#: Allowed relative difference of losses between the arms; below float32 the order of summation matters more.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


def measure(run: Run) -> Iterator[ResultRow]:
    """Yield one row per regime, with the speed-up and the difference of the losses."""
    device = torch.device(run.device)
    dtype = torch.float32 if run.toy else torch.bfloat16
    model = models.decoder(models.TOY if run.toy else models.SHAPES[MODEL], device, dtype)
    loaded = models.loaded(model)
    slots = 2 if run.toy else SLOTS
    regimes = TOY if run.toy else REGIMES
    for regime in regimes:
        if not run.has_time(regime.name, 20.0):
            continue
        evaluator = PackedEvaluator(
            loaded,
            "causal-lm",
            models.causal_splits(regime.rows * regime.steps, regime.words),
            max_length=regime.words,
            pack=slots,
            share_lower_layers=False,
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
        yield _compared(
            run,
            regime,
            evaluator,
            requests,
            dtype,
            rounds=1 if run.toy else ROUNDS,
            reserved_s=0.0 if regime is regimes[-1] else 25.0,
        )
        del evaluator
        gc.collect()


def _compared(
    run: Run,
    regime: Regime,
    evaluator: PackedEvaluator,
    requests: Sequence[Request],
    dtype: torch.dtype,
    *,
    rounds: int,
    reserved_s: float,
) -> ResultRow:
    """Measure both arms in turns, after one round to warm up, at a part of the steps and at all of them.

    The difference of the two is the time of the steps, without the set-up of a candidate. `reserved_s`: time left for
    later regimes.
    """
    parts = [[replace(request, fidelity=Fidelity(share=share)) for request in requests] for share in (PART, 1.0)]
    taken: list[dict[str, float]] = []
    worst, round_s = 0.0, 0.0
    for number in range(rounds + 1):
        if number > 1 and not run.has_time(f"{regime.name}, round {number}", 1.2 * round_s + reserved_s):
            break
        begin = now(evaluator.device)
        (part_pack, _), (part_loop, _) = _pack(evaluator, parts[0]), _loop(evaluator, parts[0])
        (pack, ours), (loop, theirs) = _pack(evaluator, parts[1]), _loop(evaluator, parts[1])
        round_s = now(evaluator.device) - begin
        taken.append({"pack": pack, "loop": loop, "pack_steps": pack - part_pack, "loop_steps": loop - part_loop})
        pairs = [pair for both in zip(ours, theirs, strict=True) for pair in zip(*both, strict=True)]
        worst = max(worst, *(abs(own - other) / other for own, other in pairs))
    measured = taken[1:]
    steps = Spread.of([each["loop_steps"] / each["pack_steps"] for each in measured])
    whole = Spread.of([each["loop"] / each["pack"] for each in measured])
    return {
        "regime": regime.name, "model": MODEL, "dtype": str(dtype), "slots": len(requests), "rank": RANK,
        "tokens": regime.rows * regime.words, "steps": regime.steps, "rounds": len(measured), "target": regime.target,
        "speedup": steps.median, "speedup_low": steps.low, "speedup_high": steps.high,
        "speedup_with_set_up": whole.median,
        "pack_s": measured[-1]["pack"], "loop_s": measured[-1]["loop"],
        "tolerance": TOLERANCES[dtype], "relative_difference": worst, "passed": worst <= TOLERANCES[dtype],
    }  # fmt: skip


def _pack(evaluator: PackedEvaluator, requests: Sequence[Request]) -> tuple[float, list[Sequence[float]]]:
    """Return the seconds of a pack, and the losses of each candidate. Raises RuntimeError where one fails."""
    begin = now(evaluator.device)
    outcomes = evaluator.evaluate(requests)
    seconds = now(evaluator.device) - begin
    losses: list[Sequence[float]] = []
    for outcome in outcomes:
        if outcome.measurement is None:
            raise RuntimeError(f"a candidate of the pack failed: {outcome.reason}")
        losses.append(outcome.measurement.losses)
    return seconds, losses


def _loop(evaluator: PackedEvaluator, requests: Sequence[Request]) -> tuple[float, list[Sequence[float]]]:
    """Return the seconds of the loop over peft and Trainer, and the losses of each candidate."""
    losses: list[Sequence[float]] = []
    seconds = 0.0
    for request in requests:
        with evaluator.attach(request) as attachment:
            state = attachment.state()
        with TemporaryDirectory() as folder:
            begin = now(evaluator.device)
            trainer = order_trainer(evaluator, _with_peft(evaluator, request, state), request, folder)
            trainer.train()
            trainer.evaluate()
            seconds += now(evaluator.device) - begin
        losses.append(torch.stack(trainer.losses).tolist())
        del trainer
        gc.collect()
    return seconds, losses


def _with_peft(evaluator: PackedEvaluator, request: Request, state: dict[str, torch.Tensor]) -> Any:
    """Return a copy of the backbone with peft's LoRA at the sites of the candidate, with our initial values."""
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
