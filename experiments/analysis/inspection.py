"""Test accuracy and figures of a trained classifier.

Shape letters: K classes; D dimensions of a class capsule; V tweaks of a dimension; H, W, C height,
width and channels of an image.
"""

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

TWEAKS = tuple(np.linspace(-0.25, 0.25, 11).tolist())  # values added to one dimension of a capsule
SHOWN_EXAMPLES, ENTROPY_EXAMPLES = 12, 64
MAX_COUPLINGS = 2**22  # couplings fetched for figures; 64 images of MNIST's network have half of it


def report(
    trainer: loop.Trainer,
    params: loop.Params,
    test: datasets.Split,
    workdir: records.StrPath,
    *,
    batch_size: int,
) -> None:
    """Log the test accuracy, and write all figures into the workdir's `figures` folder.

    Every process must call it, since each may hold a shard of the weights; process 0 writes.
    """
    evaluation = trainer.evaluate(params, test, batch_size=batch_size)
    for line in accuracy_lines(evaluation, test.labels) if processes.is_lead() else ():
        logging.info("%s", line)
    folder = pathlib.Path(workdir) / "figures"
    draw_figures(trainer, params, test, evaluation, records.read_metrics(workdir), folder)
    if processes.is_lead():
        logging.info("figures are in %s", folder)


def accuracy_lines(evaluation: loop.Evaluation, labels: np.ndarray) -> Iterator[str]:
    """Yield a line with the accuracy of each class that occurs, then one with the test error."""
    counts = confusion_counts(evaluation, labels)
    for label, row in enumerate(counts):
        if row.sum():
            yield f"class {label}: {100 * row[label] / row.sum():.2f} % of {row.sum()} correct"
    wrong = len(labels) - np.trace(counts)
    yield f"test error {evaluation.error(labels):.2f} %: {wrong} of {len(labels)} wrong"


def confusion_counts(evaluation: loop.Evaluation, labels: np.ndarray) -> np.ndarray:
    """Count test examples by true and predicted class, int `[K, K]`."""
    num_classes = evaluation.scores.shape[1]
    counts = np.zeros((num_classes, num_classes), int)
    np.add.at(counts, (labels, evaluation.predictions), 1)
    return counts


def draw_figures(
    trainer: loop.Trainer,
    params: loop.Params,
    test: datasets.Split,
    evaluation: loop.Evaluation,
    rows: list[dict[str, float]],
    folder: pathlib.Path,
) -> None:
    """Write the figures of a trained network as PNG files.

    `evaluation` is of the test set, `rows` are those of `metrics.jsonl`. `learning_curves.png` is
    written last, so that its existence means that all figures are complete.
    """
    images, labels = test
    figures = {
        "learning_curves": classifier.learning_curves(rows),
        "confusion_matrix": classifier.confusion_matrix(
            confusion_counts(evaluation, labels),
            class_names=[str(k) for k in range(evaluation.scores.shape[1])],
        ),
        "misclassified": classifier.misclassified(
            images / np.float32(255), labels, evaluation.predictions, evaluation.scores
        ),
    }
    if routing.with_diagnostics(rows):
        figures["routing_diagnostics"] = routing.diagnostics(rows)
    if isinstance(trainer.network, CapsNet):
        figures |= _capsule_figures(trainer, params, images[:ENTROPY_EXAMPLES], labels)
    for name, figure in reversed(figures.items()) if processes.is_lead() else ():
        files.save_figure(figure, folder / f"{name}.png")


def _capsule_figures(
    trainer: loop.Trainer, params: loop.Params, images: np.ndarray, labels: np.ndarray
) -> dict[str, Figure]:
    """Draw reconstructions and tweaks (with a decoder), couplings and their entropy, by name."""
    objective, layer = trainer.objective, trainer.network.capsules
    children, _, parents, _ = layer.weights.shape
    count = max(1, MAX_COUPLINGS // (layer.routing.num_iterations * children * parents))
    has_decoder = (
        isinstance(objective, objectives.CapsuleClassification) and objective.reconstruction_weight
    )

    @trainer.jit
    def forward(params: loop.Params, images: jax.Array) -> dict[str, jax.Array]:
        model, images = trainer.model(params), scaled(images)
        seen = objective.inputs(images)
        capsules = model(seen)
        arrays = {"couplings": model.capsules.couplings(model.primary_poses(seen[:count]))}
        if has_decoder:
            shown = capsules[:SHOWN_EXAMPLES]
            arrays["images"] = images[:SHOWN_EXAMPLES]
            arrays["reconstructions"] = model.reconstruct(shown)
            arrays["lengths"] = capsjax.lengths(shown)
            arrays["tweaks"] = tweak_dimensions(model, capsules[0])
        return arrays

    arrays = {name: np.asarray(array) for name, array in forward(params, images).items()}
    figures = {}
    if has_decoder:
        figures["reconstructions"] = classifier.reconstructions(
            arrays["images"], arrays["reconstructions"], arrays["lengths"], labels[:SHOWN_EXAMPLES]
        )
        figures["dimension_tweaks"] = classifier.dimension_tweaks(arrays["tweaks"], values=TWEAKS)
    figures["couplings"] = classifier.couplings(arrays["couplings"][:, 0], label=int(labels[0]))
    figures["coupling_entropy"] = classifier.coupling_entropy(arrays["couplings"])
    return figures


def tweak_dimensions(model: CapsNet, capsules: jax.Array) -> jax.Array:
    """Reconstruct one example with `TWEAKS` added to each dimension of its longest class capsule.

    Args:
      model: A network with a decoder.
      capsules: Class capsules of the example, `[K, D]`.

    Returns:
      Reconstructions `[D, V, H, W, C]` in [0, 1].
    """
    num_classes, depth = capsules.shape
    predicted = jnp.argmax(capsjax.lengths(capsules))
    tweaks = jnp.einsum("v,de->dve", jnp.asarray(TWEAKS, capsules.dtype), jnp.eye(depth))
    tweaked = capsules[None, None] + (
        jax.nn.one_hot(predicted, num_classes)[None, None, :, None] * tweaks[:, :, None, :]
    )
    return model.reconstruct(tweaked, jnp.full(tweaked.shape[:2], predicted))
