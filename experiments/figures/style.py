"""Matplotlib style that all figures share."""

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure

# Okabe and Ito's colour-blind-safe palette, https://jfly.uni-koeln.de/color/.
BLUE, RED, GREEN, ORANGE, PINK = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7"
GREY = "#666666"
POINTS = 7.0
STYLE = style.context(
    [
        "default",
        {
            "axes.linewidth": 0.6,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlelocation": "left",
            "figure.constrained_layout.use": True,
            "figure.dpi": 150,
            "font.size": POINTS,
            "grid.alpha": 0.5,
            "grid.linewidth": 0.4,
            "legend.frameon": False,
            "lines.markersize": 3,
            "text.parse_math": False,  # class names may contain "$"
        },
    ]
)


def side_by_side(images: np.ndarray) -> np.ndarray:
    """Lay the halves of stereo pairs `[..., H, W, 2]` side by side, `[..., H, 2 W, 1]`.

    Images of other numbers of channels are returned as they are.
    """
    if images.shape[-1] != 2:
        return images
    return np.concatenate([images[..., :1], images[..., 1:]], axis=-2)


def settle_ticks(figure: Figure) -> None:
    """Create all ticks inside the style context; Matplotlib would create them when drawing."""
    for axes in figure.axes:
        axes.tick_params(labelsize=POINTS)
    figure.draw_without_rendering()
