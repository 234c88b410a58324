"""The picture of the quality of mixtures against their matched baselines."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from autopeft.search_space.metrics import Metric
from autopeft.studies.analysis.mixture_verdicts import BETTER, VERDICTS, WORSE, Verdict
from autopeft.studies.reports.front_layout import BLUE, GREY, GRID, INK, VERMILION
from autopeft.studies.reports.page import FONT

ROW_PX, MARGIN_PX = 34, 110
COLOURS = {BETTER: BLUE, WORSE: VERMILION}


def routing_figure(verdicts: Sequence[Verdict], quality: Metric) -> go.Figure:
    """Draw a row for every pair of mixture and matched baseline.

    It shows the difference of the quality, in the metric's own direction, with its 95 % interval.
    """
    rows = [(f"{verdict.label} against {one.control}", one) for verdict in verdicts for one in verdict.against]
    figure = go.Figure()
    for word in VERDICTS:
        here = [(label, one) for label, one in rows if one.verdict == word]
        if not here:
            continue
        found = [one.signed(quality) for _, one in here]
        colour = COLOURS.get(word, GREY)
        figure.add_scatter(
            x=[own.value for own in found],
            y=[label for label, _ in here],
            mode="markers",
            name=word,
            marker={"color": colour, "size": 10},
            error_x={
                "type": "data",
                "array": [own.high - own.value for own in found],
                "arrayminus": [own.value - own.low for own in found],
                "color": colour,
            },
            customdata=[f"{one.num_params:,}" for _, one in here],
            hovertemplate="%{y}: %{x:+.4f}<br>matched baseline: %{customdata} trainable parameters<extra></extra>",
        )
    figure.add_vline(x=0, line={"color": INK, "width": 1})
    better = "higher" if quality.maximise else "lower"
    title = f"difference of {quality.name} ({better} is better), 95 % interval"
    figure.update_layout(
        height=MARGIN_PX + ROW_PX * len(rows),
        margin={"l": 10, "r": 20, "t": 20, "b": 60},
        font={"family": FONT, "color": INK},
        plot_bgcolor="white",
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom"},
        xaxis={"title": title, "gridcolor": GRID, "zeroline": False},
        yaxis={"categoryorder": "array", "categoryarray": [label for label, _ in reversed(rows)], "automargin": True},
    )
    return figure
