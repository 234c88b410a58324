"""The learning-rate schedule with its warm-up."""

from __future__ import annotations

import math

from autopeft.search_space.training import Training


def rate(step: int, steps: int, training: Training) -> float:
    """Return the factor of the learning rate at a step: linear warm-up, then the schedule.

    The schedules linear and cosine fall to 0 at the end. `step` counts from 0 to `steps` - 1.
    """
    warmup = math.ceil(round(steps * training.warmup, 6))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    if training.schedule == "linear":
        return max(0.0, 1.0 - progress)
    if training.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return 1.0
