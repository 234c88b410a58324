"""How many candidates fit side by side, and how freed memory is kept for the next step."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Sequence

import psutil
import torch

from autopeft.evaluators.base import Attaching, OutOfMemoryError, Request, memory_errors
from autopeft.evaluators.costs.measurement import step_bytes

#: Share of the free memory that a pack may fill: its model leaves out what lives within one operation only.
FILLED = 0.6
#: Beyond these, more slots bring no more speed: a CPU is busy with one, a GPU with some ten thousand tokens.
MOST_SLOTS = {"cpu": 8, "cuda": 32}


def fitting_slots(evaluator: Attaching, requests: Sequence[Request]) -> int:
    """Slots of a pack of such candidates: as many as the largest of them would fit, at least 1."""
    backbone = evaluator.backbone

    def size(request: Request) -> tuple[int, int, int]:
        architecture = request.candidate.architecture
        # Experts of most types read copies of the activations.
        rows = max((spec.num_experts_total for _, spec in architecture), default=1)
        return -architecture.lowest_layer(backbone), rows, architecture.num_params(backbone)

    for request in sorted(requests, key=size, reverse=True):
        try:
            with memory_errors(), evaluator.attach(request) as attachment:
                needed = step_bytes(attachment, evaluator.task, evaluator.longest_batch(request.candidate))
        except OutOfMemoryError:
            return 1
        except ValueError:
            continue  # it cannot be attached: its own training will say why
        free = free_bytes(evaluator.device)
        return max(1, min(MOST_SLOTS[evaluator.device.type], int(FILLED * free / max(1, needed))))
    return 1


def free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return psutil.virtual_memory().available
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed, as CUDA's caching allocator does.

    It gives them back to the system at once, and the next operation pays for fresh pages: about a tenth of a packed
    step, whose activations are tens of megabytes each. Elsewhere this does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    # From malloc.h: M_MMAP_MAX (none), M_TRIM_THRESHOLD and M_ARENA_MAX (one: the backward pass runs in a thread that
    # would otherwise have an arena of its own, too small for these blocks).
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-8, 1)):
        libc.mallopt(option, value)
