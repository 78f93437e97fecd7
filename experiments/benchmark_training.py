"""Measures the paper's network on this machine, beside plain JAX and PyTorch, and part by part.

Every program has a process of its own, as its users run it, and only one of them runs at a time:
each round times every row of every program once.
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
from matplotlib import style
from matplotlib.figure import Figure

from capsjax.models import CapsNet
from experiments import cli, files
from experiments.benchmarks import programs, step_parts
from experiments.cli import flag
from experiments.errors import InputError

PARTS = (
    "routing",
    "first convolution, with gradients",
    "primary capsules, with gradients",
    "decoder, with gradients",
    "matrix product",
)
COMMON = ("training", "inference", "routing, with gradients")
TOLERANCE = 1e-4  # of class capsules, whose length is below 1


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure, and how often."""

    batch_size: int = flag(128, "Images in one step.", minimum=1)
    image_size: int = flag(28, "Height and width of the images, in pixels.", minimum=17)
    repeats: int = flag(5, "Timed rounds.", minimum=1)
    plain_repeats: int = flag(1, "Rounds that time plain JAX, a step a minute; 0: none.", minimum=0)
    torch: bool = flag(False, "Time two forms in PyTorch too.")
    output: str = flag("", "File that a JSON line for each row is added to; empty: none.")
    figure: str = flag("", "File of a bar chart, .png; empty: none.")


class Contender:
    """One program in its process."""

    def __init__(self, name: str, arguments: list[str]):
        """Starts it; `started` says what it reports of its first steps."""
        self.name = name
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "experiments.benchmarks.contender",
                f"--name={name}",
                *arguments,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.started = self._answer()

    def seconds(self, row: str) -> float:
        """Runs one row once."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{row}\n")
        self.process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """Ends the process, whatever it does."""
        self.process.kill()
        self.process.communicate()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.name} ended with {self.process.wait()}")
        return json.loads(line)


def main(config: Config) -> int:
    """Times every row in turn, and prints medians with their spread."""
    names = ["capsjax"] + ["plain_jax"] * (config.plain_repeats > 0)
    if config.torch:
        if importlib.util.find_spec("torch") is None:
            raise InputError("--torch needs the package torch: pip install 'capsjax[torch]'")
        names += ["torch", "torch_notebook"]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        arguments = [
            f"--params={_params(folder, config)}",
            f"--batch_size={config.batch_size}",
            f"--image_size={config.image_size}",
        ]

        def start(name: str, *more: str) -> Contender:
            contender = Contender(name, [*arguments, *more])
            stack.callback(contender.stop)
            return contender

        kept = [f"--compilation_cache={os.path.join(folder, 'compiled')}", "--more_steps=0"]
        for _ in range(2):  # the first of them fills the folder
            second = start("capsjax", *kept)
            second.stop()
        contenders = [
            start(name, *(["--more_steps=0"] if name == "plain_jax" else [])) for name in names
        ]
        _check_equal(contenders)
        seconds: dict[tuple[str, str], list[float]] = {}
        for contender, row in _rounds(contenders, config):
            seconds.setdefault((contender.name, row), []).append(contender.seconds(row))
    lines = [_line(*key, values, config) for key, values in seconds.items()]
    lines += [
        _line(contender.name, row, [contender.started[key]], config, unit=unit)
        for contender in contenders
        for row, key, unit in (
            ("first step", "first_step", "s"),
            ("peak memory", "peak_mib", "MiB"),
        )
    ]
    again = second.started["first_step"]
    lines.append(_line("capsjax", "first step, compiled before", [again], config))
    for text in table(lines):
        print(text)
    if config.output:
        files.append_lines(config.output, lines)
    if config.figure:
        files.save_figure(throughput(lines), config.figure)
    return 0


def table(lines: list[dict[str, Any]]) -> Iterator[str]:
    """Yields the rows as text, and by what factor capsjax is faster or smaller in each."""
    own = {line["row"]: line["median"] for line in lines if line["program"] == "capsjax"}
    cells = [["program", "row", "unit", "median", "min", "max", "images/s", "ratio to capsjax"]]
    for line in lines:
        unit = line["unit"]
        scale, shown = (1000, "ms") if unit == "s" else (1, unit)
        speed = line["images_per_second"]
        cells.append(
            [
                *(line["program"], line["row"], shown),
                *(f"{scale * line[key]:.1f}" for key in ("median", "min", "max")),
                "" if speed is None else f"{speed:.1f}",
                f"{line['median'] / own[line['row']]:.2f}",
            ]
        )
    yield from cli.table(cells)
    flop = 2 * step_parts.MATRIX**3
    speed = 1e-9 * flop / own["matrix product"]
    yield f"matrix product of {step_parts.MATRIX}: {speed:.0f} GFLOP/s"


def _params(folder: str, config: Config) -> str:
    """The file of the parameters that all programs are compared with."""
    model = CapsNet((config.image_size, config.image_size, 1), rngs=nnx.Rngs(0))
    path = os.path.join(folder, "params.npz")
    programs.save_params(path, nnx.to_pure_dict(nnx.split(model)[1]))
    return path


def _check_equal(contenders: list[Contender]) -> None:
    """Raises RuntimeError unless all programs compute the same."""
    wanted, *others = (np.array(contender.started["class_capsules"]) for contender in contenders)
    for contender, capsules in zip(contenders[1:], others, strict=True):
        if not (error := np.abs(capsules - wanted).max()) <= TOLERANCE:  # nor NaN
            raise RuntimeError(f"{contender.name} differs from capsjax by {error:.1e}")


def _rounds(contenders: list[Contender], config: Config) -> Iterator[tuple[Contender, str]]:
    """What to time next; plain JAX in the last rounds only."""
    for contender in contenders:  # compile, and warm up
        for row in (*COMMON, *(PARTS if contender.name == "capsjax" else ())):
            if contender.name != "plain_jax":
                contender.seconds(row)
    for left in reversed(range(config.repeats)):
        for row in (*COMMON, *PARTS):
            for contender in contenders:
                is_plain = contender.name == "plain_jax"
                if contender.name == "capsjax" or (
                    row in COMMON and not (is_plain and left >= config.plain_repeats)
                ):
                    yield contender, row


def _line(
    program: str, row: str, values: list[float], config: Config, *, unit: str = "s"
) -> dict[str, Any]:
    """One row's numbers, with what is needed to compare them."""
    median = float(np.median(values))
    is_rate = unit == "s" and row != "matrix product" and "first step" not in row
    return {
        "program": program,
        "row": row,
        "unit": unit,
        "median": median,
        "min": min(values),
        "max": max(values),
        "repeats": len(values),
        "images_per_second": config.batch_size / median if is_rate else None,
        "batch_size": config.batch_size,
        "image_size": config.image_size,
        "device": jax.devices()[0].device_kind,
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {name: _version(name) for name in ("jax", "torch")},
        "date": datetime.date.today().isoformat(),
    }


def _version(package: str) -> str | None:
    """The version of a package, or None without it; importing it would take a second."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


NAMES = {
    "capsjax": "capsjax",
    "torch": "PyTorch",
    "torch_notebook": "PyTorch, notebook form",
    "plain_jax": "plain JAX",
}
_BLUE, _GREY = "#0072B2", "#999999"


@style.context(["default", {"font.size": 8, "axes.spines.right": False, "axes.spines.top": False}])
def throughput(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws images a second of training and of inference, a bar a program, from least to most.

    Args:
      rows: The lines of `benchmark_training`; those of other rows are left out.
    """
    figure = Figure((7.2, 1.7), layout="constrained")
    for axes, row in zip(figure.subplots(1, 2), ("training", "inference"), strict=True):
        shown = sorted(
            (line for line in rows if line["row"] == row), key=lambda x: x["images_per_second"]
        )
        speeds = [line["images_per_second"] for line in shown]
        bars = axes.barh(
            [NAMES[line["program"]] for line in shown],
            speeds,
            color=[_BLUE if line["program"] == "capsjax" else _GREY for line in shown],
        )
        axes.bar_label(bars, [f"{speed:.3g}" for speed in speeds], padding=3)
        axes.set(title=f"{row}, images/s", xlim=(0, 1.2 * max(speeds)))
        axes.tick_params(axis="y", length=0)
    return figure


if __name__ == "__main__":
    cli.run(Config, main)
