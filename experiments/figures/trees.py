"""Figures of routing as a parse tree: evidence by image position, and couplings as edges.

Shape letters: T routing iterations; F class capsules (parents) that are drawn; N primary capsules
(children) that are drawn; R and Q rows and columns of positions of primary capsules; H, W, C
height, width and channels of an image.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from matplotlib.patheffects import withStroke

from experiments.figures.style import BLUE, GREEN, GREY, ORANGE, PINK, POINTS, RED, STYLE

_PARENT_COLOURS = (RED, BLUE, GREEN, ORANGE, PINK)


class ReceptiveFields(NamedTuple):
    """Receptive fields of the primary capsules, squares on a grid of positions."""

    rows: np.ndarray  # [R], centres in pixels; 0 is the centre of the first pixel
    columns: np.ndarray  # [Q], as rows
    side: int  # pixels

    @property
    def positions(self) -> int:
        """Return the number of positions, R · Q."""
        return len(self.rows) * len(self.columns)


@STYLE
def evidence(
    image: np.ndarray,
    values: np.ndarray,
    fields: ReceptiveFields,
    *,
    names: Sequence[str],
    lengths: np.ndarray,
) -> Figure:
    """Draw the evidence for class capsules by image position and routing iteration.

    Args:
      image: `[H, W, C]` in [0, 1].
      values: Evidence `[F, T, R, Q]`, positive for the capsule, negative against it.
      fields: The receptive fields of the positions.
      names: Names of the capsules, `[F]`.
      lengths: Lengths of the capsules, `[F, T]`.
    """
    F, T = values.shape[:2]
    H, W, _ = image.shape
    panel = min(2.2, max(1.3, 6.4 / T))
    figure = Figure((max(5.6, T * panel + 0.5), F * (panel * H / W + 0.2) + 0.45))
    grid = figure.subplots(F, T, squeeze=False)
    spacing = min([2.0, *np.diff(fields.rows), *np.diff(fields.columns)])
    largest = abs(values).max() or 1
    for (f, t), axes in np.ndenumerate(grid):
        _draw_image(axes, image)
        for (r, q), value in np.ndenumerate(values[f, t]):
            radius = 0.5 * spacing * np.sqrt(abs(value) / largest)
            dot = Circle((float(fields.columns[q]), float(fields.rows[r])), radius, linewidth=0)
            dot.set_facecolor(RED if value > 0 else BLUE)
            axes.add_patch(dot)
        r, q = np.unravel_index(values[f, t].argmax(), values[f, t].shape)
        corner = (fields.columns[q] - fields.side / 2, fields.rows[r] - fields.side / 2)
        axes.add_patch(
            Rectangle(corner, fields.side, fields.side, fill=False, edgecolor=GREY, linewidth=0.6)
        )
        axes.set_title(
            f"iteration {t + 1}: length {lengths[f, t]:.2f}", fontsize=POINTS, loc="center"
        )
        if t == 0:
            axes.set_ylabel(names[f], fontsize=POINTS)
    figure.suptitle(
        "Evidence for a class capsule by position: dot area; orange positive, blue negative.\n"
        f"Box: receptive field of the top position, {fields.side} x {fields.side} pixels",
        fontsize=POINTS + 1,
    )
    figure.draw_without_rendering()
    return figure


@STYLE
def tree(
    image: np.ndarray,
    couplings: np.ndarray,
    fields: ReceptiveFields,
    *,
    positions: np.ndarray,
    captions: Sequence[str],
    parents: Sequence[str],
    reconstructions: np.ndarray | None,
    title: str,
) -> Figure:
    """Draw parents above children, with their couplings on the edges.

    Each child is drawn as the image inside its receptive field; the whole image at the left marks
    the fields' centres with the children's numbers.

    Args:
      image: `[H, W, C]` in [0, 1].
      couplings: Coupling of each child with each parent, `[N, F]`.
      fields: The receptive fields.
      positions: Position (row, column) of each child in the grid of fields, integers `[N, 2]`.
      captions: Text below each child, `[N]`.
      parents: Text above each parent, `[F]`.
      reconstructions: The decoder's image of each parent, `[F, H, W, C]`; None without a decoder.
      title: Title of the figure.
    """
    N, F = couplings.shape
    whole, leaf, node = 2.2, 0.72, 0.72  # inches a side
    step, rise = 0.98, 1.15 + 0.2 * F
    left = whole + 0.5
    span = max(N, F + 1) * step
    width = left + span + 0.1
    base = 0.3  # below the leaves, for their captions
    top = base + leaf + rise
    figure = Figure((width, top + node + 0.65))
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, figure.get_figheight()))
    axes.set_axis_off()
    axes.text(0.1, figure.get_figheight() - 0.1, title, va="top", fontsize=POINTS + 1)

    H, W, _ = image.shape
    bottom = (top + node - whole) / 2
    _place(axes, image, (0.15, bottom, whole, whole * H / W))
    xs = left + (np.arange(N) + 0.5) * span / N
    parent_xs = left + (np.arange(F) + 1) * span / (F + 1)
    for n, (r, q) in enumerate(positions):
        row, column = fields.rows[r], fields.columns[q]
        number = axes.text(
            0.15 + whole * (column + 0.5) / W,
            bottom + whole * H / W * (1 - (row + 0.5) / H),
            str(n + 1),
        )
        number.set(ha="center", va="center", color=RED, fontweight="bold")
        number.set_path_effects([withStroke(linewidth=2, foreground="white")])
        half = (fields.side - 1) / 2
        top_row, first_column = np.round([row - half, column - half]).astype(int)
        patch = image[top_row : top_row + fields.side, first_column : first_column + fields.side]
        _place(axes, patch, (xs[n] - leaf / 2, base, leaf, leaf))
        axes.text(xs[n], base - 0.06, captions[n], ha="center", va="top", linespacing=1.1)
    strongest = couplings.max()
    for f in range(F):
        colour = _PARENT_COLOURS[f % len(_PARENT_COLOURS)]
        # One height per parent, so that couplings of different parents cannot overlap.
        height = 0.22 + 0.2 * f
        for n in range(N):
            ends = (xs[n], parent_xs[f]), (base + leaf, top)
            axes.plot(
                *ends, color=colour, lw=max(0.3, 2.5 * couplings[n, f] / strongest), alpha=0.7
            )
        for n in range(N):
            x = xs[n] + (parent_xs[f] - xs[n]) * height / rise
            number = axes.text(x, base + leaf + height, f"{couplings[n, f]:.2f}", zorder=3)
            number.set(ha="center", va="center", color=colour)
            number.set_bbox({"facecolor": "white", "linewidth": 0, "pad": 0.8})
        if reconstructions is None:
            disc = Circle((parent_xs[f], top + node / 2), node / 2, fill=False, edgecolor=colour)
            axes.add_patch(disc)
        else:
            box = (parent_xs[f] - node / 2, top, node, node)
            _place(axes, reconstructions[f], box, colour)
        heading = axes.text(parent_xs[f], top + node + 0.06, parents[f], ha="center", va="bottom")
        heading.set(color=colour, fontweight="bold")
    return figure


def _faded(image: np.ndarray) -> np.ndarray:
    """Map light-on-dark images to grey on white, on which marks are visible; keep colour images.

    Of a stereo pair, the first image is drawn, because positions are those in one image.
    """
    if image.shape[-1] == 2:
        image = image[..., :1]
    return 1 - image / 2 if image.shape[-1] == 1 else image


def _draw_image(axes: Axes, image: np.ndarray) -> None:
    axes.imshow(_faded(image), cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color=GREY)


def _place(axes: Axes, image: np.ndarray, box: tuple[float, ...], edge: str = GREY) -> None:
    """Draw an image in a box (left, bottom, width, height) in data coordinates."""
    left, bottom, width, height = box
    extent = (left, left + width, bottom, bottom + height)
    axes.imshow(
        _faded(image),
        cmap="gray",
        vmin=0,
        vmax=1,
        extent=extent,
        aspect="auto",
        zorder=2,
    )
    axes.add_patch(
        Rectangle((left, bottom), width, height, fill=False, edgecolor=edge, lw=0.8, zorder=3)
    )
