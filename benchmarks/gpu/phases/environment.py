"""(a) The card, the versions, and the two ceilings that every other figure is compared with."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator

import torch

from autopeft.benchmarks.gpu.clock import device_seconds
from autopeft.benchmarks.gpu.phase import ResultRow, Run
from autopeft.studies.versions import versions_of

PACKAGES = ("torch", "triton", "transformers", "peft", "safetensors", "numpy")


def measure(run: Run) -> Iterator[ResultRow]:
    """Yield rows of the versions, the host, the card, and the rates of copies and matrix products."""
    device = torch.device(run.device)
    yield {"what": "versions", "python": platform.python_version(), **versions_of(PACKAGES)}
    yield {"what": "host", "machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        yield _card(device)
    yield _bandwidth(run, device)
    for name in ("bfloat16", "float16", "float32", "tf32"):
        if device.type == "cuda" or name in ("bfloat16", "float32"):
            yield _matmul(run, device, name)
    tiny = torch.zeros(16, device=device)
    yield {"what": "smallest operation", "device_s": device_seconds([lambda: tiny.add_(1.0)], device)}


def _card(device: torch.device) -> ResultRow:
    found = torch.cuda.get_device_properties(device)
    return {
        "what": "card",
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "memory_bytes": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        "l2_bytes": getattr(found, "L2_cache_size", None),
        "shared_memory_per_block_bytes": getattr(found, "shared_memory_per_block_optin", None),
        "cuda": torch.version.cuda,
        "cards": torch.cuda.device_count(),
        "driver": _nvidia_smi("driver_version"),
        "clock_mhz": _nvidia_smi("clocks.sm"),
    }


def _nvidia_smi(field: str) -> str | None:
    """Return a field of the first card from nvidia-smi, which only reads; None where it cannot."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return lines[0].strip() if lines else None


def _bandwidth(run: Run, device: torch.device) -> ResultRow:
    """Measure the bytes read and written per second by a copy from the device to itself."""
    nbytes = 2**22 if run.toy else 2**30
    source = torch.randint(256, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = device_seconds([lambda: target.copy_(source)], device)
    return {"what": "copy", "nbytes": 2 * nbytes, "device_s": seconds, "bytes_per_s": 2 * nbytes / seconds}


def _matmul(run: Run, device: torch.device, name: str) -> ResultRow:
    """Measure the operations per second of one large product."""
    size = 256 if run.toy else 8192 if name != "float32" else 4096
    dtype = torch.float32 if name == "tf32" else getattr(torch, name)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    try:
        seconds = device_seconds([lambda: torch.mm(a, b, out=out)], device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return {"what": f"product, {name}", "size": size, "device_s": seconds, "flops_per_s": 2 * size**3 / seconds}
