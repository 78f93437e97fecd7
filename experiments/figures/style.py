"""How the figures of all programs look."""

from matplotlib import style
from matplotlib.figure import Figure

# Okabe and Ito's palette, which stays distinct under the common colour-blindnesses and in grey.
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
            "text.parse_math": False,  # a class may be called "$"
        },
    ]
)


def settle_ticks(figure: Figure) -> None:
    """Makes the ticks now: Matplotlib makes them while it draws, when the style is over."""
    for axes in figure.axes:
        axes.tick_params(labelsize=POINTS)
    figure.draw_without_rendering()
