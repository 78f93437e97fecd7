"""Objectives of training: augmentation, loss, scores and errors of a task.

Shape letters are those of `capsjax.shapes`; K is the number of classes.
"""

import dataclasses
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import capsjax
from experiments.training.transforms import Augmentation, AxisName


class Objective(Protocol):
    """The interface of an objective, used by `loop.Trainer`. Images are scaled to 0 … 1.

    `axis_name` names the mesh axes over which the batch is sharded, or is None. The random numbers
    drawn for an example do not depend on it.
    """

    def augment(self, images: Array, key: Array, *, axis_name: AxisName = None) -> Array:
        """Augment training images `[B, H, W, C]` at random."""

    def inputs(self, images: Array) -> Array:
        """Return images as a network takes them outside of training."""

    def at_step(self, step: Array) -> "Objective":
        """Return the objective of a training step; `step` counts those before it."""

    def loss(
        self,
        model: Any,
        images: Array,
        labels: Array,
        key: Array | None,
        *,
        axis_name: AxisName = None,
    ) -> tuple[Array, Array]:
        """Return the loss of each example `[B]`, and the scores of the classes `[B, K]`.

        The key is that of a training step. In a test it is None: then there is no dropout, and
        the scores must not depend on the labels.
        """

    def scores(self, model: Any, images: Array) -> Array:
        """Return the scores of the classes `[B, K]`, from 0 to 1."""

    def errors(self, scores: Array, labels: Array) -> Array:
        """Return whether each example is misclassified, bool `[B]`."""

    def test_metrics(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return the metrics of a whole test set, among them `test_error` in percent."""


@dataclasses.dataclass(frozen=True)
class Classification:
    """Classification of images with one class each; subclasses add loss and scores."""

    num_classes: int
    augmentation: Augmentation

    def augment(self, images: Array, key: Array, *, axis_name: AxisName = None) -> Array:
        """Move images at random."""
        return self.augmentation(images, key, axis_name=axis_name)

    def inputs(
        self, images: Array, key: Array | None = None, *, axis_name: AxisName = None
    ) -> Array:
        """Return images as the network takes them; with the key of a step, with jitter."""
        return self.augmentation.inputs(images, key, axis_name=axis_name)

    def at_step(self, step: Array) -> Self:
        """Return this objective, which is the same at all steps."""
        del step
        return self

    def errors(self, scores: Array, labels: Array) -> Array:
        """Return whether the label is not the class of the highest score."""
        return jnp.argmax(scores, axis=1) != labels

    def test_metrics(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return the percentage of misclassified images, as `test_error`."""
        return {"test_error": 100 * float(np.mean(scores.argmax(axis=1) != labels))}


@dataclasses.dataclass(frozen=True)
class CapsuleClassification(Classification):
    """Margin loss of capsule lengths, with reconstruction as a regulariser."""

    reconstruction_weight: float
    batch_statistics: bool = False  # whether the network normalises by the batch in training

    def loss(
        self,
        model: Any,
        images: Array,
        labels: Array,
        key: Array | None,
        *,
        axis_name: AxisName = None,
    ) -> tuple[Array, Array]:
        """Add margin loss and reconstruction loss.

        In training, the decoder reconstructs from the capsule of the true class, so that it learns
        before the classes do; in a test, from the longest capsule.
        """
        training = {"training": key is not None} if self.batch_statistics else {}
        capsules = model(self.inputs(images, key, axis_name=axis_name), **training)
        lengths = capsjax.lengths(capsules).astype(jnp.float32)
        loss = capsjax.margin_loss(lengths, jax.nn.one_hot(labels, self.num_classes))
        if self.reconstruction_weight:
            drawn = model.reconstruct(capsules, None if key is None else labels)
            drawn = drawn.astype(jnp.float32)
            loss += capsjax.reconstruction_loss(drawn, images, weight=self.reconstruction_weight)
        return loss, lengths

    def scores(self, model: Any, images: Array) -> Array:
        """Return the lengths of the class capsules."""
        return capsjax.lengths(model(self.inputs(images))).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class SoftmaxClassification(Classification):
    """Softmax cross-entropy of a CNN's logits."""

    def loss(
        self,
        model: Any,
        images: Array,
        labels: Array,
        key: Array | None,
        *,
        axis_name: AxisName = None,
    ) -> tuple[Array, Array]:
        """Compute the cross-entropy, with dropout in training."""
        seen = self.inputs(images, key, axis_name=axis_name)
        logits = _logits(model, seen, key, axis_name)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return loss, jax.nn.softmax(logits)

    def scores(self, model: Any, images: Array) -> Array:
        """Return the probabilities of the classes."""
        return jax.nn.softmax(_logits(model, self.inputs(images), None, None))


@dataclasses.dataclass(frozen=True)
class NormalisedClassification(Classification):
    """Softmax cross-entropy of a network that normalises by the batch in training."""

    probabilities: bool  # whether the network returns probabilities, or logits

    def loss(
        self,
        model: Any,
        images: Array,
        labels: Array,
        key: Array | None,
        *,
        axis_name: AxisName = None,
    ) -> tuple[Array, Array]:
        """Compute the cross-entropy; with a key, by the statistics of the batch."""
        seen = self.inputs(images, key, axis_name=axis_name)
        found = self._log_probabilities(model(seen, training=key is not None))
        loss = -jnp.take_along_axis(found, labels[:, None], axis=1)[:, 0]
        return loss, jnp.exp(found)

    def scores(self, model: Any, images: Array) -> Array:
        """Return the probabilities of the classes."""
        return jnp.exp(self._log_probabilities(model(self.inputs(images))))

    def _log_probabilities(self, output: Array) -> Array:
        output = output.astype(jnp.float32)
        if not self.probabilities:
            return jax.nn.log_softmax(output)
        # A probability that rounds to 0 keeps a finite loss, and no gradient.
        return jnp.log(jnp.maximum(output, jnp.finfo(jnp.float32).tiny))


@dataclasses.dataclass(frozen=True)
class SpreadClassification(Classification):
    """Spread loss of the class capsules' activations, with a growing margin.

    Source: Hinton, Sabour and Frosst, "Matrix capsules with EM routing", section 4.1,
    https://openreview.net/forum?id=HJWLfGWRb: the margin grows linearly from 0.2 to 0.9. The paper
    does not say within which steps; here within `growing_steps`.
    """

    growing_steps: int
    margin: float | Array = 0.9  # in a test too

    def at_step(self, step: Array) -> Self:
        """Return the objective with the margin of a step."""
        grown = jnp.minimum(step / self.growing_steps, 1)
        return dataclasses.replace(self, margin=0.2 + 0.7 * grown)

    def loss(
        self,
        model: Any,
        images: Array,
        labels: Array,
        key: Array | None,
        *,
        axis_name: AxisName = None,
    ) -> tuple[Array, Array]:
        """Sum the squares of the margins that the wrong classes leave missing."""
        scores = self._activations(model, self.inputs(images, key, axis_name=axis_name))
        true = jnp.take_along_axis(scores, labels[:, None], axis=1)
        missing = jnp.maximum(0, self.margin - (true - scores)) ** 2
        return jnp.where(jax.nn.one_hot(labels, self.num_classes) > 0, 0, missing).sum(1), scores

    def scores(self, model: Any, images: Array) -> Array:
        """Return the activations of the class capsules."""
        return self._activations(model, self.inputs(images))

    def _activations(self, model: Any, seen: Array) -> Array:
        return model(seen)[1].astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Overlaid:
    """Classification of two overlaid digits of different classes, from `multimnist.OverlaidDigits`.

    Images are layers `[B, 2, H, W, C]` and labels `[B, 2]`. The classes of the two highest scores
    are predicted. An image is misclassified unless both digits are found.
    """

    num_classes: int

    def augment(self, images: Array, key: Array, *, axis_name: AxisName = None) -> Array:
        """Return the images unchanged: the data set shifts the digits itself."""
        del key, axis_name
        return images

    def inputs(self, images: Array) -> Array:
        """Return the images unchanged."""
        return images

    def at_step(self, step: Array) -> Self:
        """Return this objective, which is the same at all steps."""
        del step
        return self

    def errors(self, scores: Array, labels: Array) -> Array:
        """Return whether the two highest scores are not those of the two labels."""
        return self._found(scores, labels).sum(1) < 2

    def test_metrics(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return the percentages of misclassified images and of digits that are not found."""
        found = np.asarray(self._found(jnp.asarray(scores), jnp.asarray(labels)))
        return {
            "test_error": 100 * float(np.mean(~found.all(1))),
            "test_error_per_digit": 100 * float(np.mean(~found)),
        }

    def _targets(self, labels: Array) -> Array:
        return jax.nn.one_hot(labels, self.num_classes).sum(1)

    def _found(self, scores: Array, labels: Array) -> Array:
        """Return whether the class of each digit is among the two highest scores, bool `[B, 2]`."""
        _, predicted = jax.lax.top_k(scores, 2)
        return (labels[:, :, None] == predicted[:, None, :]).any(2)


def overlay(layers: Array) -> Array:
    """Overlay images `[B, 2, H, W, C]` to `[B, H, W, C]`: their sum, clipped at 1."""
    return jnp.minimum(layers.sum(1), 1)


@dataclasses.dataclass(frozen=True)
class OverlaidCapsules(Overlaid):
    """Margin loss for two classes, with reconstruction of one digit at a time.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", section 6.
    """

    reconstruction_weight: float

    def loss(
        self,
        model: Any,
        images: Array,
        labels: Array,
        key: Array | None,
        *,
        axis_name: AxisName = None,
    ) -> tuple[Array, Array]:
        """Add margin loss and the reconstruction losses of both digits.

        Each digit is reconstructed from the capsule of its true class, in a test too: there only
        the loss depends on the labels, and no score does.
        """
        del key, axis_name
        capsules = model(overlay(images))
        lengths = capsjax.lengths(capsules).astype(jnp.float32)
        loss = capsjax.margin_loss(lengths, self._targets(labels))
        if self.reconstruction_weight:
            both = jnp.broadcast_to(capsules[:, None], (*labels.shape, *capsules.shape[1:]))
            drawn = model.reconstruct(both, labels).astype(jnp.float32)
            weight = self.reconstruction_weight
            loss += capsjax.reconstruction_loss(drawn, images, weight=weight).sum(1)
        return loss, lengths

    def scores(self, model: Any, images: Array) -> Array:
        """Return the lengths of the class capsules."""
        return capsjax.lengths(model(overlay(images))).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class OverlaidSigmoids(Overlaid):
    """Sigmoid cross-entropy of a CNN's logits, summed over the classes."""

    def loss(
        self,
        model: Any,
        images: Array,
        labels: Array,
        key: Array | None,
        *,
        axis_name: AxisName = None,
    ) -> tuple[Array, Array]:
        """Compute the cross-entropy, with dropout in training."""
        logits = _logits(model, overlay(images), key, axis_name)
        loss = optax.sigmoid_binary_cross_entropy(logits, self._targets(labels)).sum(1)
        return loss, jax.nn.sigmoid(logits)

    def scores(self, model: Any, images: Array) -> Array:
        """Return the independent probabilities of the classes."""
        return jax.nn.sigmoid(_logits(model, overlay(images), None, None))


def _logits(model: Any, images: Array, key: Array | None, axis_name: AxisName) -> Array:
    """Return the logits of a CNN in float32, with dropout if there is a key."""
    dropout_key = None if key is None else jax.random.fold_in(key, 2)
    return model(images, dropout_key=dropout_key, axis_name=axis_name).astype(jnp.float32)
