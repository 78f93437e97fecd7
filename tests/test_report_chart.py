"""The charts of the report: curves lie where their scales say."""

import pytest
from reports import parse

from experiments.report_page import chart
from experiments.report_page.chart import Curve


def points(svg, tag):
    (line,) = svg.all(tag)
    return [tuple(map(float, place.split(","))) for place in line.attributes["points"].split()]


def ticks(svg, *, end):
    return [t.text for t in svg.all("text") if (t.attributes.get("class") == "end") is end]


def draw(*values):
    curve = Curve("a", 0, [(float(x), y) for x, y in enumerate(values)])
    return parse(chart.chart([curve], across="epoch", measure="error"))


def test_a_chart_is_linear_from_0_over_a_small_ratio():
    svg = draw(9.0, 5.0, 1.0)
    assert ticks(svg, end=True) == ["0", "2", "4", "6", "8", "10"]
    assert ticks(svg, end=False) == ["0", "0.5", "1", "1.5", "2", "epoch"]
    (x0, y9), (x1, y5), (x2, y1) = points(svg, "polyline")
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y5 - y9 == pytest.approx(y1 - y5, abs=0.11)
    assert y9 < y1  # upwards is more
    assert len(list(svg.all("circle"))) == 3


def test_a_chart_is_logarithmic_over_a_large_ratio_and_keeps_zeros():
    svg = draw(10.0, 1.0, 0.1, 0.0)
    assert ticks(svg, end=True) == ["0", "0.1", "0.2", "0.5", "1", "2", "5", "10"]
    (_, y10), (_, y1), (_, y01), (_, y0) = points(svg, "polyline")
    assert y1 - y10 == pytest.approx(y01 - y1, abs=0.11)
    assert y0 > y01
    assert ticks(draw(2000.0, 1.0), end=True) == ["1", "10", "100", "1000"]


@pytest.mark.parametrize(
    "values",
    [(0.0,), (3.0,), (0.0, 0.0), (-2.0, 100.0), (1e-100, 1e100), (1e100, -1e100), (1e-320, 5.0),
     (0, 1e-320), (2.0, 2.0 + 1e-15)],
)  # fmt: skip
def test_a_chart_of_any_numbers_stays_inside(values):
    svg = draw(*values)
    for x, y in points(svg, "polyline"):
        assert 0 <= x <= chart.WIDTH
        assert 0 <= y <= chart.HEIGHT
    assert 1 <= len(ticks(svg, end=True)) <= 20


def test_of_a_long_curve_some_points_are_left_out_but_not_the_last():
    values = [1.0] * 10_000 + [2.0]
    drawn = points(draw(*values), "polyline")
    assert 200 < len(drawn) <= chart.DRAWN + 1
    assert drawn[-1][1] < drawn[-2][1]
    assert not list(draw(*values).all("circle"))
