"""Shows how well a network trained by train_mnist does: on its test set, or on your own images."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

import capsjax
from experiments import cli, data, inspection, records, train_mnist, training
from experiments.cli import flag
from experiments.errors import InputError


@dataclasses.dataclass(frozen=True)
class Config:
    """Which network to look at, and on what."""

    workdir: str = flag("runs/mnist", "Folder of a run of train_mnist; nothing is written to it.")
    images: str = flag(
        "", "Image files to classify, separated by commas; empty: evaluate on the test set."
    )
    data_dir: str = flag("", "Folder of the data set's files; empty: where the run had them.")
    batch_size: int = flag(128, "Test examples that pass through the network at a time.", minimum=1)


def main(config: Config) -> int:
    """Restores the run's newest checkpoint, and prints what its network says."""
    run = records.read_config(config.workdir)
    settings = trained_config(run["config"], config.workdir)
    dataset = data.load(settings.dataset, data_dir=config.data_dir or settings.data_dir)
    if dataset.sha256 != run["data_sha256"]:
        raise InputError(
            f"workdir {config.workdir} was trained on {settings.dataset} with sha256 "
            f"{run['data_sha256']}, but the data found have {dataset.sha256}; name the folder of "
            "the run's data with --data_dir"
        )
    paths = config.images.split(",") if config.images else []
    if paths:
        size, _, channels = dataset.train.images.shape[1:]
        images = data.read_images(paths, image_size=size, channels=channels)
    trainer = train_mnist.build(settings, dataset)
    with records.Checkpoints(config.workdir) as checkpoints:
        restored = checkpoints.restore(trainer.initial_state(settings.seed))
    if restored is None:
        raise InputError(f"workdir {config.workdir} has no checkpoint yet; let it train further")
    step, state = restored
    logging.info("the network of %s after %d steps on %s", config.workdir, step, dataset.name)
    if paths:
        lines = classification(paths, classify(trainer.model(state.params), images))
    else:
        evaluation = trainer.evaluate(state.params, dataset.test, batch_size=config.batch_size)
        lines = summary(evaluation, dataset.test.labels)
    for line in lines:
        print(line)
    return 0


def trained_config(settings: dict[str, Any], workdir: str) -> train_mnist.Config:
    """The Config of a run, from the settings in its config.json.

    Raises:
      InputError: They are not those of train_mnist, or one has a value that is not allowed.
    """
    fields = {field.name for field in dataclasses.fields(train_mnist.Config)}
    for names, problem in (
        (fields - settings.keys(), "lacks"),
        (settings.keys() - fields, "has the unknown"),
    ):
        if names:
            raise InputError(
                f"workdir {workdir} holds a run of another program or version: its config.json "
                f"{problem} {', '.join(sorted(names))}"
            )
    config = train_mnist.Config(**settings)
    try:
        cli.validate(config)
    except InputError as error:
        raise InputError(f"workdir {workdir} has a damaged config.json: {error}") from error
    return config


def classify(model: training.CapsNet, images: np.ndarray) -> np.ndarray:
    """The lengths of the class capsules, float32 [N, J], for images in 0 … 1."""
    return np.asarray(capsjax.lengths(jax.jit(model)(jnp.asarray(images))), np.float32)


def summary(evaluation: training.Evaluation, labels: np.ndarray) -> Iterator[str]:
    """The lines about a test set: confusion matrix, accuracy of each class, and test error."""
    counts = inspection.confusion(evaluation, labels)
    yield "confusion matrix (a row for each true class, a column for each predicted class)"
    names = [str(k) for k in range(len(counts))]
    cells = [[str(count) if count else "." for count in row] for row in counts]
    yield from table(
        [["", *names], *([name, *row] for name, row in zip(names, cells, strict=True))]
    )
    yield ""
    yield from inspection.accuracy(evaluation, labels)


def classification(paths: list[str], lengths: np.ndarray) -> Iterator[str]:
    """The lines about images: the class of each, its capsule's length, and all lengths."""
    rows = [["image", "class", "length", "|", *(str(k) for k in range(lengths.shape[1]))]]
    for path, row in zip(paths, lengths, strict=True):
        winner = row.argmax()
        rows.append([path, str(winner), f"{row[winner]:.3f}", "|", *(f"{x:.3f}" for x in row)])
    yield from table(rows)


def table(rows: list[list[str]]) -> Iterator[str]:
    """The rows as lines, with their columns aligned on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


if __name__ == "__main__":
    cli.run(Config, main)
