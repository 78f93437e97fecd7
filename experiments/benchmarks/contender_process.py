"""Child process of `benchmark_training`: build one contender, then time its rows on request.

The first line of the output is a JSON object about the first steps. Each line of the input names a
row; its answer is a line with the seconds that one call took.
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
from experiments.benchmarks import contenders
from experiments.cli import flag

COMPARED = 4  # images whose class capsules the parent compares


@dataclasses.dataclass(frozen=True)
class Config:
    """Which contender, and its batch."""

    name: str = flag(
        "torch",
        "Name of the contender.",
        choices=("capsjax", "plain_jax", "torch", "torch_notebook"),
    )
    network: str = flag("capsnet", "The network.", choices=contenders.NETWORKS)
    params: str = flag("", "File of the network's parameters, .npz.")
    batch_size: int = flag(128, "Images in one step.", minimum=1, maximum=2**20)
    image_size: int = flag(
        28, "Height and width of the images, in pixels.", minimum=17, maximum=4096
    )
    more_steps: int = flag(
        2, "Steps after the first, before memory is read.", minimum=0, maximum=10_000
    )
    compilation_cache: str = flag("", "Folder of JAX's persistent compilation cache; empty: none.")


def main(config: Config) -> int:
    """Take the first training steps, then time rows until the input ends."""
    rng = np.random.default_rng(0)
    shape = (config.batch_size, config.image_size, config.image_size, 1)
    images = rng.integers(0, 256, shape, np.uint8)
    labels = rng.integers(0, 10, config.batch_size, np.int32)
    params = contenders.load_params(config.params)
    build = _builder(config)
    started = time.perf_counter()
    contender = build(params, images, labels)
    contender.train()
    first_step = time.perf_counter() - started
    for _ in range(config.more_steps):
        contender.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    capsules = np.asarray(contender.class_capsules(images[:COMPARED]), float)
    start = {"first_step": first_step, "peak_mib": peak, "class_capsules": capsules.tolist()}
    print(json.dumps(start), flush=True)
    rows = {"training": contender.train, **contender.rows()}
    for line in sys.stdin:
        row = rows[line.strip()]
        started = time.perf_counter()
        row()
        print(time.perf_counter() - started, flush=True)
    return 0


def _builder(config: Config) -> Callable[[Any, np.ndarray, np.ndarray], contenders.Contender]:
    """Return the function that builds the contender.

    Only its own packages are imported, because imports count in the peak memory.
    """
    if config.name == "torch" and config.network != "capsnet":
        from experiments.benchmarks import torch_networks

        return functools.partial(torch_networks.contender, config.network)
    if config.name.startswith("torch"):
        from experiments.benchmarks import torch_capsnet

        network = {
            "torch": torch_capsnet.TorchCapsNet,
            "torch_notebook": torch_capsnet.NotebookCapsNet,
        }[config.name]
        return functools.partial(torch_capsnet.contender, network)
    if config.name == "plain_jax":
        from experiments.benchmarks import plain_capsnet

        return plain_capsnet.contender
    from experiments.benchmarks import step_parts
    from experiments.training import loop

    if config.compilation_cache:
        loop.keep_compiled(config.compilation_cache)
    return functools.partial(step_parts.contender, config.network)


if __name__ == "__main__":
    cli.run(Config, main)
