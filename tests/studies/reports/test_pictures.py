"""The pictures of a study: files that hold what they should, for every number of objectives."""

from __future__ import annotations

import math
import re
import shutil
import struct
import subprocess
from math import nan

import numpy as np
import pytest

from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.problem import FINALIST, SEARCH, Measurement, Objective, Role, Trial
from autopeft.studies.analysis.front import FrontRow
from autopeft.studies.reports.axes import Axis, Label, place_labels, short
from autopeft.studies.reports.page import front_html
from autopeft.studies.reports.pictures import curves_png, front_png, hypervolume_png, smooth

OBJECTIVES = [Objective.of(name) for name in ("accuracy", "num_params", "latency_s", "stored_bytes")]
SETTINGS = {"study": "topics <1>", "num_evaluations": 42}


def row(trial, accuracy, num_params, **settings):
    values = {
        "accuracy": accuracy,
        "num_params": num_params,
        "latency_s": 0.004 + 1e-9 * num_params,
        "stored_bytes": 2 * num_params,
    }
    settings = {"label": f"#{trial}", "std_err": {"accuracy": 0.0123}, **settings}
    return FrontRow(trial=trial, values=values, **settings)


ROWS = [
    row(0, 0.6512, 1_300, on_front=True),
    row(1, 0.7034, 48_200, on_front=True, recommended=True, summary="lora r=8 & more\nat </script>"),
    row(2, 0.7111, 301_000, on_front=True, role=FINALIST),
    row(3, 0.6900, 305_000, role=FINALIST),
    row(4, 0.0700, 99_000),
    row(5, 0.6010, 0, label="head", role=Role("baseline", "head")),
    row(6, 0.7205, 22_700_000, label="full", role=Role("baseline", "full")),
]


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_front_html_is_one_page_with_everything_inside(tmp_path, count):
    path = tmp_path / "front.html"
    front_html(ROWS, OBJECTIVES[:count], path, **SETTINGS)
    page = path.read_text(encoding="utf-8")
    assert len(page) > 1_000_000, "plotly.js is inside"
    assert page.count("plotly.js v") == 1
    assert not re.search(r"<(script|link|img)[^>]*(src|href)\s*=", page)
    assert ('"type":"parcoords"' in page) == (count > 2)
    for text in ("topics &lt;1&gt;", "42 evaluations", "standard error", "70.3 % ± 1.2", "48.2k parameters"):
        assert text in page
    assert "at &lt;/script&gt;" in page, "a summary is text, not markup"
    for legend in ("Pareto front", "baseline", "recommended", "other evaluations"):
        assert f'"name":"{legend}"' in page


def test_front_html_takes_missing_values(tmp_path):
    rows = [*ROWS, FrontRow(trial=9, label="odd", values={"accuracy": nan}, role=Role("baseline", "odd"))]
    front_html(rows, OBJECTIVES, tmp_path / "front.html", **SETTINGS)
    front_png(rows, OBJECTIVES, tmp_path / "front.png", **SETTINGS)
    assert "<td>odd</td>" in (tmp_path / "front.html").read_text(encoding="utf-8")


@pytest.mark.browser
def test_front_html_draws_in_a_browser_without_a_network(tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no browser")
    front_html(ROWS, OBJECTIVES[:3], tmp_path / "front.html", **SETTINGS)
    settings = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000", "--dump-dom"]
    # A proxy that is not there: whatever the page asked the network for would fail.
    settings += ["--proxy-server=127.0.0.1:9", f"--user-data-dir={tmp_path / 'profile'}"]
    url = (tmp_path / "front.html").as_uri()
    done = subprocess.run([browser, *settings, url], capture_output=True, text=True, timeout=120, check=True)
    points = re.findall(r'<path class="point"', done.stdout)
    # Two panels with a point for every row; the legend has further ones.
    assert len(points) >= 2 * len(ROWS)


@pytest.mark.parametrize(("count", "size"), [(1, (1200, 810)), (2, (1200, 810)), (3, (1320, 810)), (4, (1980, 810))])
def test_front_png(tmp_path, count, size):
    front_png(ROWS, OBJECTIVES[:count], tmp_path / "front.png", **SETTINGS)
    assert png_size(tmp_path / "front.png") == size
    assert (tmp_path / "front.png").stat().st_size > 20_000


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(ValueError, match="no evaluation"):
        front_png([], OBJECTIVES[:2], tmp_path / "front.png", **SETTINGS)


def test_curves_and_hypervolume(tmp_path):
    trials = [
        Trial(
            number=number,
            role=Role("baseline", "full") if number == 3 else SEARCH,
            candidate=Candidate(architecture=Architecture()),
            measurement=Measurement(values={}, losses=losses),
        )
        for number, losses in enumerate([(3.0, 2.0, 1.0), (3.0, nan, nan), (), (2.0, 1.5, 1.2), (nan,)])
    ]
    curves_png(trials, [0, 2], tmp_path / "curves.png", study="topics")
    hypervolume_png([0.0, 1.5, 2.0], [-0.5, math.log(1e5)], OBJECTIVES[:2], tmp_path / "hv.png", study="topics")
    assert png_size(tmp_path / "curves.png") == (1200, 750)
    assert png_size(tmp_path / "hv.png") == (1200, 630)


def test_smooth_stops_at_the_first_break_and_has_no_bias_at_the_start():
    assert smooth([2.0] * 50 + [nan, 1.0]) == pytest.approx([2.0] * 50)
    noise = np.random.default_rng(0).normal(0, 1, 400)
    assert smooth(noise)[50:].std() < 0.5


def test_short_numbers():
    numbers = (0, 0.01234, 72.46, 999.6, 48_200, 1_500_000, 2.27e7, 3e9)
    expected = ["0", "0.0123", "72.5", "1k", "48.2k", "1.5M", "22.7M", "3G"]
    assert [short(number) for number in numbers] == expected


def test_axis_of_counts_is_logarithmic_and_has_a_place_for_zero():
    axis = Axis.of(OBJECTIVES[1], [0, 1_300, 22_700_000])
    assert axis.log
    assert axis.tick_labels[0] == "0"
    left, smallest, largest = axis.fraction([0, 1_300, 22_700_000])
    assert 0 < left < smallest < largest < 1
    assert not Axis.of(OBJECTIVES[1], [1_000, 1_500]).log


def test_axis_takes_the_unit_that_fits():
    assert Axis.of(OBJECTIVES[2], [0.004, 0.006]).title == "latency, ms (lower is better)"
    axis = Axis.of(OBJECTIVES[0], [0.6, 0.7])
    assert axis.title == "accuracy, % (higher is better)"
    assert axis.text(0.7034, 0.0123) == "70.3 % ± 1.2"
    assert axis.text(nan) == "–"
    for values in ([], [0.5], [nan, 0.5], [0.0]):
        axis = Axis.of(OBJECTIVES[0], values)
        assert axis.low < axis.high
        assert len(axis.ticks) > 1


def test_labels_keep_clear_of_points_and_of_each_other():
    points = [(0.5, 0.5), (0.55, 0.5)]
    first = Label(text="first", x=0.5, y=0.5, gap_px=8, needed=True)
    assert place_labels([first], points, (400, 300)) == [(-1, 0)]
    crowd = [(x, y) for x in np.linspace(0, 1, 60) for y in np.linspace(0, 1, 60)]
    optional = Label(text="second", x=0.5, y=0.5, gap_px=8, needed=False)
    assert place_labels([first, optional], crowd, (400, 300))[1] is None
