"""Trains a capsule network, or a control, on pairs of overlapping MNIST digits."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from matplotlib.figure import Figure

from capsjax.models import CapsNet
from experiments import (
    cli,
    data,
    figures,
    multimnist,
    networks,
    objectives,
    overlap_figures,
    processes,
    records,
    runs,
    training,
)
from experiments.cli import flag
from experiments.transforms import scaled

TEST_SEED = 2017  # the test set is the same in every run, whatever --seed
SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Config(networks.Settings, runs.Settings):
    """All settings; the defaults are the paper's network and recipe."""

    workdir: str = flag("runs/multimnist", "Folder of all that is written.", affects_result=False)
    train_size: int = flag(
        60_000_000,
        "Training pairs: the i-th digit, over and over, with others.",
        minimum=1,
        maximum=200_000_000,  # their order is held in memory, by 12 bytes each
    )
    num_epochs: int = flag(1, "Passes over the training pairs.", minimum=1)
    test_size: int = flag(10_000, "Test pairs.", minimum=1)
    reconstruction_weight: float = flag(5e-4, "Of squared errors; 0: no decoder.", minimum=0)


def examples(
    config: Config, dataset: data.Dataset
) -> tuple[multimnist.OverlaidDigits, multimnist.OverlaidDigits]:
    """The pairs to train on and to test on."""
    return (
        multimnist.OverlaidDigits(dataset.train, config.train_size, config.seed),
        multimnist.OverlaidDigits(dataset.test, config.test_size, TEST_SEED),
    )


def build(config: Config, dataset: data.Dataset) -> training.Trainer:
    """The network of a Config for pairs of a data set's digits, ready to train.

    Raises:
      InputError: The images are too small for the network, or the batch is larger than the data.
    """
    pairs, _ = examples(config, dataset)
    num_steps = runs.num_steps(config, pairs)
    side, _, channels = dataset.train.images.shape[1:]
    side += 2 * multimnist.SHIFT
    model = networks.build(config, (side, side, channels), dataset.num_classes, seed=config.seed)
    objective: objectives.Objective = (
        objectives.OverlaidCapsules(dataset.num_classes, config.reconstruction_weight)
        if config.network == "capsnet"
        else objectives.OverlaidSigmoids(dataset.num_classes)
    )
    optimizer = training.adam(
        config.learning_rate, final_learning_rate=config.final_learning_rate, num_steps=num_steps
    )
    return training.Trainer(model, objective, optimizer)


def main(config: Config) -> int:
    """Trains from the workdir's newest checkpoint to the end, says both errors, and draws."""
    dataset = runs.prepare(config)
    trainer = build(config, dataset)
    train_pairs, test_pairs = examples(config, dataset)
    status, params = runs.train(
        config, trainer, train_pairs, test_pairs, data_sha256=dataset.sha256
    )
    if status or not processes.is_lead():
        return status
    rows = records.read_metrics(config.workdir)
    last = rows[-1]
    logging.info(
        "test error: %.2f %% of %d images (both digits right), %.2f %% of digits",
        *(last["test_error"], test_pairs.size, last["test_error_per_digit"]),
    )
    drawn = {"learning_curves": figures.learning_curves(rows)}
    model = trainer.model(params)
    if isinstance(model, CapsNet) and config.reconstruction_weight:
        layers, labels = test_pairs.take(np.arange(min(SHOWN, test_pairs.size)))
        drawn["overlaps"] = overlaps(model, scaled(jnp.asarray(layers)), labels)
    for name, figure in drawn.items():
        records.save_figure(figure, pathlib.Path(config.workdir) / "figures" / f"{name}.png")
    return 0


def overlaps(model: CapsNet, layers: jax.Array, labels: np.ndarray) -> Figure:
    """Draws pairs `[N, 2, H, W, C]` and what the two longest capsules make of them."""
    images = objectives.overlay(layers)
    capsules = model(images)
    lengths, predicted = jax.lax.top_k(jnp.linalg.norm(capsules, axis=-1), 2)
    both = jnp.broadcast_to(capsules[:, None], (*predicted.shape, *capsules.shape[1:]))
    return overlap_figures.overlaps(
        np.asarray(layers),
        np.asarray(model.reconstruct(both, predicted)),
        labels=labels,
        predicted=np.asarray(predicted),
        lengths=np.asarray(lengths),
    )


if __name__ == "__main__":
    cli.run(Config, main)
