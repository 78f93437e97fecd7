"""Measure how routing and training scale over devices: memory, communication, and time on a CPU.

Programs for the CPU run on as many virtual host devices as they need, and are timed if there is a
core a device. Programs for a TPU or GPU are only compiled, ahead of time and without the device.
"""

import concurrent.futures
import dataclasses
import datetime
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from capsjax.kernels.vote_passes.cases import CASES, Case
from experiments import cli, files
from experiments.benchmarks import scaling
from experiments.benchmarks.scaling import HOST, ShardedCase
from experiments.cli import flag
from experiments.compilers import targets
from experiments.errors import InputError
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

# The paper's network at a quarter of its batch, so that two cores run 1 to 8 times as much.
HOST_CASE = CASES["capsnet_mnist"]._replace(batch=32)
HOST_DEVICES = 1, 2, 4, 8
# The network of the quickstart: 6 x 6 positions of 8 types.
TRAINED = HOST_CASE._replace(batch=64, capsules=288)
# Cases that are too large for one device.
LARGE = {
    "long": CASES["long"],
    "million": Case(batch=32, capsules=2**20, length=4, parents=10, depth=16),
}
DEVICES = {"tpu_v5e": (1, 4, 8, 16), "h100": (1, 2, 4, 8)}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compile, and how often to run it."""

    target: str = flag(
        ",".join([HOST, *DEVICES]), f"Any of {', '.join([HOST, *DEVICES])}, comma-separated."
    )
    repeats: int = flag(
        5, "Timed runs on a CPU, if there is a core a device.", minimum=1, maximum=10_000
    )
    jobs: int = flag(2, "Ahead-of-time compilations in parallel.", minimum=1, maximum=1024)
    output: str = flag("", "File to append a JSON line a row to; empty: none.")
    figure: str = flag("", "File of a plot, .png; empty: none.")


def main(config: Config) -> int:
    """Compile every sharded case; print and write its row as soon as it is measured; draw all."""
    named = [
        (kind, case) for target in _select_targets(config.target) for kind, case in cases(target)
    ]
    if config.output:
        files.append_lines(config.output, [])  # fails before the first compilation
    rows: list[dict[str, Any]] = []
    print(heading())
    # First the host's, one at a time, so that nothing else runs beside a timed case.
    for is_host in (True, False):
        group = [(kind, case) for kind, case in named if (case.target == HOST) == is_host]
        repeats = [config.repeats if _is_timed(case) else 0 for _, case in group]
        with concurrent.futures.ThreadPoolExecutor(1 if is_host else config.jobs) as pool:
            results = pool.map(scaling.measure_sharded, [case for _, case in group], repeats)
            for (kind, case), result in zip(group, results, strict=True):
                rows.append(describe(kind, case, result))
                print(line(rows[-1]), flush=True)
                if config.output:
                    files.append_lines(config.output, rows[-1:])
    if config.figure:
        files.save_figure(draw(rows), config.figure)
    return 0


def _select_targets(text: str) -> list[str]:
    """Parse --target; raise InputError for an unknown target or a missing compiler."""
    names = text.split(",")
    for name in names:
        if name not in (HOST, *DEVICES):
            known = ", ".join([HOST, *DEVICES])
            raise InputError(f"--target must name any of {known}, got {name!r}")
        if name != HOST:
            targets.check_installed(name)
    return names


def cases(target: str) -> list[tuple[str, ShardedCase]]:
    """List the sharded cases of a target, each with its kind.

    Strong scaling divides a fixed problem among the devices; in weak scaling the problem grows with
    their number. Routing shards either the input capsules or the examples. Training shards the
    examples; "split training" shards the input capsules too.
    """
    if target != HOST:
        return [
            (f"{name}, strong", ShardedCase("routing", target, 1, count, case))
            for name, case in LARGE.items()
            for count in DEVICES[target]
        ]
    whole = HOST_CASE._replace(batch=4 * HOST_CASE.batch)
    named = []
    for count in HOST_DEVICES:
        more_capsules = HOST_CASE._replace(capsules=count * HOST_CASE.capsules)
        more_examples = HOST_CASE._replace(batch=count * HOST_CASE.batch)
        more_trained = TRAINED._replace(batch=count * TRAINED.batch // 2)
        named += [
            ("capsules, strong", ShardedCase("routing", HOST, 1, count, whole)),
            ("capsules, weak", ShardedCase("routing", HOST, 1, count, more_capsules)),
            ("examples, strong", ShardedCase("routing", HOST, count, 1, whole)),
            ("examples, weak", ShardedCase("routing", HOST, count, 1, more_examples)),
            ("training, strong", ShardedCase("training", HOST, count, 1, TRAINED)),
            ("training, weak", ShardedCase("training", HOST, count, 1, more_trained)),
            ("split training", ShardedCase("training", HOST, 1, count, TRAINED)),
        ]
    return named


def _is_timed(case: ShardedCase) -> bool:
    """Return whether a case runs on this machine, with a core a device."""
    return case.target == HOST and case.data * case.capsules <= (os.cpu_count() or 1)


def describe(kind: str, case: ShardedCase, result: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a sharded case, from the result of `scaling.measure_sharded`."""
    return {
        "kind": kind,
        **dataclasses.asdict(case),
        "sizes": case.case._asdict(),
        "votes_mb": scaling.votes_mb(case.case),
        **result,
        "memory_mb": result["argument_mb"] + result["result_mb"] + result["temporary_mb"],
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }


# Titles and widths: rows are printed one by one, before the widths of later ones are known.
_COLUMNS = {"I": 9, "B": 6, "memory MB": 11, "temp MB": 9, "sent MB": 9, "all votes MB": 14}


def heading() -> str:
    """Return the titles of the table."""
    cells = "".join(f"{name:>{width}}" for name, width in _COLUMNS.items())
    return f"{'target':8} {'':20}{'devices':>8}{cells}{'ms (min, max)':>24}"


def line(row: dict[str, Any]) -> str:
    """Format a row of the table; memory and communication are those of one device."""
    sizes = row["sizes"]
    cells = (
        sizes["capsules"],
        sizes["batch"],
        f"{row['memory_mb']:.1f}",
        f"{row['temporary_mb']:.2f}",
        f"{sum(row['sent_mb'].values()):.3f}",
        f"{row['votes_mb']:.0f}",
    )
    times = [1000 * value for value in row["seconds"]]
    shown = f"{np.median(times):.1f} ({min(times):.1f}, {max(times):.1f})" if times else ""
    return (
        f"{row['target']:8} {row['kind']:20}{row['data'] * row['capsules']:8}"
        + "".join(f"{cell:>{width}}" for cell, width in zip(cells, _COLUMNS.values(), strict=True))
        + f"{shown:>24}"
    )


# Colour and width of each kind: later lines are thinner, so that overlapping ones stay visible.
_LINES = (
    *((BLUE, 3.2), (RED, 2.4), (GREEN, 1.6), (ORANGE, 0.8)),
    *((PINK, 2.4), (GREY, 1.6), ("black", 0.8)),
)
_PANELS = {
    "Memory of one device (MB)": lambda row: row["memory_mb"],
    "Sent by one device (MB)": lambda row: sum(row["sent_mb"].values()),
}


@STYLE
def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw memory and communication against the number of devices, a row of panels a target.

    Args:
      rows: Results of `describe`.
    """
    names = list(dict.fromkeys(row["target"] for row in rows))
    figure = Figure((7.2, 2.3 * len(names)))
    grid = figure.subplots(len(names), len(_PANELS), squeeze=False)
    for panels, target in zip(grid, names, strict=True):
        own = [row for row in rows if row["target"] == target]
        kinds = list(dict.fromkeys(row["kind"] for row in own))
        for axes, (title, value) in zip(panels, _PANELS.items(), strict=True):
            for kind, (colour, width) in zip(kinds, _LINES, strict=False):
                points = [
                    (row["data"] * row["capsules"], value(row))
                    for row in own
                    if row["kind"] == kind
                ]
                shown = [(x, y) for x, y in points if y > 0]  # one device sends nothing
                (line,) = axes.loglog(*zip(*shown, strict=True), "o-", color=colour)
                line.set(linewidth=width, markersize=2 * width)
                line.set(label=kind, clip_on=False)
            axes.set_title(f"{title}, {target}")
            counts = sorted({row["data"] * row["capsules"] for row in own})
            axes.xaxis.set_major_locator(FixedLocator(counts))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_minor_locator(NullLocator())
                axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.set_xlim(min(counts) / 1.1, 1.1 * max(counts))
            axes.grid(visible=True)
        panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in grid[-1]:
        axes.set_xlabel("devices")
    settle_ticks(figure)
    return figure


if __name__ == "__main__":
    cli.run(Config, main)
