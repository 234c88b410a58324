"""Final values of trainings, extrapolated from a rung: what a course so far says about its end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopeft.search_space.problem import Measurement

Floats = NDArray[np.float64]
#: Least complete trainings from which final values are extrapolated.
LEAST_COURSES = 5


@dataclass(frozen=True, slots=True)
class Extrapolation:
    """final = `centre` + `slope` (loss - `centre_loss`) + deviation, with the `variance` of the deviations.

    The first-order autoregression of Kennedy and O'Hagan 2000: a rung's loss is a cheaper signal of the final loss.
    """

    centre: float
    centre_loss: float
    slope: float
    variance: float

    @classmethod
    def of(cls, losses: Floats, finals: Floats) -> Extrapolation | None:
        """Fit the line through losses at a rung [c] and final losses [c]; None for fewer than `LEAST_COURSES`.

        A lower loss at a rung never predicts a worse final value: a falling line is replaced by a flat one.
        """
        if len(losses) < LEAST_COURSES:
            return None
        centred = losses - losses.mean()
        slope = max(0.0, float(centred @ (finals - finals.mean()) / max(centred @ centred, 1e-12)))
        residual = finals - finals.mean() - slope * centred
        variance = float(residual @ residual / (len(losses) - 2)) + 1e-12
        return cls(float(finals.mean()), float(losses.mean()), slope, variance)

    def __call__(self, losses: Floats) -> Floats:
        """Return the expected final losses for losses at the rung, in the same shape."""
        return self.centre + self.slope * (losses - self.centre_loss)


def at_rung(measurement: Measurement | None, share: float) -> float | None:
    """Return the held-out loss after this share of the steps; None if it was not measured there."""
    rungs = dict(measurement.rungs) if measurement is not None else {}
    return rungs.get(share, {}).get("loss")
