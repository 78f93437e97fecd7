"""Shows how routing and training scale over devices: memory, communication, time on a CPU.

A CPU pretends to be several devices, and is timed where each has a core of its own. For a TPU or
GPU the programs are compiled by its own compiler, which needs no device.
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
from experiments.benchmarks.scaling import HOST, Program
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

# The network of the paper at a quarter of its batch: 1 to 8 times of it run on two cores.
HOST_CASE = CASES["capsnet_mnist"]._replace(batch=32)
HOST_DEVICES = 1, 2, 4, 8
# The quickstart's network: 6 x 6 positions of 8 types.
TRAINED = HOST_CASE._replace(batch=64, capsules=288)
# What a device does not get done alone: the largest case, and a million input capsules.
LARGE = {
    "long": CASES["long"],
    "million": Case(batch=32, capsules=2**20, length=4, parents=10, depth=16),
}
DEVICES = {"tpu_v5e": (1, 4, 8, 16), "h100": (1, 2, 4, 8)}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compile, and how often to run it."""

    target: str = flag(
        ",".join([HOST, *DEVICES]), f"Any of {', '.join([HOST, *DEVICES])}, commas in between."
    )
    repeats: int = flag(5, "Timed runs on a CPU, where there is a core a device.", minimum=1)
    jobs: int = flag(2, "Compilers for absent devices that run at the same time.", minimum=1)
    output: str = flag("", "File that a JSON line for each row is added to; empty: none.")
    figure: str = flag("", "File of a plot, .png; empty: none.")


def main(config: Config) -> int:
    """Compiles every program, prints a row for each, and draws them."""
    asked = [
        (kind, program) for name in _targets(config.target) for kind, program in programs(name)
    ]
    if config.output:
        files.append_lines(config.output, [])  # fails now, if it must
    rows: list[dict[str, Any]] = []
    print(heading())
    # Runs that are timed have the machine for themselves.
    for is_host in (True, False):
        chosen = [(k, p) for k, p in asked if (p.target == HOST) == is_host]
        repeats = [config.repeats if _is_timed(program) else 0 for _, program in chosen]
        with concurrent.futures.ThreadPoolExecutor(1 if is_host else config.jobs) as pool:
            measured = pool.map(scaling.measure, [program for _, program in chosen], repeats)
            for (kind, program), found in zip(chosen, measured, strict=True):
                rows.append(describe(kind, program, found))
                print(line(rows[-1]), flush=True)
                if config.output:
                    files.append_lines(config.output, rows[-1:])
    if config.figure:
        files.save_figure(draw(rows), config.figure)
    return 0


def programs(target: str) -> list[tuple[str, Program]]:
    """What to compile for a target, each with its name.

    Strong scaling shares one problem out; in weak scaling it grows with the devices. Either is
    over input capsules or over examples. Training always shares its examples out; split, it is by
    input capsules too.
    """
    if target != HOST:
        return [
            (f"{name}, strong", Program("routing", target, 1, count, case))
            for name, case in LARGE.items()
            for count in DEVICES[target]
        ]
    whole = HOST_CASE._replace(batch=4 * HOST_CASE.batch)
    found = []
    for count in HOST_DEVICES:
        more_capsules = HOST_CASE._replace(capsules=count * HOST_CASE.capsules)
        more_examples = HOST_CASE._replace(batch=count * HOST_CASE.batch)
        more_trained = TRAINED._replace(batch=count * TRAINED.batch // 2)
        found += [
            ("capsules, strong", Program("routing", HOST, 1, count, whole)),
            ("capsules, weak", Program("routing", HOST, 1, count, more_capsules)),
            ("examples, strong", Program("routing", HOST, count, 1, whole)),
            ("examples, weak", Program("routing", HOST, count, 1, more_examples)),
            ("training, strong", Program("training", HOST, count, 1, TRAINED)),
            ("training, weak", Program("training", HOST, count, 1, more_trained)),
            ("split training", Program("training", HOST, 1, count, TRAINED)),
        ]
    return found


def describe(kind: str, program: Program, found: dict[str, Any]) -> dict[str, Any]:
    """One row."""
    return {
        "kind": kind,
        **dataclasses.asdict(program),
        "sizes": program.case._asdict(),
        "votes_mb": scaling.votes_mb(program.case),
        **found,
        "memory_mb": found["argument_mb"] + found["result_mb"] + found["temporary_mb"],
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }


_COLUMNS = {"I": 9, "B": 6, "memory MB": 11, "temp MB": 9, "sent MB": 9, "all votes MB": 14}


def heading() -> str:
    """The head of the table."""
    cells = "".join(f"{name:>{width}}" for name, width in _COLUMNS.items())
    return f"{'target':8} {'':20}{'devices':>8}{cells}{'ms (min, max)':>24}"


def line(row: dict[str, Any]) -> str:
    """A row of the table; memory and what is sent are of one device."""
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


def _is_timed(program: Program) -> bool:
    """Whether it runs here, with a core a device."""
    return program.target == HOST and program.data * program.capsules <= (os.cpu_count() or 1)


def _targets(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in (HOST, *DEVICES):
            known = ", ".join([HOST, *DEVICES])
            raise InputError(f"--target must name any of {known}, got {name!r}")
        if name != HOST:
            targets.check_installed(name)
    return names


# The first is the thickest, so that lines that coincide are seen.
_LINES = (
    *((BLUE, 3.2), (RED, 2.4), (GREEN, 1.6), (ORANGE, 0.8)),
    *((PINK, 2.4), (GREY, 1.6), ("black", 0.8)),
)
_PANELS = {
    "Memory of one device (MB)": lambda row: row["memory_mb"],
    "Handed over by one device (MB)": lambda row: sum(row["sent_mb"].values()),
}


@STYLE
def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws memory and communication against the number of devices, a row of panels a target.

    Args:
      rows: As `benchmark_scaling.describe` makes them.
    """
    names = list(dict.fromkeys(row["target"] for row in rows))
    figure = Figure((7.2, 2.3 * len(names)))
    grid = figure.subplots(len(names), len(_PANELS), squeeze=False)
    for line_of_axes, target in zip(grid, names, strict=True):
        own = [row for row in rows if row["target"] == target]
        kinds = list(dict.fromkeys(row["kind"] for row in own))
        for axes, (title, value) in zip(line_of_axes, _PANELS.items(), strict=True):
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
        line_of_axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in grid[-1]:
        axes.set_xlabel("devices")
    settle_ticks(figure)
    return figure


if __name__ == "__main__":
    cli.run(Config, main)
