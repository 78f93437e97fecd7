"""Write the capsule network of a run as one safetensors file, and as a program for any device.

`capsjax.models.load` reads network.safetensors. network.jax_export is a `jax.export` program for a
batch of any size on CPU, CUDA and TPU, which needs none of the network's code. The run's data are
not needed.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

import capsjax
from capsjax import models
from capsjax.models.saved import FILE_NAME
from experiments import cli, files
from experiments.cli import flag
from experiments.errors import InputError
from experiments.training import mnist, trained

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM = "network.jax_export"


@dataclasses.dataclass(frozen=True)
class Config:
    """The run and the output."""

    workdir: str = flag(
        "runs/mnist", "Folder of a train_mnist run, or a safetensors file, with a CapsNet."
    )
    output: str = flag("", "Folder of both files; empty: the workdir, or the folder of the file.")


def main(config: Config) -> int:
    """Restore the newest checkpoint of the run, and write both files."""
    run = trained.load(config.workdir, with_data=False)
    if not isinstance(run.model, models.CapsNet):
        raise InputError(f"workdir {config.workdir} holds a {run.config.network}, no CapsNet")
    workdir = pathlib.Path(config.workdir)
    output = pathlib.Path(config.output or (workdir.parent if workdir.is_file() else workdir))
    with files.writing(output):
        output.mkdir(parents=True, exist_ok=True)
        models.save(run.model, output / FILE_NAME)
    has_decoder = bool(run.config.reconstruction_weight)
    inputs = run.trainer.objective.inputs
    files.write_bytes(output / PROGRAM, export(run.model, inputs, has_decoder=has_decoder))
    for line in input_lines(run.config):
        logging.info("%s", line)
    for name in (FILE_NAME, PROGRAM):
        logging.info("%s: %.1f MiB", output / name, (output / name).stat().st_size / 2**20)
    return 0


def input_lines(config: mnist.Config) -> Iterator[str]:
    """Yield what must be done to images before both files take them, as the run's tests do it."""
    if config.crop:
        yield (
            f"--crop={config.crop}: both files take the central {config.crop} x {config.crop} "
            f"pixels of the images of {config.dataset}"
        )
    if config.standardize:
        yield (
            f"--standardize: {PROGRAM} takes images in 0 ... 1 and gives each mean 0 and variance "
            f"1 over its pixels and channels; the network of {FILE_NAME} takes images on which "
            "this was done"
        )


def export(model: Any, inputs: Callable[[jax.Array], jax.Array], *, has_decoder: bool) -> bytes:
    """Return a program of a `CapsNet` from images `[B, H, W, C]` in [0, 1] to a dict of arrays.

    `inputs` maps the images to what the network takes. The keys are capsules
    `[B, J, D]` and lengths `[B, J]`; with a decoder that was trained, also reconstructions
    `[B, H, W, C]` from the longest capsules.
    """

    def network(images: jax.Array) -> dict[str, Any]:
        capsules = model(inputs(images))
        found = {"capsules": capsules, "lengths": capsjax.lengths(capsules)}
        return found | ({"reconstructions": model.reconstruct(capsules)} if has_decoder else {})

    (batch,) = jax.export.symbolic_shape("b")
    shape = (batch, *dict(model.arguments)["image_shape"])
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    # A call of Pallas-Triton, for which JAX promises no stability; it needs the same jaxlib.
    check = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    exported = jax.export.export(jax.jit(network), platforms=PLATFORMS, disabled_checks=[check])
    return bytes(exported(images).serialize())


if __name__ == "__main__":
    cli.run(Config, main)
