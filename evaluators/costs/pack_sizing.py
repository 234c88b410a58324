"""The number of candidates that fit into one pack, and how a step saves memory if not even one of them fits.

A candidate whose step does not fit is trained by the first of these means that makes it fit. They are ordered by what
they cost:

1. **Fewer candidates in a pack**, down to one. Beyond a few hundred tokens at a time a pack only saves launches and, on
   a CPU, repeated lower layers.
2. **Micro-batches**: half of the rows at a time, a quarter, and so on, whose gradients add up. The operations are the
   same; the weights are read once for each micro-batch, which costs little as long as `ENOUGH_TOKENS` are at hand.
3. **Checkpointing**: layers keep their inputs alone and run again in the backward pass. With a frozen backbone a step
   takes a forward pass (2 operations per weight and token) and the gradients of the activations (2 more); a second
   forward pass is half of that again.
4. **Both**, down to single rows.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import psutil
import torch

from autopeft.evaluators.base import Attaching, OutOfMemoryError, Request, memory_errors
from autopeft.evaluators.costs.step_memory import step_bytes, trained_bytes

#: Share of the free memory that a pack may fill; the forecast excludes tensors that live within one operation only.
FILLED = 0.6
#: More slots bring no more speed: one slot occupies a CPU, some ten thousand tokens occupy a GPU.
MAX_SLOTS = {"cpu": 8, "cuda": 32}
#: Tokens at a time from which products with a weight take longer than its reading: an H100 does some 300 operations in
#: the time of a byte, and in bfloat16 a token does one per byte of a weight (counted, not measured).
ENOUGH_TOKENS = {"cpu": 64, "cuda": 512}


@dataclass(frozen=True, slots=True)
class Levers:
    """How a step saves memory. `rows`: rows at a time, None for the whole minibatch; `checkpointing`: of the layers."""

    rows: int | None = None
    checkpointing: bool = False

    def __str__(self) -> str:
        """Return the levers in words."""
        rows = "whole minibatches" if self.rows is None else f"micro-batches of {self.rows}"
        return f"{rows} and checkpointed layers" if self.checkpointing else rows


#: Whole minibatches, and layers that keep all that their backward pass needs.
WITHOUT_LEVERS = Levers()


@dataclass(frozen=True, slots=True)
class PackPlan:
    """Slots of a pack and the levers of its steps. `needed_bytes`: forecast for a slot with whole minibatches."""

    slots: int
    levers: Levers = WITHOUT_LEVERS
    needed_bytes: int = 0
    free_bytes: int = 0


def order_of_levers(
    rows: int, tokens: int, enough_tokens: int, micro_batch: int | None = None, checkpointing: bool | None = None
) -> list[Levers]:
    """Return the levers for minibatches of `rows` rows of `tokens` tokens, the cheapest first; see the top of the file.

    `micro_batch`: the rows at a time, None for as few as needed. `checkpointing`: whether to, None for if needed.
    """
    at_a_time = [None, *_halves(rows)] if micro_batch is None else [micro_batch if micro_batch < rows else None]
    kept, again = [Levers(n) for n in at_a_time], [Levers(n, True) for n in at_a_time]
    if checkpointing is not None:
        return again if checkpointing else kept
    cheap = [each for each in kept[1:] if each.rows and each.rows * tokens >= enough_tokens]
    return [kept[0], *cheap, *again]


def _halves(rows: int) -> Iterator[int]:
    while rows > 1:
        rows = (rows + 1) // 2
        yield rows


def plan(forecast: Callable[[Levers], int], order: Sequence[Levers], free: int, max_slots: int) -> PackPlan:
    """Return the plan with the first levers of `order` for which a slot fits into `free` bytes, else with the last."""
    first = forecast(order[0])
    for levers in order:
        needed = first if levers is order[0] else forecast(levers)
        if slots := slots_in(free, needed, max_slots):
            return PackPlan(slots, levers, first, free)
    return PackPlan(1, order[-1], first, free)


def slots_in(free: int, needed: int, max_slots: int) -> int:
    """Return how many slots of `needed` bytes may fill `free` bytes."""
    return min(max_slots, int(FILLED * free / max(1, needed)))


def plan_pack(
    evaluator: Attaching, requests: Sequence[Request], order: Sequence[Levers], max_slots: int | None = None
) -> PackPlan:
    """Return the plan for copies of the largest candidate, with the first levers of `order` for which one fits.

    `max_slots`: default `MAX_SLOTS`.
    """
    most = max_slots or MAX_SLOTS[evaluator.device.type]
    for request in sorted(requests, key=lambda request: _size(evaluator, request), reverse=True):
        free = free_bytes(evaluator.device)

        def runs_whole(needed: int, free: int = free) -> bool:
            return needed <= free and slots_in(free, needed, most) < most  # else it may not fit, or changes nothing

        try:
            return plan(forecasts(evaluator, request, runs_whole), order, free, most)
        except OutOfMemoryError:
            return PackPlan(1, order[-1])
        except ValueError:
            continue  # it cannot be attached: its own evaluation reports the reason
    return PackPlan(1, order[0])


def fitting_slots(evaluator: Attaching, requests: Sequence[Request]) -> int:
    """Return the slots of a pack with whole minibatches and without checkpointing, at least 1."""
    return plan_pack(evaluator, requests, [WITHOUT_LEVERS]).slots


def forecasts(evaluator: Attaching, request: Request, runs_whole: Callable[[int], bool]) -> Callable[[Levers], int]:
    """Return the forecast of the bytes that a slot of the candidate adds to the backbone, by levers.

    It runs the longest training row alone, and takes the activations of a minibatch for as many times those of the row
    as it has rows. A minibatch is run too, if `runs_whole` says so for the bytes found by that row. Raises
    OutOfMemoryError and ValueError.
    """
    batch = evaluator.longest_batch(request.candidate)
    rows = len(batch["targets"])
    longest = {name: tensor[-1:] for name, tensor in batch.items()}

    def forecast(levers: Levers) -> int:
        with memory_errors(), evaluator.attach(request) as attachment:
            held, at_a_time = trained_bytes(attachment), min(levers.rows or rows, rows)
            of_a_row = step_bytes(attachment, evaluator.task, longest, levers.checkpointing) - held
            found = held + at_a_time * of_a_row
            if levers == WITHOUT_LEVERS and runs_whole(found):
                found = step_bytes(attachment, evaluator.task, batch)
            trained = (parameter for parameter, _ in attachment.trainable())
            of_banks = (tensor for bank in attachment.banks for tensor in bank.tensors().values())
            return found + sum(tensor.nbytes for tensor in dict.fromkeys((*trained, *of_banks)))

    return forecast


def note_of(plan: PackPlan, order: Sequence[Levers]) -> str | None:
    """Return what a plan does to save memory, as a sentence for the user; None: nothing, because it is not needed."""
    if plan.levers == order[0]:
        return None
    return (
        f"a training step of the largest candidate with {order[0]} would take {plan.needed_bytes / 1e6:,.1f} MB, and"
        f" {FILLED:.0%} of {plan.free_bytes / 1e6:,.1f} MB may be filled: candidates of its kind are trained with"
        f" {plan.levers}, {plan.slots} at a time, with the same results up to rounding. Tried in this order: fewer"
        f" candidates at a time, {', '.join(map(str, order[1:]))}"
    )


def _size(evaluator: Attaching, request: Request) -> tuple[int, int, int]:
    architecture = request.candidate.architecture
    # Experts of most types read copies of the activations.
    rows = max((spec.num_experts_total for _, spec in architecture), default=1)
    return -architecture.lowest_layer(evaluator.backbone), rows, architecture.num_params(evaluator.backbone)


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device in bytes, including what the caching allocator reserved but does not use."""
    if device.type != "cuda":
        available: int = psutil.virtual_memory().available
        return available
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed, as CUDA's caching allocator does.

    By default glibc returns them to the system at once, and the next operation pays for fresh pages: about a tenth of
    the time of a packed step, whose activations are tens of megabytes each. Without glibc this does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    # From malloc.h: M_MMAP_MAX (none), M_TRIM_THRESHOLD and M_ARENA_MAX (one: the backward pass runs in a thread that
    # would otherwise use a separate arena, too small for these blocks).
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-8, 1)):
        libc.mallopt(option, value)
