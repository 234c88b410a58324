"""(g) Whether a CUDA graph of the packed step, or `torch.compile` of the frozen part, is worth its code.

Both need fixed shapes, and minibatches are padded to their longest row: each width would be captured or compiled again.
So the time of the first call (a capture with its three steps to warm up, or a compilation) is reported with the gain,
as the number of steps after which it has paid off. Measured on a few layers of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from autopeft.benchmarks.gpu import models
from autopeft.benchmarks.gpu.clock import capture, host_seconds
from autopeft.benchmarks.gpu.phase import ResultRow, Run
from autopeft.benchmarks.gpu.phases.equal_work import MODEL, REGIMES, TOY, Regime
from autopeft.benchmarks.speed.overhead import RANK, SLOTS, attention_lora
from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.backbones import LoadedBackbone
from autopeft.evaluators.costs.timing import now
from autopeft.evaluators.training.optimizer import PackedAdamW
from autopeft.kernels.linear_cross_entropy import linear_cross_entropy
from autopeft.search_space.training import Training

REPEATS = 11
#: Enough to measure a ratio, few enough to compile.
LAYERS = 6
#: SDPA without a mask, for all ways alike: by default transformers makes none where it can inspect the mask of a step,
#: and one where it cannot, as under a capture; that selects another kernel.
UNMASKED = "sdpa_unmasked"
#: A gain that is worth the code, which every later change has to maintain.
WANTED = 1.2


def measure(run: Run) -> Iterator[ResultRow]:
    """Yield one row per step, regime and way: seconds, gain over eager, and the steps until it pays off."""
    device = torch.device(run.device)
    dtype = torch.float32 if run.toy else torch.bfloat16
    # In a dry run, tracing without code generation is enough.
    backend = "aot_eager" if run.toy else "inductor"
    regimes = TOY[:1] if run.toy else REGIMES
    AttentionInterface.register(UNMASKED, sdpa_attention_forward)
    model: Any = models.decoder(models.TOY if run.toy else models.SHAPES[MODEL], device, dtype, LAYERS)
    model.set_attn_implementation(UNMASKED)
    loaded = models.loaded(model)
    eager_s: dict[tuple[str, str], float] = {}
    # The slowest to prepare comes last; after a failed capture the process cannot capture again.
    for way, seconds in (("eager", 4.0), ("graph", 4.0), ("compiled", 25.0)):
        for regime in regimes:
            for step, make in STEPS.items():
                what = f"{step}, {way}, {regime.name}"
                if not run.has_time(what, seconds):
                    continue
                row: ResultRow = {
                    "regime": regime.name, "step": step, "way": way, "model": MODEL, "layers": LAYERS,
                    "dtype": str(dtype), "slots": SLOTS, "rank": RANK, "wanted": WANTED,
                }  # fmt: skip
                if way == "graph" and device.type != "cuda":
                    yield row | {"note": "only on CUDA"}
                    continue
                try:
                    row |= _timed(make, way, loaded, regime, device, backend, 2 if run.toy else REPEATS)
                except Exception as error:  # a step that cannot be captured or compiled is a result
                    row |= {"error": f"{type(error).__name__}: {error}"[:1000]}
                else:
                    if way == "eager":
                        eager_s[step, regime.name] = row["step_s"]
                    if base := eager_s.get((step, regime.name)):
                        saved = base - row["step_s"]
                        row["over_eager"] = base / row["step_s"]
                        row["steps_to_pay"] = row["first_s"] / saved if saved > 0 else float("inf")
                yield row
                torch._dynamo.reset()
                models.free_memory()


#: Returns a step over fixed inputs, the part of the model that may be compiled, and a function that undoes the set-up.
Make = Callable[[LoadedBackbone, Regime, torch.device], tuple[Callable[[], Any], Any, Callable[[], None]]]


def _timed(
    make: Make, way: str, loaded: LoadedBackbone, regime: Regime, device: torch.device, backend: str, repeats: int
) -> ResultRow:
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
    """Return token ids [N, T], and the places and ids of the tokens to predict, [M] each. No row is padded."""
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(2, models.WORDS, (slots * regime.rows, regime.words), generator=generator, device=device)
    places = torch.arange(ids.numel(), device=device).view_as(ids)[:, :-1].reshape(-1)
    return ids, places, ids[:, 1:].reshape(-1)


def _loss(model: Any, decoder: Any, ids: Tensor, places: Tensor, wanted: Tensor) -> Tensor:
    """Compute the loss of the task at places that are given.

    Finding them would wait for the device, which is impossible under a capture.
    """
    hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
    return linear_cross_entropy(hidden.flatten(0, 1)[places], model.get_output_embeddings().weight, wanted)[0]


def _packed(
    loaded: LoadedBackbone, regime: Regime, device: torch.device
) -> tuple[Callable[[], Any], nn.Module, Callable[[], None]]:
    """Make the step of a pack."""
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
    """Make the step of one candidate as the loop does, with peft's modules and AdamW in one kernel."""
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
