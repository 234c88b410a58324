"""(g) Whether a CUDA graph of the packed step, or `torch.compile` of the frozen part, earns its place.

Both want fixed shapes, and minibatches are padded to their longest row: each width would be captured or compiled anew.
So what the first call takes stands beside the gain, as the steps after which it has paid.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from autopeft.benchmarks.gpu import models
from autopeft.benchmarks.gpu.clock import capture, host_seconds
from autopeft.benchmarks.gpu.phase import Row, Run
from autopeft.benchmarks.gpu.phases.equal_work import MODEL, REGIMES, TOY, Regime
from autopeft.evaluators.backbones import LoadedBackbone
from autopeft.evaluators.host import Attachment
from autopeft.evaluators.optimizer import PackedAdamW
from autopeft.evaluators.timing import now
from autopeft.kernels.linear_cross_entropy import linear_cross_entropy
from autopeft.search_space.training import Training
from autopeft.studies.bench.overhead import RANK, SLOTS, attention_lora

REPEATS = 11
#: A gain that is worth the code: both have to be kept right in every later change.
WANTED = 1.2


def measure(run: Run) -> Iterator[Row]:
    device = torch.device(run.device)
    dtype = torch.float32 if run.toy else torch.bfloat16
    # Tracing without code generation shows as much where no time counts.
    backend = "aot_eager" if run.toy else "inductor"
    loaded = models.loaded(models.decoder(models.TOY if run.toy else models.SHAPES[MODEL], device, dtype))
    for regime in TOY if run.toy else REGIMES:
        head = {
            "regime": regime.name,
            "model": MODEL,
            "dtype": str(dtype),
            "slots": SLOTS,
            "rank": RANK,
            "wanted": WANTED,
        }
        eager_s: dict[str, float] = {}
        for step, make in STEPS.items():
            for way in ("eager", "graph", "compiled"):
                what = f"{step}, {way}, {regime.name}"
                if not run.has_time(what, 20.0):
                    continue
                row: Row = {**head, "step": step, "way": way}
                if way == "graph" and device.type != "cuda":
                    yield row | {"note": "CUDA alone has them"}
                    continue
                try:
                    row |= _timed(make, way, loaded, regime, device, backend, 2 if run.toy else REPEATS)
                except Exception as error:  # that it cannot be captured or compiled is the answer
                    row |= {"error": f"{type(error).__name__}: {error}"[:1000]}
                else:
                    base = eager_s.setdefault(step, row["step_s"])
                    row["over_eager"] = base / row["step_s"]
                    saved = base - row["step_s"]
                    row["steps_to_pay"] = row["first_s"] / saved if saved > 0 else float("inf")
                yield row
                torch._dynamo.reset()
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()


#: Makes a step over fixed inputs, and says which part of the model may be compiled.
Make = Callable[[LoadedBackbone, Regime, torch.device], tuple[Callable[[], Any], Any, Callable[[], None]]]


def _timed(
    make: Make, way: str, loaded: LoadedBackbone, regime: Regime, device: torch.device, backend: str, repeats: int
) -> Row:
    step, part, close = make(loaded, regime, device)
    call, forward = step, part.forward
    try:
        begin = now(device)
        if way == "compiled":
            part.forward = torch.compile(forward, backend=backend)
            step()
        elif way == "graph":
            call = capture(step, device, warm_ups=3)
        first = now(device) - begin
        return {"first_s": first if way != "eager" else 0.0, "step_s": host_seconds(call, device, repeats)}
    finally:
        part.__dict__.pop("forward", None)
        close()


def _inputs(model: Any, regime: Regime, slots: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [N, T], and of the tokens to predict [M]: their places and they. No row is padded."""
    ids = torch.randint(2, models.WORDS, (slots * regime.rows, regime.words), device=device)
    places = torch.arange(ids.numel(), device=device).view_as(ids)[:, :-1].reshape(-1)
    return ids, places, ids[:, 1:].reshape(-1)


def _loss(model: Any, decoder: Any, ids: Tensor, places: Tensor, wanted: Tensor) -> Tensor:
    """What the task computes, with places that are known beforehand: to find them waits for the device, which a capture
    cannot.
    """
    hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
    return linear_cross_entropy(hidden.flatten(0, 1)[places], model.get_output_embeddings().weight, wanted)[0]


def _packed(
    loaded: LoadedBackbone, regime: Regime, device: torch.device
) -> tuple[Callable[[], Any], nn.Module, Callable[[], None]]:
    """The step of a pack."""
    model: Any = loaded.model
    architecture = attention_lora(loaded.backbone, RANK)
    attachment = Attachment(model, loaded.backbone, [architecture] * SLOTS, [0] * SLOTS)
    optimizer = PackedAdamW(attachment, [Training(learning_rate=1e-3)] * SLOTS)
    rates = torch.zeros(SLOTS, device=device)  # every step does the same work
    inputs = _inputs(model, regime, SLOTS, device)

    def step() -> None:
        _loss(model, model.model, *inputs).view(SLOTS, -1).mean(1).sum().backward()
        optimizer.step(1, rates)

    return step, model.model, attachment.detach


def _alone(
    loaded: LoadedBackbone, regime: Regime, device: torch.device
) -> tuple[Callable[[], Any], nn.Module, Callable[[], None]]:
    """The step of one candidate as the loop makes it, with peft's modules and AdamW in one kernel."""
    model: Any = loaded.model
    targets = [loaded.backbone.site(name).module for name, _ in attention_lora(loaded.backbone, RANK).adapters]
    adapted: Any = get_peft_model(model, LoraConfig(r=RANK, target_modules=targets, task_type="CAUSAL_LM"))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True, capturable=device.type == "cuda")
    inputs = _inputs(model, regime, 1, device)

    def step() -> None:
        _loss(model, model.model, *inputs).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    def close() -> None:
        adapted.unload()
        for parameter in model.parameters():
            parameter.requires_grad_(True)

    return step, model.model, close


STEPS: dict[str, Make] = {"pack": _packed, "peft, alone": _alone}
