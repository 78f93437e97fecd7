"""A look into a trained network: its errors on the test set in words, and the figures."""

import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from matplotlib.figure import Figure

import capsjax
from capsjax.models import CapsNet
from experiments import files
from experiments.data import datasets
from experiments.figures import classifier, routing
from experiments.training import loop, objectives, processes, records
from experiments.training.transforms import scaled

TWEAKS = tuple(np.linspace(-0.25, 0.25, 11).tolist())
SHOWN, ENTROPY_EXAMPLES = 12, 64
COUPLINGS = 2**22  # at most: a large layer's are fetched of fewer images; MNIST's 64 have half


def report(
    trainer: loop.Trainer,
    params: loop.Params,
    test: datasets.Split,
    workdir: records.StrPath,
    *,
    batch_size: int,
) -> None:
    """Logs test error and accuracy of each class, and draws every figure into the workdir.

    All processes must call it, since each may hold a part of the weights; process 0 writes.
    """
    evaluation = trainer.evaluate(params, test, batch_size=batch_size)
    for line in accuracy(evaluation, test.labels) if processes.is_lead() else ():
        logging.info("%s", line)
    folder = pathlib.Path(workdir) / "figures"
    draw(trainer, params, test, evaluation, records.read_metrics(workdir), folder)
    if processes.is_lead():
        logging.info("figures are in %s", folder)


def accuracy(evaluation: loop.Evaluation, labels: np.ndarray) -> Iterator[str]:
    """Says in a line each the accuracy of the classes that occur, then the test error."""
    counts = confusion(evaluation, labels)
    for label, row in enumerate(counts):
        if row.sum():
            yield f"class {label}: {100 * row[label] / row.sum():.2f} % of {row.sum()} right"
    wrong = len(labels) - np.trace(counts)
    yield f"test error {evaluation.error(labels):.2f} %: {wrong} of {len(labels)} wrong"


def confusion(evaluation: loop.Evaluation, labels: np.ndarray) -> np.ndarray:
    """Counts of test examples, int [true class, predicted class]."""
    num_classes = evaluation.scores.shape[1]
    counts = np.zeros((num_classes, num_classes), int)
    np.add.at(counts, (labels, evaluation.predictions), 1)
    return counts


def draw(
    trainer: loop.Trainer,
    params: loop.Params,
    test: datasets.Split,
    evaluation: loop.Evaluation,
    rows: list[dict[str, float]],
    folder: pathlib.Path,
) -> None:
    """Draws of capsules couplings, tweaks and reconstructions; confusions; and last the curves."""
    images, labels = test
    drawn = {
        "learning_curves": classifier.learning_curves(rows),
        "confusion_matrix": classifier.confusion_matrix(
            confusion(evaluation, labels),
            class_names=[str(k) for k in range(evaluation.scores.shape[1])],
        ),
        "misclassified": classifier.misclassified(
            images / np.float32(255), labels, evaluation.predictions, evaluation.scores
        ),
    }
    if routing.measured(rows):
        drawn["routing_diagnostics"] = routing.diagnostics(rows)
    if isinstance(trainer.network, CapsNet):
        drawn |= _capsule_figures(trainer, params, images[:ENTROPY_EXAMPLES], labels)
    for name, figure in reversed(drawn.items()) if processes.is_lead() else ():
        files.save_figure(figure, folder / f"{name}.png")


def _capsule_figures(
    trainer: loop.Trainer, params: loop.Params, images: np.ndarray, labels: np.ndarray
) -> dict[str, Figure]:
    objective, layer = trainer.objective, trainer.network.capsules
    children, _, parents, _ = layer.weights.shape
    count = max(1, COUPLINGS // (layer.num_iterations * children * parents))
    draws = (
        isinstance(objective, objectives.CapsuleClassification) and objective.reconstruction_weight
    )

    @trainer.jit
    def forward(params: loop.Params, images: jax.Array) -> dict[str, jax.Array]:
        model, images = trainer.model(params), scaled(images)
        capsules = model(images)
        found = {"couplings": model.capsules.couplings(model.primary_poses(images[:count]))}
        if draws:
            shown = capsules[:SHOWN]
            found["images"] = images[:SHOWN]
            found["reconstructions"] = model.reconstruct(shown)
            found["lengths"] = capsjax.lengths(shown)
            found["tweaks"] = tweaked(model, capsules[0])
        return found

    found = {name: np.asarray(array) for name, array in forward(params, images).items()}
    drawn = {}
    if draws:
        drawn["reconstructions"] = classifier.reconstructions(
            found["images"], found["reconstructions"], found["lengths"], labels[:SHOWN]
        )
        drawn["dimension_tweaks"] = classifier.dimension_tweaks(found["tweaks"], values=TWEAKS)
    drawn["couplings"] = classifier.couplings(found["couplings"][:, 0], label=int(labels[0]))
    drawn["coupling_entropy"] = classifier.coupling_entropy(found["couplings"])
    return drawn


def tweaked(model: CapsNet, capsules: jax.Array) -> jax.Array:
    """Draws one example with each dimension of its longest capsule moved, `[D, 11, H, W, C]`."""
    parents, depth = capsules.shape
    winner = jnp.argmax(capsjax.lengths(capsules))
    moves = jnp.einsum("k,de->dke", jnp.asarray(TWEAKS, capsules.dtype), jnp.eye(depth))
    moved = capsules[None, None] + (
        jax.nn.one_hot(winner, parents)[None, None, :, None] * moves[:, :, None, :]
    )
    return model.reconstruct(moved, jnp.full(moved.shape[:2], winner))
