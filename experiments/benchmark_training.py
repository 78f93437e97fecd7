"""Measures the paper's network on this machine: training, inference, and the parts of a step."""

import dataclasses
import datetime
import platform
import resource
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import capsjax
from capsjax.models import CapsNet
from experiments import cli, records, training
from experiments.cli import flag

MATRIX = 2048


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure, and how often."""

    batch_size: int = flag(128, "Images in one step.", minimum=1)
    image_size: int = flag(28, "Height and width of the images, in pixels.", minimum=17)
    repeats: int = flag(5, "Timed runs of each row, in turn with those of the others.", minimum=1)
    output: str = flag("", "File that a JSON line for each row is added to; empty: none.")


def main(config: Config) -> int:
    """Times every row in turn, and prints medians with their spread."""
    shape = (config.image_size, config.image_size, 1)
    trainer = training.Trainer(
        CapsNet(shape, rngs=nnx.Rngs(0)),
        training.Objective(num_classes=10, reconstruction_weight=0.0005, shift=2),
        training.adam(1e-3, final_learning_rate=1e-4, num_steps=1000),
    )
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (config.batch_size, *shape), np.uint8)
    labels = rng.integers(0, 10, config.batch_size, np.int32)

    started = time.perf_counter()
    state = trainer.step(trainer.initial_state(0), images, labels)
    jax.block_until_ready(state)
    first_step = time.perf_counter() - started

    def train() -> Any:
        nonlocal state
        state = trainer.step(state, images, labels)
        return state

    # A copy, since every step gives the parameters before it away.
    params = jax.tree.map(jnp.copy, state.params)
    rows = {"training step": train, **parts(trainer, params, images)}
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for repeat in range(config.repeats + 1):  # the first run warms up
        for name, run in rows.items():
            started = time.perf_counter()
            jax.block_until_ready(run())
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    lines = [describe(name, values, config) for name, values in seconds.items()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"first step, compilation included: {first_step:.1f} s; peak memory {peak:.0f} MiB")
    print(f"{'':34}{'median':>10}{'min':>10}{'max':>10}{'images/s':>10}{'GFLOP/s':>10}")
    for line in lines:
        times = "".join(f"{1000 * line[key]:7.1f} ms" for key in ("median", "min", "max"))
        print(f"{line['row']:34}{times}{line['images_per_second']:10.1f}{line['gflops'] or '':>10}")
    if config.output:
        records.append_lines(config.output, lines)
    return 0


def parts(
    trainer: training.Trainer, params: training.Params, images: np.ndarray
) -> dict[str, Callable[[], Any]]:
    """The rows beside the training step, compiled; gradients are of all that the row computes."""
    model = trainer.model(params)
    pixels = training.scaled(jnp.asarray(images))
    features = jax.nn.relu(model.convolution(pixels))
    poses = model.primary(features)
    weights = model.capsules.weights[...]
    capsules = model.capsules(poses)
    chosen = jnp.argmax(capsjax.lengths(capsules), axis=1)
    matrix = jnp.ones((MATRIX, MATRIX))

    def bind(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        compiled = jax.jit(function).lower(*arguments).compile()
        return lambda: compiled(*arguments)

    def gradients(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        def run(*arguments: Any) -> Any:
            outputs, vjp = jax.vjp(function, *arguments)
            return outputs, vjp(outputs)

        return bind(run, *arguments)

    def layer(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, *inputs: function(trainer.model(params), *inputs)

    first = layer(lambda model, x: model.convolution(x))
    return {
        "inference": bind(layer(lambda model, x: capsjax.lengths(model(x))), params, pixels),
        "first convolution, with gradients": gradients(lambda p: first(p, pixels), params),
        "primary capsules, with gradients": gradients(
            layer(lambda model, x: model.primary(x)), params, features
        ),
        "routing": bind(capsjax.dynamic_routing, poses, weights),
        "routing, with gradients": gradients(capsjax.dynamic_routing, poses, weights),
        "decoder, with gradients": gradients(
            layer(lambda model, c: model.reconstruct(c, chosen)), params, capsules
        ),
        f"matrix product of {MATRIX}": bind(jnp.matmul, matrix, matrix),
    }


def describe(name: str, seconds: list[float], config: Config) -> dict[str, Any]:
    """One row's numbers, with what is needed to compare them."""
    median = float(np.median(seconds))
    is_product = name.startswith("matrix product")
    return {
        "row": name,
        "median": median,
        "min": min(seconds),
        "max": max(seconds),
        "images_per_second": 0.0 if is_product else config.batch_size / median,
        "gflops": round(2e-9 * MATRIX**3 / median) if is_product else None,
        "batch_size": config.batch_size,
        "image_size": config.image_size,
        "device": jax.devices()[0].device_kind,
        "machine": platform.processor() or platform.machine(),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    cli.run(Config, main)
