"""Measure the paper's network, or another, beside plain JAX and PyTorch, and layer by layer.

Each contender runs in a child process, with memory and threads of its own. They take turns: each
round times every row of every contender once, and only one of them computes at a time.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from experiments import cli, files
from experiments.benchmarks import contenders, step_parts
from experiments.cli import flag
from experiments.errors import InputError
from experiments.figures.style import BLUE, GREY, STYLE, settle_ticks
from experiments.training import mnist, networks

# Rows of every contender, and rows of capsjax only; networks other than capsnet have not all.
COMMON = ("training", "inference", "routing, with gradients")
PARTS = (
    "routing",
    "first convolution, with gradients",
    "primary capsules, with gradients",
    "decoder, with gradients",
    "matrix product",
)
TOLERANCE = 1e-4  # maximum absolute error of class capsules, whose lengths are below 1


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure, and how often."""

    network: str = flag(
        "capsnet",
        "capsnet; or a network of another paper, without the rows of layers.",
        choices=contenders.NETWORKS,
    )
    batch_size: int = flag(128, "Images in one step.", minimum=1, maximum=2**20)
    image_size: int = flag(
        28, "Height and width of the images, in pixels.", minimum=17, maximum=4096
    )
    repeats: int = flag(5, "Timed rounds.", minimum=1, maximum=10_000)
    plain_repeats: int = flag(
        1,
        "Rounds that include plain JAX, at a minute a step, of capsnet; 0: none.",
        minimum=0,
        maximum=10_000,
    )
    torch: bool = flag(False, "Also measure PyTorch, capsnet in two forms.")
    output: str = flag("", "File to append a JSON line a row to; empty: none.")
    figure: str = flag("", "File of a bar chart, .png; empty: none.")


def main(config: Config) -> int:
    """Time all contenders in turn; print, write and draw the medians with their spread."""
    is_capsnet = config.network == "capsnet"
    names = ["capsjax"] + ["plain_jax"] * (is_capsnet and config.plain_repeats > 0)
    if config.torch:
        if importlib.util.find_spec("torch") is None:
            raise InputError("--torch needs the package torch: pip install 'capsjax[torch]'")
        names += ["torch"] + ["torch_notebook"] * is_capsnet
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        arguments = [
            f"--network={config.network}",
            f"--params={_write_params(folder, config)}",
            f"--batch_size={config.batch_size}",
            f"--image_size={config.image_size}",
        ]

        def start(name: str, *more: str) -> ContenderProcess:
            process = ContenderProcess(name, [*arguments, *more])
            stack.callback(process.stop)
            return process

        cache = [f"--compilation_cache={os.path.join(folder, 'compiled')}", "--more_steps=0"]
        for _ in range(2):  # the first one fills the compilation cache, the second one reads it
            cached = start("capsjax", *cache)
            cached.stop()
        processes = [
            start(name, *(["--more_steps=0"] if name == "plain_jax" else [])) for name in names
        ]
        _check_equal(processes)
        seconds: dict[tuple[str, str], list[float]] = {}
        for process, row in _schedule(processes, config):
            seconds.setdefault((process.name, row), []).append(process.seconds(row))
    rows = [_describe(*key, values, config) for key, values in seconds.items()]
    rows += [
        _describe(process.name, row, [process.started[key]], config, unit=unit)
        for process in processes
        for row, key, unit in (
            ("first step", "first_step", "s"),
            ("peak memory", "peak_mib", "MiB"),
        )
    ]
    first_step = cached.started["first_step"]
    rows.append(_describe("capsjax", "first step, compiled before", [first_step], config))
    for text in report(rows):
        print(text)
    if config.output:
        files.append_lines(config.output, rows)
    if config.figure:
        files.save_figure(throughput(rows), config.figure)
    return 0


class ContenderProcess:
    """A child process that runs `experiments.benchmarks.contender_process`.

    Attributes:
      name: Of the contender.
      started: The report about its first steps: `first_step` in seconds, `peak_mib`, and
        `class_capsules` of a few images.
    """

    def __init__(self, name: str, arguments: list[str]):
        """Start the process, and wait for its report."""
        self.name = name
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "experiments.benchmarks.contender_process",
                f"--name={name}",
                *arguments,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.started = self._answer()

    def seconds(self, row: str) -> float:
        """Time one call of a row."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{row}\n")
        self.process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.communicate()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            if (status := self.process.wait()) == 2:  # it has said why
                sys.exit(status)
            raise RuntimeError(f"the process of {self.name} exited with {status}")
        return json.loads(line)


def _write_params(folder: str, config: Config) -> str:
    """Write the parameters for which all contenders must compute the same; return the path."""
    shape = (config.image_size, config.image_size, 1)
    step_parts.make_trainer(config.network, shape)  # refuses what does not fit into memory
    model = networks.build(mnist.Config(network=config.network), shape, 10, seed=0)
    path = os.path.join(folder, "params.npz")
    contenders.save_params(path, nnx.to_pure_dict(nnx.split(model)[1]))
    return path


def _check_equal(processes: list[ContenderProcess]) -> None:
    """Raise RuntimeError unless the class capsules of all contenders are equal."""
    own, *others = (np.array(process.started["class_capsules"]) for process in processes)
    for process, capsules in zip(processes[1:], others, strict=True):
        if not (error := np.abs(capsules - own).max()) <= TOLERANCE:  # also refuses NaN
            raise RuntimeError(f"{process.name} differs from capsjax by {error:.1e}")


def _schedule(
    processes: list[ContenderProcess], config: Config
) -> Iterator[tuple[ContenderProcess, str]]:
    """Run every row once to warm up; then yield what to time, plain JAX in the last rounds only."""
    is_capsnet = config.network == "capsnet"
    common, parts = (COMMON, PARTS) if is_capsnet else (COMMON[:2], PARTS[-1:])
    for process in processes:
        for row in (*common, *(parts if process.name == "capsjax" else ())):
            if process.name != "plain_jax":
                process.seconds(row)
    for left in reversed(range(config.repeats)):
        for row in (*common, *parts):
            for process in processes:
                is_plain = process.name == "plain_jax"
                if process.name == "capsjax" or (
                    row in common and not (is_plain and left >= config.plain_repeats)
                ):
                    yield process, row


def _describe(
    name: str, row: str, values: list[float], config: Config, *, unit: str = "s"
) -> dict[str, Any]:
    """Summarise the values of one row, with the settings and versions they depend on."""
    median = float(np.median(values))
    is_rate = unit == "s" and row != "matrix product" and "first step" not in row
    return {
        "program": name,
        "row": row,
        "unit": unit,
        "median": median,
        "min": min(values),
        "max": max(values),
        "repeats": len(values),
        "network": config.network,
        "images_per_second": config.batch_size / median if is_rate else None,
        "batch_size": config.batch_size,
        "image_size": config.image_size,
        "device": jax.devices()[0].device_kind,
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {package: _version(package) for package in ("jax", "torch")},
        "date": datetime.date.today().isoformat(),
    }


def _version(package: str) -> str | None:
    """Return the version of a package, or None without it; does not import it, which is slow."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def report(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table of rows, and the speed of the matrix product."""
    own = {row["row"]: row["median"] for row in rows if row["program"] == "capsjax"}
    cells = [["program", "row", "unit", "median", "min", "max", "images/s", "ratio to capsjax"]]
    for row in rows:
        scale, unit = (1000, "ms") if row["unit"] == "s" else (1, row["unit"])
        speed = row["images_per_second"]
        cells.append(
            [
                *(row["program"], row["row"], unit),
                *(f"{scale * row[key]:.1f}" for key in ("median", "min", "max")),
                "" if speed is None else f"{speed:.1f}",
                f"{row['median'] / own[row['row']]:.2f}",
            ]
        )
    yield from cli.table(cells)
    flops = 2 * step_parts.MATRIX**3
    speed = 1e-9 * flops / own["matrix product"]
    yield f"matrix product of {step_parts.MATRIX}: {speed:.0f} GFLOP/s"


_LABELS = {
    "capsjax": "capsjax",
    "torch": "PyTorch",
    "torch_notebook": "PyTorch, notebook form",
    "plain_jax": "plain JAX",
}


@STYLE
def throughput(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the images a second of training and of inference, a bar a contender, sorted by speed.

    Args:
      rows: Results of `main`; only the rows "training" and "inference" are drawn.
    """
    figure = Figure((7.2, 1.7))
    for axes, row in zip(figure.subplots(1, 2), ("training", "inference"), strict=True):
        shown = sorted(
            (found for found in rows if found["row"] == row), key=lambda x: x["images_per_second"]
        )
        speeds = [found["images_per_second"] for found in shown]
        bars = axes.barh(
            [_LABELS[found["program"]] for found in shown],
            speeds,
            color=[BLUE if found["program"] == "capsjax" else GREY for found in shown],
        )
        axes.bar_label(bars, [f"{speed:.3g}" for speed in speeds], padding=3)
        axes.set(title=f"{row}, images/s", xlim=(0, 1.2 * max(speeds)))
        axes.tick_params(axis="y", length=0)
    settle_ticks(figure)
    return figure


if __name__ == "__main__":
    cli.run(Config, main)
