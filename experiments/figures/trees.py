"""Figures of routing as a parse tree: where evidence lies in the image, and who is coupled to whom.

Shape letters: T routing iterations; F class capsules that are looked at; R x C positions of primary
capsules; N children and K parents of a tree; H, W, C height, width and channels of an image.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from matplotlib.patheffects import withStroke

from experiments.figures.style import BLUE, GREEN, GREY, ORANGE, PINK, POINTS, RED, STYLE

_PARENTS = (RED, BLUE, GREEN, ORANGE, PINK)


class Fields(NamedTuple):
    """The pixels that each primary capsule sees."""

    rows: np.ndarray  # [R], the middle of the receptive fields, counted from the first pixel's
    columns: np.ndarray  # [C]
    side: int  # pixels

    @property
    def positions(self) -> int:
        """How many there are."""
        return len(self.rows) * len(self.columns)


@STYLE
def evidence(
    image: np.ndarray,
    shares: np.ndarray,
    where: Fields,
    *,
    names: Sequence[str],
    lengths: np.ndarray,
) -> Figure:
    """Draws, iteration by iteration, how much each position of an image speaks for a capsule.

    Args:
      image: `[H, W, C]` in 0 … 1.
      shares: Evidence `[F, T, R, C]`, above 0 for, below 0 against the capsule.
      where: The receptive fields of the positions.
      names: One a capsule, `[F]`.
      lengths: The capsules' in each iteration, `[F, T]`.
    """
    F, T = shares.shape[:2]
    H, W, _ = image.shape
    panel = min(2.2, max(1.3, 6.4 / T))
    figure = Figure((max(5.6, T * panel + 0.5), F * (panel * H / W + 0.2) + 0.45))
    grid = figure.subplots(F, T, squeeze=False)
    spacing = min([2.0, *np.diff(where.rows), *np.diff(where.columns)])
    largest = abs(shares).max() or 1
    for (f, t), axes in np.ndenumerate(grid):
        _draw_image(axes, image)
        for (r, c), share in np.ndenumerate(shares[f, t]):
            radius = 0.5 * spacing * np.sqrt(abs(share) / largest)
            dot = Circle((float(where.columns[c]), float(where.rows[r])), radius, linewidth=0)
            dot.set_facecolor(RED if share > 0 else BLUE)
            axes.add_patch(dot)
        r, c = np.unravel_index(shares[f, t].argmax(), shares[f, t].shape)
        corner = (where.columns[c] - where.side / 2, where.rows[r] - where.side / 2)
        axes.add_patch(
            Rectangle(corner, where.side, where.side, fill=False, edgecolor=GREY, linewidth=0.6)
        )
        axes.set_title(
            f"iteration {t + 1}: length {lengths[f, t]:.2f}", fontsize=POINTS, loc="center"
        )
        if t == 0:
            axes.set_ylabel(names[f], fontsize=POINTS)
    figure.suptitle(
        "Evidence for a class capsule by position: orange for it, blue against; its size is the "
        f"area of the dot,\non one scale; box: the {where.side} x {where.side} pixels that the "
        "strongest position sees",
        fontsize=POINTS + 1,
    )
    figure.draw_without_rendering()
    return figure


@STYLE
def tree(
    image: np.ndarray,
    couplings: np.ndarray,
    where: Fields,
    *,
    positions: np.ndarray,
    captions: Sequence[str],
    parents: Sequence[str],
    drawings: np.ndarray | None,
    title: str,
) -> Figure:
    """Draws children below their parents, with the couplings on the edges.

    A child is shown by what it sees of the image; at the left, the image tells where that is.

    Args:
      image: `[H, W, C]` in 0 … 1.
      couplings: Of each child with each parent, `[N, K]`.
      where: The receptive fields.
      positions: Row and column of each child among the receptive fields, integers `[N, 2]`.
      captions: What is written below each child, `[N]`.
      parents: What is written above each parent, `[K]`.
      drawings: What the decoder draws of each parent, `[K, H, W, C]`; None without a decoder.
      title: Of the figure.
    """
    N, K = couplings.shape
    whole, leaf, node = 2.2, 0.72, 0.72  # inches a side
    step, rise = 0.98, 1.15 + 0.2 * K
    left = whole + 0.5
    span = max(N, K + 1) * step
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
    spread = left + (np.arange(K) + 1) * span / (K + 1)
    for n, (r, c) in enumerate(positions):
        row, column = where.rows[r], where.columns[c]
        number = axes.text(
            0.15 + whole * (column + 0.5) / W,
            bottom + whole * H / W * (1 - (row + 0.5) / H),
            str(n + 1),
        )
        number.set(ha="center", va="center", color=RED, fontweight="bold")
        number.set_path_effects([withStroke(linewidth=2, foreground="white")])
        start = np.round([row - (where.side - 1) / 2, column - (where.side - 1) / 2]).astype(int)
        seen = image[start[0] : start[0] + where.side, start[1] : start[1] + where.side]
        _place(axes, seen, (xs[n] - leaf / 2, base, leaf, leaf))
        axes.text(xs[n], base - 0.06, captions[n], ha="center", va="top", linespacing=1.1)
    strongest = couplings.max()
    for k in range(K):
        colour = _PARENTS[k % len(_PARENTS)]
        # All numbers of a parent are on one line, and each parent has a line of its own.
        height = 0.22 + 0.2 * k
        for n in range(N):
            ends = (xs[n], spread[k]), (base + leaf, top)
            axes.plot(
                *ends, color=colour, lw=max(0.3, 2.5 * couplings[n, k] / strongest), alpha=0.7
            )
        for n in range(N):
            place = xs[n] + (spread[k] - xs[n]) * height / rise
            number = axes.text(place, base + leaf + height, f"{couplings[n, k]:.2f}", zorder=3)
            number.set(ha="center", va="center", color=colour)
            number.set_bbox({"facecolor": "white", "linewidth": 0, "pad": 0.8})
        if drawings is None:
            disc = Circle((spread[k], top + node / 2), node / 2, fill=False, edgecolor=colour)
            axes.add_patch(disc)
        else:
            _place(axes, drawings[k], (spread[k] - node / 2, top, node, node), colour)
        heading = axes.text(spread[k], top + node + 0.06, parents[k], ha="center", va="bottom")
        heading.set(color=colour, fontweight="bold")
    return figure


def _faded(image: np.ndarray) -> np.ndarray:
    """Light on dark becomes grey on white, on which marks can be seen; colours stay."""
    return 1 - image / 2 if image.shape[-1] == 1 else image


def _draw_image(axes: Axes, image: np.ndarray) -> None:
    axes.imshow(_faded(image), cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color=GREY)


def _place(axes: Axes, image: np.ndarray, box: tuple[float, ...], edge: str = GREY) -> None:
    """Puts an image into a box (left, bottom, width, height) of the axes' own units."""
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
