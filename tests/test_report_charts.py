"""The charts of the report: points lie where the ticks of their scales say."""

import math

import numpy as np
import pytest
from reports import parse

from experiments.report_page import charts, page
from experiments.report_page.workdirs import Run


def points(svg):
    (line,) = svg.all("polyline")
    return [tuple(map(float, place.split(","))) for place in line.attributes["points"].split()]


def ticks(svg, axis):
    """Return the position of each label of an axis; the title of x comes last."""
    return {
        label.text: float(label.attributes[axis])
        for label in svg.all("text")
        if (label.attributes.get("class") == "end") is (axis == "y")
    }


def draw(*values):
    """Draws the chart of one run, which logged a loss in epochs 0, 1, 2 and so on."""
    rows = [{"step": epoch, "epoch": float(epoch), "loss": y} for epoch, y in enumerate(values)]
    whole = parse(page.page([Run("a", {}, rows)], []))
    (figure,) = whole.section("curves").all("figure")
    (svg,) = figure.all("svg")
    return svg


def test_a_scale_is_linear_from_0_if_values_span_less_than_a_factor_of_10():
    svg = draw(8.0, 5.0, 0.0)
    ys, xs = ticks(svg, "y"), ticks(svg, "x")
    assert list(ys) == ["0", "2", "4", "6", "8"]
    assert list(xs) == ["0", "0.5", "1", "1.5", "2", "epoch"]
    places = [(xs["0"], ys["8"]), (xs["1"], (ys["4"] + ys["6"]) / 2), (xs["2"], ys["0"])]
    assert np.asarray(points(svg)) == pytest.approx(np.asarray(places), abs=0.11)
    assert ys["8"] < ys["0"]  # SVG counts downwards
    marks = [(float(m.attributes["cx"]), float(m.attributes["cy"])) for m in svg.all("circle")]
    assert marks == points(svg)
    grid = [line for line in svg.all("line") if line.attributes["class"] == "grid"]
    assert [float(line.attributes["y1"]) for line in grid] == list(ys.values())
    assert all(line.attributes["y1"] == line.attributes["y2"] for line in grid)


def test_a_scale_is_logarithmic_if_values_span_more_and_still_shows_zeros():
    svg = draw(10.0, 1.0, 0.1, 0.0)
    ys = ticks(svg, "y")
    assert list(ys) == ["0", "0.1", "0.2", "0.5", "1", "2", "5", "10"]
    heights = [y for _, y in points(svg)]
    assert heights == pytest.approx([ys[value] for value in ("10", "1", "0.1", "0")], abs=0.11)
    assert ys["1"] - ys["10"] == pytest.approx(ys["0.1"] - ys["1"], abs=0.11)
    assert ys["0"] > ys["0.1"]
    assert list(ticks(draw(2000.0, 1.0), "y")) == ["1", "10", "100", "1000"]


@pytest.mark.parametrize(
    "values",
    [(0.0,), (3.0,), (0.0, 0.0), (-2.0, 100.0), (1e-100, 1e100), (1e100, -1e100), (1e-320, 5.0),
     (0, 1e-320), (2.0, 2.0 + 1e-15)],
)  # fmt: skip
def test_a_chart_of_extreme_numbers_stays_inside_its_area(values):
    svg = draw(*values)
    for x, y in points(svg):
        assert 0 <= x <= charts.AREA.width
        assert 0 <= y <= charts.AREA.height
    assert 1 <= len(ticks(svg, "y")) <= 20


def test_a_long_curve_is_thinned_and_keeps_its_last_point():
    values = [1.0] * 10_000 + [2.0]
    svg = draw(*values)
    drawn = points(svg)
    assert 200 < len(drawn) <= charts.THINNED + 1
    assert drawn[-1][1] < drawn[-2][1]
    assert not list(svg.all("circle"))


@pytest.mark.parametrize("values", [[5e-324, 1e99], [5e-324, 5e-324], [0.0, 1e-320, 1.0]])
def test_numbers_of_any_size_are_drawn(values):
    rows = [{"step": step, "loss": value} for step, value in enumerate(values)]
    drawn = charts.curves([Run("a", {}, rows)], {"a": "c0 d0"})
    assert all(math.isfinite(float(t.position)) for chart in drawn.charts for t in chart.y_ticks)
