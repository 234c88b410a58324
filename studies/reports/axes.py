"""How numbers are shown in every picture: units, scales, ticks and the placement of labels.

Display values are values times `Axis.factor` (a share becomes per cent). Fractions run from 0 to 1 along an axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10, nan

import numpy as np
from numpy.typing import ArrayLike, NDArray

from autopeft.search_space.metrics import SEPARATOR
from autopeft.search_space.problem import Objective
from autopeft.studies.analysis.statistics import Estimate

#: By unit: rows of (smallest value, factor, name of the display unit); the last row takes all smaller values.
UNITS = {
    "share": ((0.0, 1e2, "%"),),
    "seconds": ((1.0, 1.0, "s"), (1e-3, 1e3, "ms"), (0.0, 1e6, "µs")),
    "bytes": ((1e9, 1e-9, "GB"), (1e6, 1e-6, "MB"), (1e3, 1e-3, "kB"), (0.0, 1.0, "bytes")),
}
#: Quantities in these units get a log axis where they span more than the factor `LOG_FROM`.
LOG_UNITS = ("parameters", "bytes", "operations")
LOG_FROM = 5.0
TITLES = {
    "num_params": "trainable parameters",
    "flops_per_token": "added operations per token",
    "stored_bytes": "stored size",
    "step_s": "time per step",
}


def short(number: float) -> str:
    """Format a number with three significant digits: 0.0123, 72.5, 48.2k, 1.5M."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """The axis of one objective. `low`, `high`: the visible range, in display values."""

    name: str
    title: str
    unit: str
    maximise: bool
    factor: float
    low: float
    high: float
    log: bool
    #: Display value at which a log axis draws 0 (a candidate without adapters has no parameters); else NaN.
    zero: float
    ticks: tuple[float, ...]
    tick_labels: tuple[str, ...]

    @classmethod
    def of(cls, objective: Objective, values: Iterable[float], std_err: Iterable[float] = ()) -> Axis:
        """Make the axis that shows all `values`, with their standard errors where given."""
        finite = [value for value in values if isfinite(value)] or [0.0, 1.0]
        typical = float(np.median(np.abs(finite)))
        choices = UNITS.get(objective.unit, ((0.0, 1.0, objective.unit),))
        _, factor, unit = next((row for row in choices if typical >= row[0]), choices[-1])
        title = objective.name
        if SEPARATOR not in title:  # the name of a domain stays as it is
            title = TITLES.get(title, title.removesuffix("_s").removesuffix("_bytes")).replace("_", " ")
        if unit and unit not in ("parameters", "operations"):
            title += f", {unit}"
        title += " (higher is better)" if objective.maximise else " (lower is better)"
        positive = [factor * value for value in finite if value > 0]
        log = (
            objective.unit in LOG_UNITS
            and len(positive) > 1
            and min(finite) >= 0
            and max(positive) > LOG_FROM * min(positive)
        )
        zero = nan
        if log:
            low, high = min(positive), max(positive)
            ticks = _log_ticks(low, high)
            margin = (high / low) ** 0.07
            if min(finite) == 0:
                zero = low / margin**2
                low = zero
                ticks = (zero, *(tick for tick in ticks if tick > zero * margin))
            low, high = low / margin, high * margin
        else:
            bars = [e for e in std_err if isfinite(e)] or [0.0]
            low, high = factor * min(finite), factor * max(finite)
            margin = 0.07 * (high - low) + factor * float(np.median(bars)) or 0.1 * abs(high) or 1.0
            low, high = low - margin, high + margin
            ticks = _linear_ticks(low, high)
        return cls(
            name=objective.name,
            title=title,
            unit=unit,
            maximise=objective.maximise,
            factor=factor,
            low=low,
            high=high,
            log=log,
            zero=zero,
            ticks=ticks,
            tick_labels=tuple("0" if tick == zero else short(round(tick, 10)) for tick in ticks),
        )

    def place(self, values: ArrayLike) -> NDArray[np.float64]:
        """Return the display values at which `values` are drawn."""
        shown: NDArray[np.float64] = self.factor * np.asarray(values, dtype=float)
        return np.where(shown == 0, self.zero, shown) if self.log else shown

    def fraction(self, values: ArrayLike) -> NDArray[np.float64]:
        """Return where along the axis `values` are drawn, from 0 to 1."""
        shown, ends = self.place(values), np.array([self.low, self.high])
        if self.log:
            shown, ends = np.log10(shown), np.log10(ends)
        fractions: NDArray[np.float64] = (shown - ends[0]) / (ends[1] - ends[0])
        return fractions

    def text(self, value: float, std_err: float = nan) -> str:
        """Format a value with its unit and standard error: "72.5 % ± 1.3"."""
        if not isfinite(value):
            return "–"
        digits = f"{self.factor * value:.1f}" if self.unit == "%" else short(self.factor * value)
        error = f" ± {self.factor * std_err:.2g}" if isfinite(std_err) else ""
        return f"{digits} {self.unit}{error}".rstrip()

    def difference(self, found: Estimate) -> str:
        """Format a difference with its interval: "-0.3 (-0.9 to +0.3) points"."""
        numbers = [self.factor * number for number in (found.value, found.low, found.high)]
        value, low, high = (f"{number:+.1f}" if self.unit == "%" else f"{number:+.3g}" for number in numbers)
        unit = "points" if self.unit == "%" else self.unit
        return f"{value} ({low} to {high}) {unit}".rstrip()


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = tuple(s * 10.0**d for d in decades for s in steps if low / 1.5 <= s * 10.0**d <= high * 1.5)
        if len(ticks) <= 7:
            break
    return ticks


def _linear_ticks(low: float, high: float) -> tuple[float, ...]:
    """Return about six multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 6
    power = 10.0 ** floor(log10(rough))
    step = power * next(s for s in (1, 2, 5, 10) if s * power >= rough)
    return tuple(step * i for i in range(ceil(low / step), floor(high / step) + 1))


# Positions of a label relative to its point, (horizontal, vertical), in order of preference.
POSITIONS = ((1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1))
CHARACTER_PX = (6.4, 15.0)
#: A label hides points that are closer to it than this.
MARKER_PX = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """A text `gap_px` away from the point (x, y), in fractions of the panel; it can be left out unless `needed`."""

    text: str
    x: float
    y: float
    gap_px: float
    needed: bool


def place_labels(
    labels: Sequence[Label], points: ArrayLike, panel_px: tuple[float, float]
) -> list[tuple[int, int] | None]:
    """Return for each label the one of POSITIONS with the most room, or None to leave the label out.

    The placement is greedy, in the given order. `points`: [n, 2] fractions of the points to keep visible.
    """
    size = np.array(panel_px)
    obstacles = np.asarray(points, dtype=float).reshape(-1, 2) * size
    taken: list[tuple[float, float, float, float]] = []
    sides: list[tuple[int, int] | None] = []
    for label in labels:
        width, height = CHARACTER_PX[0] * len(label.text), CHARACTER_PX[1]
        best: tuple[float, tuple[int, int], tuple[float, float, float, float]] | None = None
        for across, up in POSITIONS:
            x = label.x * size[0] + across * (label.gap_px + width / 2)
            y = label.y * size[1] + up * (label.gap_px + (0 if across else height / 2))
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            near = np.abs(obstacles - (x, y)) < (width / 2 + MARKER_PX, height / 2 + MARKER_PX)
            overlaps = sum(a[0] < box[2] and box[0] < a[2] and a[1] < box[3] and box[1] < a[3] for a in taken)
            outside = box[0] < 0 or box[1] < 0 or box[2] > size[0] or box[3] > size[1]
            cost = 3.0 * overlaps + 5.0 * outside + float(near.all(axis=1).sum())
            if best is None or cost < best[0]:
                best = (cost, (across, up), box)
        assert best is not None
        if label.needed or best[0] == 0:
            taken.append(best[2])
            sides.append(best[1])
        else:
            sides.append(None)
    return sides
