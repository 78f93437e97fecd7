"""Trains the capsule network of "Dynamic Routing Between Capsules" on MNIST and its kin."""

import dataclasses

from absl import logging

from experiments import (
    cli,
    data,
    diagnostics,
    inspection,
    networks,
    objectives,
    processes,
    records,
    routing_figures,
    runs,
    training,
)
from experiments.cli import flag
from experiments.errors import InputError


@dataclasses.dataclass(frozen=True)
class Config(networks.Settings, runs.Settings):
    """All settings; the defaults are the paper's network, recipe and data."""

    reconstruction_weight: float = flag(5e-4, "Of squared errors; 0: no decoder.", minimum=0)
    shift: int = flag(2, "Training images move by up to so many pixels.", minimum=0)
    canvas: int = flag(
        0, "Side of a black square on which images lie at random, pixels; 0: none.", minimum=0
    )
    diagnostics: bool = flag(
        False, "Measure the routing after each epoch, and draw it.", affects_result=False
    )


def build(config: Config, dataset: data.Dataset) -> training.Trainer:
    """The network of a Config for a data set, ready to train.

    Raises:
      InputError: The images are too small for the network or the shift or too large for the canvas,
        or the batch is larger than the data.
    """
    num_steps = runs.num_steps(config, dataset.train)
    side, _, channels = dataset.train.images.shape[1:]
    if config.shift >= side:
        raise InputError(
            f"--shift must be less than the {side} pixels of the images, got {config.shift}"
        )
    if config.canvas and config.canvas < side:
        raise InputError(
            f"--canvas must be 0 or at least the {side} pixels of the images, got {config.canvas}"
        )
    side = config.canvas or side
    model = networks.build(config, (side, side, channels), dataset.num_classes, seed=config.seed)
    moves = (dataset.num_classes, config.shift, config.canvas)
    objective: objectives.Objective = (
        objectives.CapsuleClassification(*moves, config.reconstruction_weight)
        if config.network == "capsnet"
        else objectives.SoftmaxClassification(*moves)
    )
    optimizer = training.adam(
        config.learning_rate,
        final_learning_rate=config.final_learning_rate,
        num_steps=num_steps,
    )
    return training.Trainer(model, objective, optimizer)


def test_split(config: Config, dataset: data.Dataset) -> data.Split:
    """The test images as the network of a Config sees them: on the canvas, if there is one."""
    return data.placed(dataset.test, config.canvas) if config.canvas else dataset.test


def main(config: Config) -> int:
    """Trains from the workdir's newest checkpoint to the end, and draws the figures."""
    return train(config, runs.prepare(config))


def train(config: Config, dataset: data.Dataset) -> int:
    """What `main` does, for a data set that is loaded; returns the exit status."""
    trainer = build(config, dataset)
    test = test_split(config, dataset)
    status, params = runs.train(
        config,
        trainer,
        dataset.train,
        test,
        data_sha256=dataset.sha256,
        extra_metrics=(
            diagnostics.measurement(trainer, dataset.train) if config.diagnostics else None
        ),
    )
    if not status and processes.is_lead():
        inspection.report(trainer, params, test, config.workdir, batch_size=config.batch_size)
        if config.diagnostics and not routing_figures.measured(
            records.read_metrics(config.workdir)
        ):
            logging.warning(
                "--diagnostics: %s was trained to its end without them; for a run with them use "
                "another --workdir",
                config.workdir,
            )
    return status


if __name__ == "__main__":
    cli.run(Config, main)
