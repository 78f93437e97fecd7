"""Figures of what the dimensions of a capsule mean.

Shape letters: K classes; D dimensions of a capsule; V tweaks; M measures of a shape; H, W, C
height, width and channels of an image.
"""

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from experiments.figure_style import STYLE, settle_ticks

_MILLISECONDS = 120  # a frame of an animation
_GREYS = 32  # of an animation: a quarter of the bytes that all 256 take


@STYLE
def effect_sizes(sizes: np.ndarray, *, measures: Sequence[str], title: str) -> Figure:
    """Draws and writes down how much each dimension changes each measure, `[D, M]`."""
    D, M = sizes.shape
    figure = Figure((0.9 * M + 1.6, 0.2 * D + 1.2))
    axes = figure.subplots()
    heat = axes.imshow(sizes, cmap="Blues", vmin=0, aspect="auto")
    for (d, m), size in np.ndenumerate(sizes):
        text = axes.text(m, d, f"{size:.2f}", ha="center", va="center_baseline")
        text.set_color("white" if size > 0.6 * sizes.max() else "black")
    axes.set_xticks(range(M), [name.replace("_", " ") for name in measures])
    axes.set_yticks(range(D), [str(d) for d in range(1, D + 1)])
    axes.set(ylabel="dimension of the capsule")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.suptitle(title)
    figure.colorbar(heat, label="standard deviations")
    settle_ticks(figure)
    return figure


@STYLE
def effects_by_class(changes: np.ndarray, *, measures: Sequence[str], title: str) -> Figure:
    """Draws the mean change `[K, D, M]` of each measure, a panel each; NaN stays white."""
    K, D, M = changes.shape
    limit = np.nanmax(abs(changes)) or 1
    columns = min(2, M)
    lines = math.ceil(M / columns)
    figure = Figure((7.2, lines * (0.16 * K + 0.7) + 0.4))
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[M:]:
        axes.remove()
    for m, axes in enumerate(grid.flat[:M]):
        heat = axes.imshow(changes[..., m], cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axes.set_title(measures[m].replace("_", " "))
        axes.set_xticks(range(D), [str(d) for d in range(1, D + 1)])
        axes.set_yticks(range(K), [str(k) for k in range(K)])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("dimension of the capsule")
    for axes in grid[:, 0]:
        axes.set_ylabel("class")
    figure.suptitle(title)
    figure.colorbar(heat, ax=grid, label="standard deviations", aspect=40)
    settle_ticks(figure)
    return figure


@STYLE
def sweep(grid: np.ndarray, *, values: Sequence[float]) -> bytes:
    """Draws an animated GIF: all drawings of a capsule, each with its dimension moved to and fro.

    Args:
      grid: Decoded images `[D, V, H, W, C]` in 0 … 1, for each dimension and each change of it.
      values: What was added to the dimension, `[V]`.
    """
    D, V = grid.shape[:2]
    columns = math.ceil(math.sqrt(D))
    lines = math.ceil(D / columns)
    figure = Figure((0.8 * columns, 0.95 * lines + 0.3), dpi=100)
    places = figure.subplots(lines, columns, squeeze=False)
    for axes in places.flat[D:]:
        axes.remove()
    shown = []
    for d, axes in enumerate(places.flat[:D]):
        shown.append(axes.imshow(grid[d, 0], cmap="gray", vmin=0, vmax=1))
        axes.set_title(str(d + 1), loc="center", pad=2)
        axes.set_axis_off()
    heading = figure.suptitle("")
    canvas = FigureCanvasAgg(figure)
    greys = [round(v * (_GREYS - 1) / 255) * 255 // (_GREYS - 1) for v in range(256)]
    frames = []
    for v in (*range(V), *range(V - 2, 0, -1)):
        for d, image in enumerate(shown):
            image.set_data(grid[d, v])
        heading.set_text(f"added to one dimension: {values[v]:+.2f}".replace("-", "\N{MINUS SIGN}"))
        canvas.draw()
        frame = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        if grid.shape[-1] == 1:
            frame = frame.convert("L").point(greys)
        frames.append(frame)
    buffer = io.BytesIO()
    frames[0].save(
        buffer, "GIF", save_all=True, append_images=frames[1:], duration=_MILLISECONDS, loop=0
    )
    return buffer.getvalue()
