"""Pictures of a study as PNG: the front, training curves, hypervolume. `page.py` has the interactive front.

Matplotlib is used without pyplot, which would look for a display and keep every figure in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from os import PathLike

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from autopeft.evaluators.atomic import atomic_write
from autopeft.search_space.dominance import from_coordinate
from autopeft.search_space.problem import Objective, Trial
from autopeft.studies.analysis.front import FrontRow
from autopeft.studies.reports.axes import Axis, short
from autopeft.studies.reports.front_layout import (
    BLUE,
    COLOURS,
    GREY,
    GRID,
    INK,
    Layer,
    bars,
    column,
    compose,
    sides_of,
    staircase,
)

DASHES = ("-", "--", ":", "-.")
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "text.parse_math": False,  # a name of a domain may have any signs
}
DPI = 150


class Picture(Figure):
    """A figure that notebooks show with any matplotlib backend."""

    def _repr_png_(self) -> bytes:
        data = BytesIO()
        with matplotlib.rc_context(STYLE):
            self.savefig(data, format="png")
        return data.getvalue()


def _figure(size: tuple[float, float], title: str, subtitle: str) -> Picture:
    """Make an empty figure with its title at the upper left. `size`: width and height in inches."""
    inch = 1 / size[1]
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - 0.62 * inch), w_pad=0.1, h_pad=0.08)
    figure = Picture(figsize=size, dpi=DPI, layout=layout)
    figure.text(0.1 / size[0], 1 - 0.12 * inch, title, size=13, weight="bold", va="top")
    figure.text(0.1 / size[0], 1 - 0.39 * inch, subtitle, size=9, color="#57606A", va="top")
    return figure


def _apply(axis: Axis, panel: Axes, which: str) -> None:
    getattr(panel, f"set_{which}scale")("log" if axis.log else "linear")
    getattr(panel, f"set_{which}lim")(axis.low, axis.high)
    getattr(panel, f"set_{which}ticks")(axis.ticks, axis.tick_labels)
    getattr(panel, f"set_{which}ticks")([], minor=True)


def front_png(
    rows: Sequence[FrontRow],
    objectives: Sequence[Objective],
    path: str | PathLike[str],
    *,
    study: str,
    num_evaluations: int,
) -> None:
    """Write the picture of `front_figure`."""
    figure = front_figure(rows, objectives, study=study, num_evaluations=num_evaluations)
    with matplotlib.rc_context(STYLE):
        _save(figure, path)


def _save(figure: Figure, path: str | PathLike[str]) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def front_figure(
    rows: Sequence[FrontRow], objectives: Sequence[Objective], *, study: str, num_evaluations: int
) -> Picture:
    """Draw quality against each cost, side by side; with two objectives a line connects the front."""
    picture = compose(rows, objectives, study=study, num_evaluations=num_evaluations)
    y, xs, layers = picture.y, picture.xs, picture.layers
    width, height = max(8.0, 4.4 * len(xs)), 5.4
    with matplotlib.rc_context(STYLE):
        figure = _figure((width, height), picture.title, picture.subtitle)
        panels = figure.subplots(1, len(xs), sharey=True, squeeze=False)[0]
        for panel, x in zip(panels, xs, strict=True):
            _apply(x, panel, "x")
            _apply(y, panel, "y")
            panel.set_xlabel(x.title)
            if picture.connected:
                where = "pre" if x.maximise else "post"
                panel.step(*staircase(rows, x, y), where=where, color=BLUE, linewidth=1.4, alpha=0.6)
            sides = sides_of(layers, x, y, (100 * width / len(xs) - 70, 100 * height - 150))
            for depth, layer in enumerate(layers):
                _draw_layer(panel, layer, x, y, sides, zorder=3 + depth)
        panels[0].set_ylabel(y.title)
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower left", ncols=len(layers), handletextpad=0.3)
    return figure


def _draw_layer(panel: Axes, layer: Layer, x: Axis, y: Axis, sides: Mapping[int, tuple[int, int]], zorder: int) -> None:
    across, up = x.place(column(layer.rows, x.name)), y.place(column(layer.rows, y.name))
    panel.errorbar(
        across,
        up,
        xerr=bars(layer.rows, x),
        yerr=bars(layer.rows, y),
        fmt="none",
        ecolor=layer.bars,
        elinewidth=1,
        zorder=zorder,
    )
    panel.scatter(
        across,
        up,
        s=layer.size**2,
        color=layer.colour,
        marker=layer.marker,
        edgecolors=layer.edge,
        linewidths=0.8,
        label=layer.legend,
        zorder=zorder,
    )
    for row, left, bottom in zip(layer.rows, across, up, strict=True):
        if id(row) in sides:
            right, above = sides[id(row)]
            panel.annotate(
                row.label,
                (left, bottom),
                (right * layer.gap, above * layer.gap),
                textcoords="offset points",
                ha=("center", "left", "right")[right],
                va="center" if right else ("center", "bottom", "top")[above],
                size=8,
                weight="bold" if row.recommended else "normal",
                path_effects=[withStroke(linewidth=2.5, foreground="white", alpha=0.8)],
                zorder=zorder + 10,
            )


def smooth(losses: ArrayLike, share: float = 0.05) -> NDArray[np.float64]:
    """Return the exponential average of losses over about `share` of the steps.

    [steps] -> [steps before the first that is not finite]. The start is bias-corrected (Kingma and Ba 2015, sec. 3).
    """
    values = np.asarray(losses, dtype=float)
    diverged = np.flatnonzero(~np.isfinite(values))
    values = values[: diverged[0]] if len(diverged) else values
    decay = 1 - 1 / max(1.0, share * len(values))
    average, weight = 0.0, 0.0
    out = np.empty(len(values))
    for i, value in enumerate(values):
        average, weight = decay * average + (1 - decay) * value, decay * weight + (1 - decay)
        out[i] = average / weight
    return out


def curves_png(trials: Sequence[Trial], front: Sequence[int], path: str | PathLike[str], *, study: str) -> None:
    """Write the smoothed training losses. `front`: numbers of the trials to colour, in the order of the legend."""
    curves = {
        trial.number: (trial, smooth(trial.measurement.losses))
        for trial in trials
        if trial.measurement is not None and len(trial.measurement.losses) > 0
    }
    coloured = [number for number in front if number in curves]
    baselines = [
        number for number, (trial, _) in curves.items() if number not in front and trial.role.kind == "baseline"
    ]
    named = len(coloured) + len(baselines)
    with matplotlib.rc_context(STYLE):
        figure = _figure(
            (8.0, max(5.0, 0.2 * named + 1)),
            f"Training loss in {study}",
            f"{len(curves)} trainings; exponential moving average over 5 % of the steps",
        )
        panel = figure.subplots()
        for number, (_, curve) in curves.items():
            if number not in coloured and number not in baselines:
                panel.plot(_steps(curve), curve, color=GREY, linewidth=0.7, alpha=0.4, zorder=2)
        for position, number in enumerate(coloured):
            panel.plot(
                _steps(curves[number][1]),
                curves[number][1],
                color=COLOURS[position % len(COLOURS)],
                linestyle=DASHES[position // len(COLOURS) % len(DASHES)],
                linewidth=1.7,
                label=f"front, trial {number}",
                zorder=4,
            )
        for position, number in enumerate(baselines):
            panel.plot(
                _steps(curves[number][1]),
                curves[number][1],
                color=INK,
                linestyle=DASHES[1 + position % (len(DASHES) - 1)],
                linewidth=1.3,
                label=str(curves[number][0].role).replace(":", " "),
                zorder=3,
            )
        panel.set_xlabel("step")
        panel.set_ylabel("training loss, nats (lower is better)")
        panel.margins(x=0.01)
        if named:
            figure.legend(loc="outside right upper")
        _save(figure, path)


def _steps(curve: NDArray[np.float64]) -> NDArray[np.int_]:
    return np.arange(1, len(curve) + 1)


def hypervolume_png(
    values: Sequence[float],
    reference: Sequence[float],
    objectives: Sequence[Objective],
    path: str | PathLike[str],
    *,
    study: str,
) -> None:
    """Write the dominated hypervolume after each trial. `reference`: its point [objectives], in coordinates."""
    corner = ", ".join(
        f"{objective.name} {short(objective.value(from_coordinate(end, objective)))}"
        for objective, end in zip(objectives, reference, strict=True)
    )
    number = np.arange(1, len(values) + 1)
    with matplotlib.rc_context(STYLE):
        subtitle = f"higher is better; costs count by their logarithm; reference point: {corner}"
        figure = _figure((8.0, 4.2), f"Hypervolume of {study}", subtitle)
        panel = figure.subplots()
        panel.fill_between(number, values, step="post", color=BLUE, alpha=0.12, linewidth=0)
        panel.step(number, values, where="post", color=BLUE, linewidth=1.8)
        panel.plot(number[-1:], values[-1:], "o", color=BLUE, markersize=5)
        end = (number[-1], values[-1])
        panel.annotate(short(values[-1]), end, (0, 6), textcoords="offset points", ha="right", weight="bold")
        panel.set_xlabel("trials of the search")
        panel.set_ylabel("dominated hypervolume")
        panel.set_ylim(bottom=0)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.yaxis.set_major_formatter(lambda value, _: short(value))
        panel.margins(x=0.01, y=0.12)
        _save(figure, path)
