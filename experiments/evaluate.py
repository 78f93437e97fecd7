"""Shows how well a network trained by train_mnist does: on its test set, or on your own images."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from absl import logging

from experiments import cli
from experiments.analysis import inspection
from experiments.cli import flag
from experiments.training import loop, trained


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
    run = trained.load(config.workdir, data_dir=config.data_dir)
    paths = config.images.split(",") if config.images else []
    if paths:
        images = trained.read_images(run, paths)
        lines = classification(paths, run.trainer.scores(run.params, images))
    else:
        evaluation = run.trainer.evaluate(run.params, run.test, batch_size=config.batch_size)
        lines = summary(evaluation, run.test.labels)
    logging.info("%s after %d steps on %s", config.workdir, run.step, run.dataset.name)
    for line in lines:
        print(line)
    return 0


def summary(evaluation: loop.Evaluation, labels: np.ndarray) -> Iterator[str]:
    """The lines about a test set: confusions, scores as probabilities, accuracies, test error."""
    counts = inspection.confusion(evaluation, labels)
    yield "confusion matrix (a row for each true class, a column for each predicted class)"
    names = [str(k) for k in range(len(counts))]
    cells = [[str(count) if count else "." for count in row] for row in counts]
    yield from cli.table(
        [["", *names], *([name, *row] for name, row in zip(names, cells, strict=True))]
    )
    yield ""
    yield from calibration(evaluation.scores, labels)
    yield ""
    yield from inspection.accuracy(evaluation, labels)


def calibration(scores: np.ndarray, labels: np.ndarray) -> Iterator[str]:
    """The lines that compare the highest scores, taken as probabilities, with what is right.

    Source: Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", section 2,
    https://arxiv.org/abs/1706.04599: expected calibration error, here in ten bins.

    Args:
      scores: `[N, K]` from 0 to 1: lengths of class capsules, or a CNN's probabilities.
      labels: The true classes `[N]`.
    """
    highest, right = scores.max(1), scores.argmax(1) == labels
    bins = np.minimum((10 * highest).astype(int), 9)
    rows, error = [["from", "to", "images", "mean", "right"]], 0.0
    for k in np.unique(bins):
        inside = bins == k
        mean, share = highest[inside].mean(), right[inside].mean()
        error += inside.mean() * abs(mean - share)
        cells = (f"{k / 10:.1f}", f"{(k + 1) / 10:.1f}", str(inside.sum()))
        rows.append([*cells, f"{mean:.3f}", f"{share:.3f}"])
    yield "the highest score as a probability: its mean, and the share of images that are right"
    yield from cli.table(rows)
    yield f"expected calibration error {error:.3f}"


def classification(paths: list[str], lengths: np.ndarray) -> Iterator[str]:
    """The lines about images: the class of each, its capsule's length, and all lengths."""
    rows = [["image", "class", "length", "|", *(str(k) for k in range(lengths.shape[1]))]]
    for path, row in zip(paths, lengths, strict=True):
        winner = row.argmax()
        rows.append([path, str(winner), f"{row[winner]:.3f}", "|", *(f"{x:.3f}" for x in row)])
    yield from cli.table(rows)


if __name__ == "__main__":
    cli.run(Config, main)
