"""Figures of overlapping digits; shape letters as in `figures`, with 2 digits an image."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.figure_style import BLUE, ORANGE, RED, STYLE
from experiments.figures import draw_tiles


@STYLE
def overlaps(
    layers: np.ndarray,
    reconstructions: np.ndarray,
    *,
    labels: np.ndarray,
    predicted: np.ndarray,
    lengths: np.ndarray,
) -> Figure:
    """Draws pairs of digits over what two capsules make of them, a column an example.

    The first digit is orange and the second blue. The reconstruction of a capsule has the colour of
    the digit that it names; where it names neither, it is drawn in grey and the column is framed.

    Args:
      layers: The digits apart, `[N, 2, H, W, 1]` in 0 … 1.
      reconstructions: Of the two longest capsules, `[N, 2, H, W, 1]`.
      labels: The classes of the digits, `[N, 2]`.
      predicted: The classes of the capsules, `[N, 2]`, the longest first.
      lengths: The lengths of the capsules, `[N, 2]`.
    """
    colours = [to_rgb(ORANGE), to_rgb(BLUE)]
    grey = (0.6, 0.6, 0.6)
    originals = _in_colours(layers, [colours] * len(layers))
    chosen, captions, wrong = [], [], []
    for column, (true, named, long) in enumerate(zip(labels, predicted, lengths, strict=True)):
        chosen.append([colours[list(true).index(k)] if k in true else grey for k in named])
        lines = [f"{k}  {length:.2f}" for k, length in zip(named, long, strict=True)]
        captions.append("\n".join([f"{true[0]} + {true[1]}", *lines]))
        if set(true) != set(named):
            wrong.append(column)
    drawn = _in_colours(reconstructions, chosen)
    count, height, width, _ = originals.shape
    tile = 0.75
    figure = Figure((max(3, count * tile + 1.1), 2 * tile * height / width + 0.85))
    axes = figure.subplots()
    draw_tiles(axes, np.stack([originals, drawn]))
    axes.set_yticks([0, 1], ["two digits", "reconstructions"])
    axes.set_xticks(range(count), captions)
    beside = axes.annotate(
        "true classes\nlongest capsule\nsecond longest",
        (0, 0),
        (-3.5, -3.5),
        xycoords="axes fraction",
        textcoords="offset points",
    )
    beside.set(ha="right", va="top")
    for column in wrong:
        axes.get_xticklabels()[column].set_color(RED)
        frame = Rectangle((column - 0.5, -0.5), 1, 2, fill=False, edgecolor=RED, clip_on=False)
        axes.add_patch(frame)
    if wrong:
        axes.set_title("Framed: not both digits right")
    return figure


def _in_colours(
    layers: np.ndarray, colours: Sequence[Sequence[tuple[float, float, float]]]
) -> np.ndarray:
    """The layers `[N, 2, H, W, 1]` laid over each other in their colours, `[N, H, W, 3]`."""
    return np.minimum(np.einsum("nlhwk,nlc->nhwc", layers, np.array(colours)), 1)
