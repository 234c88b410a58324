"""The layout of a picture of the front: its axes, the styles of rows, and the placement of their names.

The colours of Okabe and Ito (2008) are distinct for people with any kind of colour vision; shapes repeat what the
colours say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, nan
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from autopeft.search_space.problem import FINALIST, Objective
from autopeft.studies.analysis.front import FrontRow
from autopeft.studies.reports.axes import LOG_UNITS, Axis, Label, place_labels

BLUE, SKY, VERMILION, YELLOW = "#0072B2", "#56B4E9", "#D55E00", "#F0E442"
GREY, INK, GRID = "#9AA0A6", "#1F2328", "#E6E8EB"
#: For curves, one after the other.
COLOURS = (BLUE, "#E69F00", "#009E73", "#CC79A7", SKY, VERMILION)
DIAMOND = {"symbol": "diamond", "marker": "D", "glyph": "◆", "labels": "always"}
STAR = {"symbol": "star", "marker": "*", "glyph": "★", "edge": INK, "labels": "always"}
ERROR_BARS = "bars: ± 1 standard error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Rows with one style. Their sign is `symbol` in Plotly, `marker` in matplotlib and `glyph` in text."""

    legend: str
    rows: tuple[FrontRow, ...]
    colour: str
    #: Colour of the error bars.
    bars: str
    #: Diameter in points.
    size: float
    edge: str = "white"
    symbol: str = "circle"
    marker: str = "o"
    glyph: str = "●"
    #: Whether its rows are named in the picture.
    labels: Literal["always", "with room", "never"] = "with room"

    @property
    def gap(self) -> float:
        """Distance from the middle of a point to its name, in points."""
        return self.size / 2 + 3


def _layers(rows: Sequence[FrontRow]) -> tuple[Layer, ...]:
    """Return the layers that are not empty, in the order of drawing; every row is in one of them."""
    parts: dict[str, list[FrontRow]] = {}
    for row in rows:
        if row.recommended:
            part = "recommended"
        elif row.is_baseline:
            part = "baseline"
        elif row.on_front:
            part = "front"
        else:
            part = "finalist" if row.role == FINALIST else "other"
        parts.setdefault(part, []).append(row)
    styles: dict[str, dict[str, Any]] = {
        "other": {
            "legend": "other evaluations",
            "colour": GREY,
            "bars": "#DCDFE3",
            "size": 5,
            "labels": "never",
        },
        "finalist": {"legend": "finalist off the front", "colour": SKY, "bars": "#B7DDF4", "size": 7},
        "front": {"legend": "Pareto front", "colour": BLUE, "bars": "#73B1D5", "size": 8},
        "baseline": {"legend": "baseline", "colour": VERMILION, "bars": "#E9A377", "size": 8, **DIAMOND},
        "recommended": {"legend": "recommended", "colour": YELLOW, "bars": INK, "size": 17, **STAR},
    }
    return tuple(Layer(rows=tuple(parts[part]), **style) for part, style in styles.items() if part in parts)


def _axes(rows: Sequence[FrontRow], objectives: Sequence[Objective]) -> tuple[Axis, tuple[Axis, ...]]:
    """Return the vertical axis (the first quality) and a horizontal one per other objective, or for num_params."""
    qualities = [objective for objective in objectives if objective.is_quality]
    upright = (qualities or list(objectives))[0]
    others = [objective for objective in objectives if objective is not upright] or [Objective.of("num_params")]
    return axis_of(rows, upright), tuple(axis_of(rows, objective) for objective in others)


def axis_of(rows: Sequence[FrontRow], objective: Objective) -> Axis:
    """Return the axis of an objective, or of a metric that is only reported."""
    seen = _in_view(rows, objective)
    return Axis.of(
        objective,
        [row.values[objective.name] for row in seen],
        [row.std_err.get(objective.name, nan) for row in seen],
    )


def _in_view(rows: Sequence[FrontRow], objective: Objective) -> list[FrontRow]:
    """Return the rows that set the range of an axis: on a linear axis, rows within Tukey's outer fences of the front.

    A candidate that learned nothing (the learning rate is searched, too) would compress the range of all others.
    Baselines and the recommended candidate are always in view.
    """

    def always(row: FrontRow) -> bool:
        return row.recommended or row.is_baseline

    finite = [row for row in rows if isfinite(row.values.get(objective.name, nan))]
    values = column(finite, objective.name)
    focus = [row.on_front or always(row) for row in finite]
    if objective.unit in LOG_UNITS or not any(focus):
        return finite
    lower, upper = np.quantile(values[focus], [0.25, 0.75])
    reach = 3 * (upper - lower)
    if reach == 0:
        return finite
    inside = (values >= lower - reach) & (values <= upper + reach)
    return [row for row, seen in zip(finite, inside, strict=True) if seen or always(row)]


def column(rows: Sequence[FrontRow], name: str) -> NDArray[np.float64]:
    """Return the values [rows] of a metric; NaN where unknown."""
    return np.array([row.values.get(name, nan) for row in rows])


def bars(rows: Sequence[FrontRow], axis: Axis) -> NDArray[np.float64]:
    """Return the standard errors [rows] in display values; 0 where unknown."""
    errors = [row.std_err.get(axis.name, 0.0) for row in rows]
    return axis.factor * np.nan_to_num(np.asarray(errors, dtype=np.float64))


def staircase(rows: Sequence[FrontRow], x: Axis, y: Axis) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the coordinates x [n] and y [n] of the front from left to right, in display values."""
    members = [row for row in rows if row.on_front]
    members.sort(key=lambda row: row.values[x.name])
    return x.place(column(members, x.name)), y.place(column(members, y.name))


def sides_of(layers: Sequence[Layer], x: Axis, y: Axis, panel_px: tuple[float, float]) -> dict[int, tuple[int, int]]:
    """Return the position of each row's name, one of POSITIONS, by `id` of the row; rows without room are missing."""
    rows = [row for layer in layers for row in layer.rows]
    points = np.column_stack([x.fraction(column(rows, x.name)), y.fraction(column(rows, y.name))])
    place = {id(row): point for row, point in zip(rows, points, strict=True)}
    named = [
        (
            row,
            Label(
                text=row.label,
                x=place[id(row)][0],
                y=place[id(row)][1],
                gap_px=layer.gap * 100 / 72,
                needed=layer.labels == "always",
            ),
        )
        for layer in reversed(layers)
        if layer.labels != "never"
        for row in layer.rows
        if np.isfinite(place[id(row)]).all()
    ]
    sides = place_labels([label for _, label in named], points, panel_px)
    return {id(row): side for (row, _), side in zip(named, sides, strict=True) if side is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """The content of a picture of the front, for every library that draws one."""

    title: str
    subtitle: str
    y: Axis
    #: One panel each.
    xs: tuple[Axis, ...]
    layers: tuple[Layer, ...]
    #: Whether to draw a line through the front: only with two objectives is it a staircase.
    connected: bool
    #: Whether the vertical axis is the quality by which members are compared with the best.
    compared: bool


def compose(
    rows: Sequence[FrontRow], objectives: Sequence[Objective], *, study: str, num_evaluations: int
) -> Composition:
    """Lay out the picture of the front. Raises ValueError without a row."""
    if not rows:
        raise ValueError("there is no evaluation to draw")
    y, xs = _axes(rows, objectives)
    hidden = np.zeros(len(rows), dtype=bool)
    for axis in (y, *xs):
        place = axis.fraction(column(rows, axis.name))
        hidden |= (place < 0) | (place > 1)
    subtitle = f"{num_evaluations} evaluations; {ERROR_BARS}"
    if hidden.any():
        subtitle += f"; {hidden.sum()} outliers out of view"
    return Composition(
        title=f"Pareto front of {study}",
        subtitle=subtitle,
        y=y,
        xs=xs,
        layers=_layers(rows),
        connected=len(xs) == 1,
        compared=any(row.standing is not None for row in rows),
    )
