"""The number of candidates that fit into one pack, and reuse of freed memory between steps."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Sequence

import psutil
import torch

from autopeft.evaluators.base import Attaching, OutOfMemoryError, Request, memory_errors
from autopeft.evaluators.costs.measurement import step_bytes

#: Share of the free memory that a pack may fill; the forecast excludes tensors that live within one operation only.
FILLED = 0.6
#: More slots bring no more speed: one slot occupies a CPU, some ten thousand tokens occupy a GPU.
MAX_SLOTS = {"cpu": 8, "cuda": 32}


def fitting_slots(evaluator: Attaching, requests: Sequence[Request]) -> int:
    """Return the number of slots of a pack: as many copies of the largest candidate as fit, at least 1."""
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
            continue  # it cannot be attached: its own evaluation reports the reason
        free = free_bytes(evaluator.device)
        return max(1, min(MAX_SLOTS[evaluator.device.type], int(FILLED * free / max(1, needed))))
    return 1


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
