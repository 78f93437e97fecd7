"""Figures of sweeps: drawn values, and texts inside the page."""

from unittest import mock

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from experiments.analysis.equivariance import SweepCurves
from experiments.figures import poses

STEPS = {"rotation (degrees)": [-30, 0, 30], "scale": [0.5, 1.0]}


def texts_on_page(figure):
    """Return all texts that are drawn, after asserting that each is inside the page."""
    canvas = FigureCanvasAgg(figure)
    width, height = canvas.get_width_height()
    drawn = []
    canvas.draw()
    with mock.patch.object(canvas.renderer, "draw_text", wraps=canvas.renderer.draw_text) as draw:
        figure.draw(canvas.renderer)
    for call in draw.call_args_list:
        text = call.kwargs.get("mtext") or call.args[-1]
        box = text.get_window_extent(canvas.renderer)
        assert min(box.x0, box.y0) >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text
        drawn.append(text.get_text())
    return drawn


def test_accuracy_sweeps_have_a_panel_per_transformation_and_a_line_per_run():
    curves = {
        name: {"rotation (degrees)": [10, base, 20], "scale": [30, base]}
        for name, base in (("runs/mnist_paper", 99), ("runs/pooling_cnn", 98))
    }
    figure = poses.accuracy_sweeps(curves, STEPS)
    assert [axes.get_xlabel() for axes in figure.axes] == list(STEPS)
    for axes, (label, values) in zip(figure.axes, STEPS.items(), strict=True):
        assert axes.get_ylim() == (0, 100)
        for line, own in zip(axes.lines, curves.values(), strict=True):
            np.testing.assert_array_equal(line.get_xdata(), values)
            np.testing.assert_array_equal(line.get_ydata(), own[label])
    assert {*curves, "Accuracy (%)", *STEPS} <= {*texts_on_page(figure)}


@pytest.mark.parametrize(("count", "length"), [(1, 5), (9, 40), (3, 300), (12, 12)])
def test_runs_have_distinct_line_styles_and_labels(count, length):
    names = [f"runs/{'W' * (length - 7)}{k:02}" for k in range(count)]
    curves = {name: {"scale": [1, 2]} for name in names}
    figure = poses.accuracy_sweeps(curves, {"scale": [0.5, 1.0]})
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == count
    drawn = [text.removeprefix("…") for text in texts_on_page(figure)]
    assert all(any(text and name.endswith(text) for text in drawn) for name in names)


def test_equivariance_curves_show_medians_and_quartiles():
    rng = np.random.default_rng(0)
    curves = {
        network: {
            label: SweepCurves(*(scale * rng.random((len(values), 25)) for scale in (1, 90, 60)))
            for label, values in STEPS.items()
        }
        for network in ("capsnet", "pooling_cnn")
    }
    figure = poses.equivariance_curves(curves, STEPS)
    grid = np.array(figure.axes).reshape(3, 2)
    for column, label in zip(grid.T, STEPS, strict=True):
        assert column[2].get_xlabel() == label
        for row, axes in enumerate(column):
            for line, band, own in zip(axes.lines, axes.collections, curves.values(), strict=False):
                np.testing.assert_allclose(line.get_ydata(), np.median(own[label][row], axis=1))
                edges = band.get_paths()[0].vertices[:, 1]
                for share in (25, 75):
                    expected = np.percentile(own[label][row], share, axis=1)
                    assert np.abs(expected[:, None] - edges).min(1).max() < 1e-9
    exact = grid[2, 1].lines[-1]
    np.testing.assert_array_equal(exact.get_xdata(), exact.get_ydata())
    assert (
        len({axes.get_ylim() for axes in grid[0]})
        == len({axes.get_ylim() for axes in grid[1]})
        == 1
    )
    assert {"capsnet", "pooling_cnn", "exact", *STEPS} <= {*texts_on_page(figure)}
