"""Evaluate a network trained by train_mnist on its test set, or classify image files with it."""

import dataclasses
import itertools
import os
import textwrap
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging
from matplotlib.figure import Figure

from experiments import cli
from experiments.analysis import inspection
from experiments.cli import flag
from experiments.errors import InputError
from experiments.training import loop, mnist, trained

_MARGIN = 0.2  # between the two highest scores; a smaller one is marked as doubtful


@dataclasses.dataclass(frozen=True)
class Config:
    """The run to evaluate, and the images."""

    workdir: str = flag(
        "runs/mnist",
        "Folder of a train_mnist run, or, for --images, a safetensors file of a CapsNet; it is "
        "only read.",
    )
    images: str = flag(
        "", "Image files to classify, separated by commas; empty: evaluate the test set."
    )
    figure: str = flag(
        "", "PNG, SVG or PDF file for a figure of what the network saw of --images; empty: none."
    )
    data_dir: str = flag("", "Folder of the data set's files; empty: the run's --data_dir.")
    batch_size: int = flag(128, "Test examples per forward pass.", minimum=1, maximum=2**20)


def main(config: Config) -> int:
    """Restore the newest checkpoint of the run, and print its evaluation."""
    paths = config.images.split(",") if config.images else []
    if config.figure and not paths:
        raise InputError("--figure shows image files: name them with --images")
    run = trained.load(config.workdir, data_dir=config.data_dir, with_data=not paths)
    names = run.dataset.class_names
    if paths:
        images, doubts = trained.read_pictures(run, paths)
        scores = run.trainer.scores(run.params, images)
        doubts = [
            "; ".join(filter(None, (doubt, margin_doubt(row, names))))
            for doubt, row in zip(doubts, scores, strict=True)
        ]
        lines = classification_lines(paths, scores, class_names=names, doubts=doubts)
        if config.figure:
            draw(config.figure, paths, images, scores, class_names=names, doubts=doubts)
    else:
        evaluation = run.trainer.evaluate(run.params, run.test, batch_size=config.batch_size)
        lines = itertools.chain(
            summary_lines(evaluation, run.test.labels, class_names=names),
            viewpoint_lines(run, evaluation, batch_size=config.batch_size),
        )
    if run.step is None:
        logging.info("%s, a file of weights", config.workdir)
    else:
        logging.info("%s after %d steps on %s", config.workdir, run.step, run.dataset.name)
    for line in lines:
        print(line)
    return 0


def summary_lines(
    evaluation: loop.Evaluation, labels: np.ndarray, *, class_names: Sequence[str] = ()
) -> Iterator[str]:
    """Yield the lines about a test set: confusion matrix, calibration and accuracy."""
    counts = inspection.confusion_counts(evaluation, labels)
    yield "confusion matrix (rows: true class, columns: predicted class)"
    names = class_names or [str(k) for k in range(len(counts))]
    cells = [[str(count) if count else "." for count in row] for row in counts]
    yield from cli.table(
        [["", *names], *([name, *row] for name, row in zip(names, cells, strict=True))]
    )
    yield ""
    yield from calibration_lines(evaluation.scores, labels)
    yield ""
    yield from inspection.accuracy_lines(evaluation, labels)


def viewpoint_lines(
    run: trained.Trained, evaluation: loop.Evaluation, *, batch_size: int
) -> Iterator[str]:
    """Yield the test errors of novel viewpoints and of those of training, if they are separate.

    `evaluation` is of the novel ones, the run's test images.
    """
    if run.dataset.familiar is None:
        return
    dataset = dataclasses.replace(run.dataset, test=run.dataset.familiar)
    familiar = mnist.test_split(run.config, dataset)
    before = run.trainer.evaluate(run.params, familiar, batch_size=batch_size)
    for name, found, split in (("novel", evaluation, run.test), ("familiar", before, familiar)):
        error = f"test error {found.error(split.labels):.2f} % of {split.size}"
        yield f"{name} viewpoints ({run.config.viewpoints}): {error}"


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


def classification_lines(
    paths: Sequence[str],
    scores: np.ndarray,
    *,
    class_names: Sequence[str] = (),
    doubts: Sequence[str] = (),
) -> Iterator[str]:
    """Yield a table with the predicted class, its score, and all scores `[N, K]` of N images.

    Below it, a line for each image with a doubt.
    """
    names = class_names or [str(k) for k in range(scores.shape[1])]
    rows = [["image", "class", "score", "|", *names]]
    for path, row in zip(paths, scores, strict=True):
        predicted = row.argmax()
        cells = [path, names[predicted], f"{row[predicted]:.3f}", "|"]
        rows.append([*cells, *(f"{x:.3f}" for x in row)])
    yield from cli.table(rows)
    for path, doubt in zip(paths, doubts, strict=False):
        if doubt:
            yield f"doubtful: {path}: {doubt}"


def margin_doubt(scores: np.ndarray, class_names: Sequence[str]) -> str:
    """Say that the two highest of K scores are close; empty if they are not."""
    second, first = np.argsort(scores)[-2:]
    if scores[first] - scores[second] >= _MARGIN:
        return ""
    names = class_names or [str(k) for k in range(len(scores))]
    values = f"{scores[first]:.2f} and {scores[second]:.2f}"
    return f"{names[first]} or {names[second]}, with scores {values}"


def draw(
    path: str,
    titles: Sequence[str],
    images: np.ndarray,
    scores: np.ndarray,
    *,
    class_names: Sequence[str],
    doubts: Sequence[str],
) -> None:
    """Draw what the network saw of each file, with class and score; doubtful ones in red."""
    names = class_names or [str(k) for k in range(scores.shape[1])]
    columns = min(5, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.4 * columns, 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, title, image, row, doubt in zip(axes, titles, images, scores, doubts, strict=False):
        axis.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0)
        text = f"{names[row.argmax()]}   {row.max():.2f}"
        name = textwrap.shorten(os.path.basename(title), 30, placeholder="…")
        label = [textwrap.fill(name, 26), text, *([textwrap.fill(doubt, 26)] if doubt else [])]
        axis.set_title("\n".join(label), fontsize=9, color="firebrick" if doubt else "black")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(f"--figure={path} cannot be written: {error}") from error


if __name__ == "__main__":
    cli.run(Config, main)
