"""Figures of the rows that benchmark_routing writes. No function uses pyplot or writes a file."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    RED,
    STYLE,
    settle_ticks,
)

Row = Mapping[str, Any]

_COLOURS = (RED, BLUE, GREEN, PINK, ORANGE)
_MARKERS = "osD^vPX<>*"
_MODES = {"forward": "Forward", "gradients": "Value and gradients"}


@STYLE
def time_over_capsules(rows: Sequence[Row]) -> Figure:
    """Draw the median time per call over the number of input capsules, by implementation.

    Bars span the fastest and the slowest round. A cross at the bottom, in the implementation's
    colour, marks a size that could not be measured.

    Args:
      rows: Rows of one case at one or more numbers of input capsules.

    Raises:
      ValueError: No row has a time.
    """
    measured = [row for row in rows if "reason" not in row]
    if not measured:
        raise ValueError("time_over_capsules: rows must include one with a time, got none")
    modes = [mode for mode in _MODES if any(row["mode"] == mode for row in rows)]
    lines = list(dict.fromkeys((_name(row), row["dtype"]) for row in rows))
    figure = Figure((3.2 * len(modes) + 1.4, 3.0))
    panels = figure.subplots(1, len(modes), sharex=True, sharey=True, squeeze=False)[0]
    for axes, mode in zip(panels, modes, strict=True):
        missing = 0
        for line in lines:
            of_line = [r for r in rows if r["mode"] == mode and (_name(r), r["dtype"]) == line]
            of_line.sort(key=lambda row: row["capsules"])
            timed = [row for row in of_line if "reason" not in row]
            look = _look(lines, line)
            if timed:
                capsules, low, middle, high = np.array(
                    [(r["capsules"], r["min"], r["median"], r["max"]) for r in timed]
                ).T
                axes.plot(capsules, 1e3 * middle, **look, lw=1, marker="o")
                axes.vlines(capsules, 1e3 * low, 1e3 * high, color=look["color"], lw=2, alpha=0.4)
            absent = [row["capsules"] for row in of_line if "reason" in row]
            if absent:
                height = 0.04 + 0.05 * missing
                missing += 1
                across = axes.get_xaxis_transform()
                axes.plot(
                    absent, [height] * len(absent), "x", color=look["color"], transform=across
                )
        axes.set(title=_MODES[mode], xlabel="input capsules I", xscale="log", yscale="log")
        _plain_ticks(axes.xaxis)
        _plain_ticks(axes.yaxis)
        axes.grid(visible=True)
    panels[0].set_ylabel("time per call (ms)")
    handles = [Line2D([], [], **_look(lines, line), lw=1, marker="o") for line in lines]
    names = [" ".join(line) if _several(line[1] for line in lines) else line[0] for line in lines]
    if len(measured) < len(rows):
        handles.append(Line2D([], [], color=GREY, lw=0, marker="x"))
        names.append("not measured")
    figure.legend(handles, names, loc="outside right upper")
    first = measured[0]
    title = [first["case"], *(f"{letter}={first[size]}" for letter, size in _SIZES.items())]
    if not _several(row["dtype"] for row in rows):
        title.append(first["dtype"])
    figure.suptitle(f"{' '.join(title)}, on {first['device']}", x=0.01, ha="left")
    _room_for_decades(panels)
    settle_ticks(figure)
    return figure


@STYLE
def roofline(rows: Sequence[Row]) -> Figure:
    """Draw the achieved FLOP/s of each row below the roofline of the device.

    The arithmetic intensity is computed from the least FLOPs and bytes that votes-free routing
    needs. It is equal for all rows of a case, mode and dtype, so vertical ratios are speedups.

    Args:
      rows: Rows with a time.

    Raises:
      ValueError: `rows` is empty.
    """
    if not rows:
        raise ValueError("roofline: rows must include one with a time, got none")
    names = list(dict.fromkeys(_name(row) for row in rows))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure = Figure((6.6, 3.8))
    axes = figure.subplots()
    intensities = [row["least_flops"] / row["least_bytes"] for row in rows]
    ridges = []
    for dtype, style in zip(dtypes, ("-", "--"), strict=False):
        # Peaks are measured once per case; the roof is the highest of them.
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        flops = max(row["peak_flops_per_second"] for row in of_dtype)
        memory = max(row["peak_bytes_per_second"] for row in of_dtype)
        ridges.append(flops / memory)
        across = np.geomspace(
            min([*intensities, ridges[-1]]) / 4, max([*intensities, ridges[-1]]) * 4, 200
        )
        axes.plot(across, np.minimum(flops, memory * across) / 1e9, color=GREY, lw=1.2, ls=style)
    for row, intensity in zip(rows, intensities, strict=True):
        colour = _COLOURS[names.index(_name(row)) % len(_COLOURS)]
        (point,) = axes.plot(intensity, row["flops_per_second"] / 1e9, color=colour, ls="")
        point.set_marker(_MARKERS[cases.index(row["case"]) % len(_MARKERS)])
        point.set(markersize=5, markerfacecolor=colour if row["mode"] == "forward" else "white")
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel="arithmetic intensity (FLOP per byte)", ylabel="GFLOP/s")
    axes.set_title(f"Roofline of {rows[0]['device']}, measured in the same run")
    _plain_ticks(axes.xaxis)
    _plain_ticks(axes.yaxis)
    axes.grid(visible=True)

    def entry(label: str, **look: Any) -> Line2D:
        settings: dict[str, Any] = {"ls": "", "markersize": 5} | look
        return Line2D([], [], label=label, **settings)

    handles = [
        entry(f"roof, {dtype}", color=GREY, ls=style)
        for dtype, style in zip(dtypes, ("-", "--"), strict=False)
    ]
    handles += [
        entry(name, color=_COLOURS[i % len(_COLOURS)], marker="s") for i, name in enumerate(names)
    ]
    handles += [
        entry(case, color=GREY, marker=_MARKERS[i % len(_MARKERS)]) for i, case in enumerate(cases)
    ]
    handles += [
        entry("filled: forward", color=GREY, marker="o"),
        entry("hollow: value and gradients", color=GREY, marker="o", markerfacecolor="white"),
    ]
    figure.legend(handles=handles, loc="outside right upper")
    _room_for_decades([axes])
    settle_ticks(figure)
    return figure


_SIZES = {"B": "batch", "P": "length", "J": "parents", "D": "depth", "T": "num_iterations"}


def _name(row: Row) -> str:
    sizes = row["config"] or {}
    return " ".join([row["implementation"], *(f"{key}={size}" for key, size in sizes.items())])


def _look(lines: Sequence[tuple[str, str]], line: tuple[str, str]) -> dict[str, Any]:
    """Return the line's colour, by implementation, and dash pattern, by dtype."""
    names = list(dict.fromkeys(name for name, _ in lines))
    dtypes = list(dict.fromkeys(dtype for _, dtype in lines))
    colour = _COLOURS[names.index(line[0]) % len(_COLOURS)]
    return {"color": colour, "ls": ("-", "--")[dtypes.index(line[1]) % 2]}


def _several(values: Any) -> bool:
    return len(set(values)) > 1


def _plain_ticks(axis: Axis) -> None:
    """Label powers of ten as plain numbers, with unlabelled minor ticks."""
    axis.set_major_locator(LogLocator(base=10, numticks=12))
    axis.set_major_formatter(lambda value, position: f"{value:,.10g}")
    axis.set_minor_locator(LogLocator(base=10, subs=range(2, 10), numticks=12))
    axis.set_minor_formatter(NullFormatter())


def _room_for_decades(panels: Sequence[Axes]) -> None:
    """Extend logarithmic axes to whole decades, so that at least two ticks have labels."""
    for axes in panels:
        low, high = axes.get_ylim()
        axes.set_ylim(10 ** np.floor(np.log10(low)), 10 ** np.ceil(np.log10(high)))
        low, high = axes.get_xlim()
        if np.ceil(np.log10(low)) >= np.floor(np.log10(high)):
            axes.set_xlim(10 ** np.floor(np.log10(low)), 10 ** np.ceil(np.log10(high)))
