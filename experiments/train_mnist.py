"""Trains the capsule network of "Dynamic Routing Between Capsules" on MNIST and its kin."""

import dataclasses
import signal

import jax.numpy as jnp
from absl import logging
from flax import nnx

from capsjax.models import CapsNet
from experiments import cli, data, inspection, records, signals, training
from experiments.cli import flag
from experiments.display import Display
from experiments.errors import InputError


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings; the defaults are the paper's network, recipe and data."""

    dataset: str = flag("mnist", "mnist_small, mnist, fashion_mnist or tfds:<name>.")
    data_dir: str = flag("", "Folder of its files; empty: the usual caches.", affects_result=False)
    download: bool = flag(False, "Fetch a missing data set with TFDS.", affects_result=False)
    workdir: str = flag("runs/mnist", "Folder of all that is written.", affects_result=False)
    batch_size: int = flag(128, "Examples in one step.", minimum=1)
    num_epochs: int = flag(50, "Passes over the training data.", minimum=1)
    max_steps: int = flag(0, "Stop after these; 0: at the end.", minimum=0, affects_result=False)
    learning_rate: float = flag(1e-3, "Adam's step size at the start.", above=0)
    final_learning_rate: float = flag(1e-4, "Adam's step size after num_epochs.", above=0)
    num_iterations: int = flag(3, "Routing iterations.", minimum=1)
    gradient: str = flag("full", "Through all iterations, or the last.", choices=("full", "last"))
    reconstruction_weight: float = flag(5e-4, "Of squared errors; 0: no decoder.", minimum=0)
    shift: int = flag(2, "Training images move by up to so many pixels.", minimum=0)
    conv_channels: int = flag(256, "Channels of the first convolution.", minimum=1)
    primary_types: int = flag(32, "Primary capsules at one position.", minimum=1)
    primary_scale: float = flag(1.0, "Factor on the primary capsules' convolution.", above=0)
    capsule_length: int = flag(16, "Dimensions of a class capsule.", minimum=1)
    capsule_bias: float = flag(0.0, "Start of the capsules' biases; 0: class capsules have none.")
    seed: int = flag(0, "Of parameters, order and shifts.", minimum=0, maximum=2**32 - 1)
    dtype: str = flag("float32", "Of the computation.", choices=("float32", "bfloat16"))
    implementation: str = flag(
        "auto", "Of the routing; auto: the platform's best.", choices=("auto", "xla", "reference")
    )
    log_every_steps: int = flag(50, "Steps between rows of metrics.", minimum=1)
    checkpoint_every_steps: int = flag(
        500, "Steps between checkpoints.", minimum=1, affects_result=False
    )
    tensorboard: bool = flag(False, "Write TensorBoard files too.", affects_result=False)
    compilation_cache: str = flag("", "Folder of compiled programs.", affects_result=False)


def build(config: Config, dataset: data.Dataset) -> training.Trainer:
    """The network of a Config for a data set, ready to train.

    Raises:
      InputError: The images are too small, or the batch is larger than the data.
    """
    if config.batch_size > len(dataset.train.labels):
        raise InputError(
            f"--batch_size must be at most the {len(dataset.train.labels)} training examples of "
            f"{dataset.name}, got {config.batch_size}"
        )
    try:
        model = CapsNet(
            dataset.train.images.shape[1:],
            dataset.num_classes,
            conv_channels=config.conv_channels,
            primary_types=config.primary_types,
            primary_scale=config.primary_scale,
            capsule_length=config.capsule_length,
            capsule_bias=config.capsule_bias or None,
            num_iterations=config.num_iterations,
            gradient=config.gradient,
            implementation=None if config.implementation == "auto" else config.implementation,
            dtype=jnp.dtype(config.dtype),
            rngs=nnx.Rngs(config.seed),
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    return training.Trainer(
        model,
        training.Objective(dataset.num_classes, config.reconstruction_weight, config.shift),
        training.adam(
            config.learning_rate,
            final_learning_rate=config.final_learning_rate,
            num_steps=num_steps(config, dataset),
        ),
    )


def num_steps(config: Config, dataset: data.Dataset) -> int:
    """The steps of all epochs."""
    return config.num_epochs * (len(dataset.train.labels) // config.batch_size)


def main(config: Config) -> int:
    """Trains from the workdir's newest checkpoint to the end, and draws the figures."""
    if config.compilation_cache:
        training.keep_compiled(config.compilation_cache)
    dataset = data.load(config.dataset, data_dir=config.data_dir, download=config.download)
    trainer = build(config, dataset)
    workdir = records.open_workdir(config.workdir, config=config, data_sha256=dataset.sha256)
    last_step = num_steps(config, dataset)
    if config.max_steps:
        last_step = min(last_step, config.max_steps)
    with (
        records.exclusive(workdir),
        records.Checkpoints(workdir) as checkpoints,
        signals.stop_requests() as stopped,
    ):
        start = trainer.initial_state(config.seed)
        step, state = first_step, start = checkpoints.restore(start) or (0, start)
        if step:
            logging.info("going on from step %d of %d in %s", step, last_step, workdir)
        with (
            records.Metrics(workdir, step=first_step, tensorboard=config.tensorboard) as metrics,
            Display(first_step=first_step, last_step=last_step) as display,
        ):
            for step, state, row in training.train(
                trainer,
                start,
                dataset,
                batch_size=config.batch_size,
                last_step=last_step,
                log_every_steps=config.log_every_steps,
                seed=config.seed,
                stopped=stopped,
            ):
                if row is not None:
                    metrics.write(row)
                display.update(step, row)
                if step % config.checkpoint_every_steps == 0:
                    training.check_finite(state.window)
                    checkpoints.save(step, state)
        training.check_finite(state.window)
        checkpoints.save(step, state)
        if stopped():
            name = signal.Signals(stopped()).name
            logging.info("%s: saved at step %d; the same --workdir goes on from there", name, step)
            return 128 + stopped()
    inspection.report(trainer, state.params, dataset, workdir, batch_size=config.batch_size)
    return 0


if __name__ == "__main__":
    cli.run(Config, main)
