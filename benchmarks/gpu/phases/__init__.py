"""The phases by name, most valuable first. To add one: a module here with `measure`, and a line below.

The limits of all but the demo, which few bare machines can run, add up to the eight minutes.
"""

from __future__ import annotations

from autopeft.benchmarks.gpu.phase import Phase

_HERE = __name__

PHASES: dict[str, Phase] = {
    phase.name: phase
    for phase in (
        Phase(
            "environment", f"{_HERE}.environment", 40, "the card, the versions, the two ceilings: bytes and operations"
        ),
        Phase(
            "kernel-parity",
            f"{_HERE}.kernel_parity",
            100,
            "every kernel against its reference, with gradients",
            interpreted=True,
        ),
        Phase("pack-parity", f"{_HERE}.pack_parity", 60, "candidates in a pack against the same ones alone"),
        Phase("kernel-speed", f"{_HERE}.kernel_speed", 90, "every kernel against PyTorch's best way", interpreted=True),
        Phase("step-overhead", f"{_HERE}.step_overhead", 45, "rho: a packed step over the bare backbone's"),
        Phase("equal-work", f"{_HERE}.equal_work", 70, "a pack of eight against a loop over peft and Trainer"),
        Phase("graphs", f"{_HERE}.graphs", 55, "the packed step as a CUDA graph and compiled"),
        Phase("memory", f"{_HERE}.memory", 20, "predicted memory of a pack against measured memory"),
        Phase("demo", f"{_HERE}.demo", 240, "the demo as a whole study"),
    )
}
