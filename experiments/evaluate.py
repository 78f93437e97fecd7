"""Evaluate a network trained by train_mnist on its test set, or classify image files with it."""

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
    """The run to evaluate, and the images."""

    workdir: str = flag("runs/mnist", "Folder of a train_mnist run; it is only read.")
    images: str = flag(
        "", "Image files to classify, separated by commas; empty: evaluate the test set."
    )
    data_dir: str = flag("", "Folder of the data set's files; empty: the run's --data_dir.")
    batch_size: int = flag(128, "Test examples per forward pass.", minimum=1, maximum=2**20)


def main(config: Config) -> int:
    """Restore the newest checkpoint of the run, and print its evaluation."""
    paths = config.images.split(",") if config.images else []
    run = trained.load(config.workdir, data_dir=config.data_dir, with_data=not paths)
    if paths:
        images = trained.read_images(run, paths)
        lines = classification_lines(paths, run.trainer.scores(run.params, images))
    else:
        evaluation = run.trainer.evaluate(run.params, run.test, batch_size=config.batch_size)
        lines = summary_lines(evaluation, run.test.labels)
    logging.info("%s after %d steps on %s", config.workdir, run.step, run.dataset.name)
    for line in lines:
        print(line)
    return 0


def summary_lines(evaluation: loop.Evaluation, labels: np.ndarray) -> Iterator[str]:
    """Yield the lines about a test set: confusion matrix, calibration and accuracy."""
    counts = inspection.confusion_counts(evaluation, labels)
    yield "confusion matrix (rows: true class, columns: predicted class)"
    names = [str(k) for k in range(len(counts))]
    cells = [[str(count) if count else "." for count in row] for row in counts]
    yield from cli.table(
        [["", *names], *([name, *row] for name, row in zip(names, cells, strict=True))]
    )
    yield ""
    yield from calibration_lines(evaluation.scores, labels)
    yield ""
    yield from inspection.accuracy_lines(evaluation, labels)


def calibration_lines(scores: np.ndarray, labels: np.ndarray) -> Iterator[str]:
    """Yield a reliability table of the top score in ten bins, and the calibration error.

    Source: Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", section 2,
    "Expected Calibration Error", https://arxiv.org/abs/1706.04599.

    Args:
      scores: `[N, K]` in [0, 1]: lengths of class capsules, or a CNN's probabilities.
      labels: True classes, `[N]`.
    """
    confidence, correct = scores.max(1), scores.argmax(1) == labels
    bins = np.minimum((10 * confidence).astype(int), 9)
    rows, error = [["from", "to", "images", "score", "accuracy"]], 0.0
    for b in np.unique(bins):
        in_bin = bins == b
        mean, accuracy = confidence[in_bin].mean(), correct[in_bin].mean()
        error += in_bin.mean() * abs(mean - accuracy)
        cells = (f"{b / 10:.1f}", f"{(b + 1) / 10:.1f}", str(in_bin.sum()))
        rows.append([*cells, f"{mean:.3f}", f"{accuracy:.3f}"])
    yield "calibration: mean top score and accuracy of the images in each bin of the top score"
    yield from cli.table(rows)
    yield f"expected calibration error {error:.3f}"


def classification_lines(paths: list[str], scores: np.ndarray) -> Iterator[str]:
    """Yield a table with the predicted class, its score, and all scores `[N, K]` of N images."""
    rows = [["image", "class", "score", "|", *(str(k) for k in range(scores.shape[1]))]]
    for path, row in zip(paths, scores, strict=True):
        predicted = row.argmax()
        cells = [path, str(predicted), f"{row[predicted]:.3f}", "|"]
        rows.append([*cells, *(f"{x:.3f}" for x in row)])
    yield from cli.table(rows)


if __name__ == "__main__":
    cli.run(Config, main)
