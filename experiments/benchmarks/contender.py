"""One program for the paper's network, in a process of its own that is timed row by row.

`benchmark_training` starts one of these for each program that it compares. The first line printed
is about the start; then each line read is the name of a row, and is answered by its seconds.
"""

import dataclasses
import functools
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments import cli
from experiments.benchmarks import programs
from experiments.cli import flag

COMPARED = 4  # images whose class capsules are handed over


@dataclasses.dataclass(frozen=True)
class Config:
    """Which program, and on what."""

    name: str = flag(
        "torch",
        "The program.",
        choices=("capsjax", "plain_jax", "torch", "torch_notebook"),
    )
    params: str = flag("", "File of a CapsNet's parameters, .npz.")
    batch_size: int = flag(128, "Images in one step.", minimum=1)
    image_size: int = flag(28, "Height and width of the images, in pixels.", minimum=17)
    more_steps: int = flag(2, "Steps after the first, before memory is read.", minimum=0)
    compilation_cache: str = flag("", "Folder of compiled programs.")


def main(config: Config) -> int:
    """Trains some steps, then runs what it is asked for until its input ends."""
    rng = np.random.default_rng(0)
    shape = (config.batch_size, config.image_size, config.image_size, 1)
    images = rng.integers(0, 256, shape, np.uint8)
    labels = rng.integers(0, 10, config.batch_size, np.int32)
    params = programs.load_params(config.params)
    build = _build(config)
    started = time.perf_counter()
    program = build(params, images, labels)
    program.train()
    first_step = time.perf_counter() - started
    for _ in range(config.more_steps):
        program.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    capsules = np.asarray(program.class_capsules(images[:COMPARED]), float)
    start = {"first_step": first_step, "peak_mib": peak, "class_capsules": capsules.tolist()}
    print(json.dumps(start), flush=True)
    rows = {"training": program.train, **program.rows()}
    for line in sys.stdin:
        run = rows[line.strip()]
        started = time.perf_counter()
        run()
        print(time.perf_counter() - started, flush=True)
    return 0


def _build(config: Config) -> Callable[[Any, np.ndarray, np.ndarray], programs.Program]:
    """The program's maker; each imports what it needs alone, so that memory is its own."""
    if config.name.startswith("torch"):
        from experiments.benchmarks import torch_capsnet

        network = {
            "torch": torch_capsnet.TorchCapsNet,
            "torch_notebook": torch_capsnet.NotebookCapsNet,
        }[config.name]
        return functools.partial(torch_capsnet.program, network)
    if config.name == "plain_jax":
        from experiments.benchmarks import plain_capsnet

        return plain_capsnet.program
    from experiments.benchmarks import step_parts
    from experiments.training import loop

    if config.compilation_cache:
        loop.keep_compiled(config.compilation_cache)
    return step_parts.program


if __name__ == "__main__":
    cli.run(Config, main)
