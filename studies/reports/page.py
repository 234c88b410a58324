"""The front as one interactive page, which includes its JavaScript and needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import nan
from os import PathLike
from string import Template

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from autopeft.evaluators.atomic import atomic_write_text
from autopeft.search_space.problem import Objective
from autopeft.studies.analysis.front import FrontRow
from autopeft.studies.reports.axes import Axis
from autopeft.studies.reports.front_layout import (
    BLUE,
    GREY,
    GRID,
    INK,
    Composition,
    Layer,
    axis_of,
    bars,
    column,
    compose,
    sides_of,
    staircase,
)

FONT = "system-ui, 'DejaVu Sans', sans-serif"
HEIGHT_PX = 560
PANEL_PX = (960, 430)
CONFIG = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["select2d", "lasso2d"]}
PAGE = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 15px/1.5 $font; color: $ink; background: #fff; max-width: 1200px; margin: 2rem auto; padding: 0
1rem } h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 0.5rem } p { margin: 0.25rem
0; color: #57606a } table { border-collapse: collapse; font-size: 0.9rem; width: 100% } th, td { text-align:
left; padding: 0.35rem 0.8rem 0.35rem 0; border-bottom: 1px solid $grid; vertical-align: top } td.number {
white-space: nowrap; font-variant-numeric: tabular-nums } tr.recommended { font-weight: 600 } </style> </head>
<body> <h1>$title</h1> <p>$subtitle. Drag to zoom, double-click to reset the view, click a legend
entry to hide it.</p>
$charts <h2>Front and baselines</h2> $notes <table> <thead><tr>$columns</tr></thead> <tbody> $rows </tbody>
</table> </body> </html>
"""
)


def front_html(
    rows: Sequence[FrontRow],
    objectives: Sequence[Objective],
    path: str | PathLike[str],
    *,
    study: str,
    num_evaluations: int,
    reported: Sequence[Objective] = (),
    notes: Sequence[str] = (),
    sections: Sequence[tuple[str, Sequence[str], go.Figure]] = (),
) -> None:
    """Write the page: quality against each cost, parallel coordinates from three objectives on, a table of the front.

    `reported`: metrics that are columns of the table alone. `notes`: paragraphs above it. `sections`: a heading,
    paragraphs and a figure each; they follow the charts.
    """
    picture = compose(rows, objectives, study=study, num_evaluations=num_evaluations)
    more = [axis_of(rows, measure) for measure in reported]
    charts = [_scatter(picture, rows).to_html(full_html=False, include_plotlyjs=True, config=CONFIG)]
    if len(picture.xs) > 1:
        charts.append("<h2>All objectives at once</h2>")
        charts.append("<p>A line is a candidate; better values are at the top. Drag along an axis to filter.</p>")
        settings = CONFIG | {"displayModeBar": False}
        charts.append(_parallel(picture).to_html(full_html=False, include_plotlyjs=False, config=settings))
    for heading, paragraphs, figure in sections:
        charts.append(f"<h2>{escape(heading)}</h2>")
        charts += [f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs]
        charts.append(figure.to_html(full_html=False, include_plotlyjs=False, config=CONFIG))
    page = PAGE.substitute(
        title=escape(picture.title),
        subtitle=escape(picture.subtitle),
        font=FONT,
        ink=INK,
        grid=GRID,
        charts="\n".join(charts),
        notes="\n".join(f"<p>{escape(note)}</p>" for note in notes),
        columns=_columns(picture, more),
        rows="\n".join(_table_rows(picture, more)),
    )
    atomic_write_text(path, page)


def _scatter(picture: Composition, rows: Sequence[FrontRow]) -> go.Figure:
    y, xs = picture.y, picture.xs
    figure = make_subplots(rows=1, cols=len(xs), shared_yaxes=True, horizontal_spacing=0.02)
    for position, x in enumerate(xs, start=1):
        if picture.connected:
            across, up = staircase(rows, x, y)
            figure.add_scatter(
                x=across,
                y=up,
                mode="lines",
                line={"shape": "vh" if x.maximise else "hv", "color": BLUE, "width": 1.5},
                opacity=0.6,
                hoverinfo="skip",
                showlegend=False,
            )
        sides = sides_of(picture.layers, x, y, (PANEL_PX[0] / len(xs), PANEL_PX[1]))
        for layer in picture.layers:
            trace = _trace(layer, picture, x, sides)
            figure.add_trace(trace.update(showlegend=position == 1), row=1, col=position)
        figure.update_xaxes(_layout(x), col=position)
    figure.update_yaxes(_layout(y) | {"title": None})
    figure.update_yaxes(title=_layout(y)["title"], col=1)
    figure.update_layout(
        template="none",
        height=HEIGHT_PX,
        font={"family": FONT, "size": 13, "color": INK},
        margin={"l": 70, "r": 10, "t": 10, "b": 50},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hoverlabel={"align": "left", "bgcolor": "white", "font": {"family": FONT, "size": 13}},
    )
    return figure


def _trace(layer: Layer, picture: Composition, x: Axis, sides: Mapping[int, tuple[int, int]]) -> go.Scatter:
    y = picture.y
    marker = {
        "symbol": layer.symbol,
        # Points to CSS pixels.
        "size": 4 / 3 * layer.size,
        "color": layer.colour,
        "opacity": 1,
        "line": {"color": layer.edge, "width": 1},
    }
    style = {"color": layer.bars, "thickness": 1, "width": 0}
    return go.Scatter(
        x=x.place(column(layer.rows, x.name)),
        y=y.place(column(layer.rows, y.name)),
        error_x={"array": bars(layer.rows, x), **style},
        error_y={"array": bars(layer.rows, y), **style},
        mode="markers+text",
        marker=marker,
        text=[escape(row.label) if id(row) in sides else "" for row in layer.rows],
        textposition=[_text_position(*sides.get(id(row), (1, 0))) for row in layer.rows],
        textfont={"size": 12, "color": INK},
        hovertext=[_hover(row, picture) for row in layer.rows],
        hoverinfo="text",
        name=layer.legend,
        legendgroup=layer.legend,
    )


def _text_position(across: int, up: int) -> str:
    return f"{('middle', 'top', 'bottom')[up]} {('center', 'right', 'left')[across]}"


def _hover(row: FrontRow, picture: Composition) -> str:
    lines = [f"<b>{escape(row.label)}</b>  trial {row.trial}, {escape(str(row.role))}"]
    lines += [f"{escape(axis.name)}: {_number(row, axis)}" for axis in (picture.y, *picture.xs)]
    return "<br>".join([*lines, *escape(row.summary).splitlines()])


def _number(row: FrontRow, axis: Axis) -> str:
    return axis.text(row.values.get(axis.name, nan), row.std_err.get(axis.name, nan))


def _layout(axis: Axis) -> dict[str, object]:
    span = [axis.low, axis.high]
    return {
        "title": {"text": escape(axis.title), "standoff": 8},
        "type": "log" if axis.log else "linear",
        "range": list(np.log10(span)) if axis.log else span,
        # Own ticks on log axes alone, which may show a 0: the ticks of the library follow the zoom.
        **({"tickvals": axis.ticks, "ticktext": axis.tick_labels} if axis.log else {}),
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": GREY,
        "showline": True,
    }


def _parallel(picture: Composition) -> go.Figure:
    """Draw one line per row, highlighted layers above grey ones."""
    layers = picture.layers
    axes = (picture.y, *picture.xs)
    drawn = [
        (depth, row)
        for depth, layer in enumerate(layers)
        for row in layer.rows
        if all(0 <= axis.fraction(row.values.get(axis.name, nan)) <= 1 for axis in axes)
    ]
    rows = [row for _, row in drawn]
    dimensions = []
    for axis in axes:
        values = axis.place(column(rows, axis.name))
        ticks = np.array(axis.ticks)
        span = np.array([axis.low, axis.high])
        if axis.log:
            values, ticks, span = np.log10(values), np.log10(ticks), np.log10(span)
        dimensions.append(
            {
                "label": escape(axis.title.rpartition(" (")[0]),
                "values": values,
                "range": span if axis.maximise else span[::-1],
                "tickvals": ticks,
                "ticktext": axis.tick_labels,
            }
        )
    steps = len(layers)
    scale = [[edge / steps, _ink(layers[i])] for i in range(steps) for edge in (i, i + 1)]
    figure = go.Figure(
        go.Parcoords(
            dimensions=dimensions,
            line={
                "color": [depth for depth, _ in drawn],
                "colorscale": scale,
                "cmin": -0.5,
                "cmax": steps - 0.5,
            },
            labelfont={"size": 13},
        )
    )
    figure.update_layout(
        template="none",
        height=380,
        font={"family": FONT, "size": 12, "color": INK},
        margin={"l": 70, "r": 50, "t": 50, "b": 20},
    )
    return figure


def _ink(layer: Layer) -> str:
    """Return the layer's colour for thin lines and small signs, for which yellow on white is too faint."""
    return layer.edge if layer.symbol == "star" else layer.colour


def _columns(picture: Composition, more: Sequence[Axis]) -> str:
    y = picture.y.name
    compared = [f"{y} minus best (95 %)", "standing", f"test {y}"] if picture.compared else []
    names = ["", "candidate", *(axis.name for axis in (picture.y, *picture.xs, *more)), *compared, "architecture"]
    return "".join(f"<th>{escape(name)}</th>" for name in names)


def _compared(row: FrontRow, y: Axis) -> tuple[str, str, str]:
    """Return the texts of the difference to the best, the standing and the test score."""
    difference = "–" if row.difference is None else y.difference(row.difference)
    test = "–" if row.test is None else y.text(row.test.value, row.test.std_err)
    return difference, row.standing or "–", test


def _table_rows(picture: Composition, more: Sequence[Axis]) -> list[str]:
    """Return the rows of the table as HTML, the best quality first."""
    y = picture.y
    shown = [(layer, row) for layer in picture.layers for row in layer.rows if row.on_front or layer.labels == "always"]
    shown.sort(key=lambda pair: pair[1].values.get(y.name, nan), reverse=y.maximise)
    lines = []
    for layer, row in shown:
        summary = "<br>".join(escape(row.summary).splitlines())
        cells = [
            f'<td style="color:{_ink(layer)}">{layer.glyph}</td><td>{escape(row.label)}</td>',
            *(f'<td class="number">{_number(row, axis)}</td>' for axis in (y, *picture.xs, *more)),
            *(f'<td class="number">{escape(text)}</td>' for text in _compared(row, y) if picture.compared),
            f"<td>{summary}</td>",
        ]
        lines.append(f'<tr class="{"recommended" if row.recommended else ""}">{"".join(cells)}</tr>')
    return lines
