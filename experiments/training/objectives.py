"""What networks are trained for: how images are moved, what is minimised, what counts as wrong."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import capsjax
from experiments.training.transforms import AxisName, placed, shifted


class Objective(Protocol):
    """What the trainer asks of an objective; B examples, K classes, images in 0 … 1.

    `axis_name` names the axes of a mesh over which the batch is split, None if it is not: what is
    drawn at random for an example does not depend on it.
    """

    def augment(self, images: Array, key: Array, *, axis_name: AxisName = None) -> Array:
        """The training images `[B, H, W, C]`, moved at random."""

    def loss(
        self,
        model: Any,
        images: Array,
        labels: Array,
        key: Array | None,
        *,
        axis_name: AxisName = None,
    ) -> tuple[Array, Array]:
        """The loss of each example `[B]`, and the scores of its classes `[B, K]`.

        The key is a training step's. It is None in a test, which drops no units and shows the
        labels to nothing but the loss.
        """

    def scores(self, model: Any, images: Array) -> Array:
        """The scores of the classes `[B, K]`, from 0 to 1."""

    def errors(self, scores: Array, labels: Array) -> Array:
        """Whether each example is scored wrong, bool `[B]`."""

    def test_metrics(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """What is said of a whole test set; `test_error`, in percent, among it."""


@dataclasses.dataclass(frozen=True)
class Classification:
    """One class an image: what both objectives below share."""

    num_classes: int
    shift: int  # pixels
    canvas: int  # pixels a side; 0: the image's own size

    def augment(self, images: Array, key: Array, *, axis_name: AxisName = None) -> Array:
        """Shifts by up to `shift` pixels, then places at random on the canvas."""
        moved = shifted(images, key, self.shift, axis_name=axis_name)
        if not self.canvas:
            return moved
        return placed(moved, jax.random.fold_in(key, 1), self.canvas, axis_name=axis_name)

    def errors(self, scores: Array, labels: Array) -> Array:
        """Whether the highest score is another class's."""
        return jnp.argmax(scores, axis=1) != labels

    def test_metrics(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The share of wrong classes in percent."""
        return {"test_error": 100 * float(np.mean(scores.argmax(axis=1) != labels))}


@dataclasses.dataclass(frozen=True)
class CapsuleClassification(Classification):
    """Margin loss of capsule lengths, and reconstruction as a regulariser."""

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
        """The decoder draws the true class in training, and that of the longest capsule in a test.

        So it learns before the classes do.
        """
        del axis_name
        capsules = model(images)
        lengths = capsjax.lengths(capsules).astype(jnp.float32)
        loss = capsjax.margin_loss(lengths, jax.nn.one_hot(labels, self.num_classes))
        if self.reconstruction_weight:
            drawn = model.reconstruct(capsules, None if key is None else labels)
            drawn = drawn.astype(jnp.float32)
            loss += capsjax.reconstruction_loss(drawn, images, weight=self.reconstruction_weight)
        return loss, lengths

    def scores(self, model: Any, images: Array) -> Array:
        """The lengths of the class capsules."""
        return capsjax.lengths(model(images)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class SoftmaxClassification(Classification):
    """Cross-entropy of the logits of an ordinary network, with dropout in training."""

    def loss(
        self,
        model: Any,
        images: Array,
        labels: Array,
        key: Array | None,
        *,
        axis_name: AxisName = None,
    ) -> tuple[Array, Array]:
        """Drops units in training."""
        logits = _logits(model, images, key, axis_name)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return loss, jax.nn.softmax(logits)

    def scores(self, model: Any, images: Array) -> Array:
        """The classes' probabilities."""
        return jax.nn.softmax(_logits(model, images, None, None))


@dataclasses.dataclass(frozen=True)
class Overlaid:
    """Two digits of different classes on one image, for `multimnist.OverlaidDigits`.

    Images come as layers `[B, 2, H, W, C]`, labels as `[B, 2]`; the two highest scores are the
    prediction. An error is one where not both are right; the error per digit counts each.
    """

    num_classes: int

    def augment(self, images: Array, key: Array, *, axis_name: AxisName = None) -> Array:
        """Nothing: the digits were shifted when they were laid over each other."""
        del key, axis_name
        return images

    def errors(self, scores: Array, labels: Array) -> Array:
        """Whether the two highest scores are not the two classes."""
        return self._found(scores, labels).sum(1) < 2

    def test_metrics(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Percent of images without both digits right, and of digits not found."""
        found = np.asarray(self._found(jnp.asarray(scores), jnp.asarray(labels)))
        return {
            "test_error": 100 * float(np.mean(~found.all(1))),
            "test_error_per_digit": 100 * float(np.mean(~found)),
        }

    def _targets(self, labels: Array) -> Array:
        return jax.nn.one_hot(labels, self.num_classes).sum(1)

    def _found(self, scores: Array, labels: Array) -> Array:
        """Whether each digit is among the two highest scores, bool `[B, 2]`."""
        _, predicted = jax.lax.top_k(scores, 2)
        return (labels[:, :, None] == predicted[:, None, :]).any(2)


def overlay(layers: Array) -> Array:
    """Lays the images `[B, 2, H, W, C]` over each other: their sum, at most 1."""
    return jnp.minimum(layers.sum(1), 1)


@dataclasses.dataclass(frozen=True)
class OverlaidCapsules(Overlaid):
    """Margin loss for two classes; the decoder draws one digit at a time.

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
        """Each digit is drawn from its true class's capsule, in a test too.

        In a test the drawings count in the loss alone, which no prediction depends on.
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
        """The lengths of the class capsules."""
        return capsjax.lengths(model(overlay(images))).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class OverlaidSigmoids(Overlaid):
    """Cross-entropy of each class by itself, for the logits of an ordinary network."""

    def loss(
        self,
        model: Any,
        images: Array,
        labels: Array,
        key: Array | None,
        *,
        axis_name: AxisName = None,
    ) -> tuple[Array, Array]:
        """Drops units in training."""
        logits = _logits(model, overlay(images), key, axis_name)
        loss = optax.sigmoid_binary_cross_entropy(logits, self._targets(labels)).sum(1)
        return loss, jax.nn.sigmoid(logits)

    def scores(self, model: Any, images: Array) -> Array:
        """The classes' probabilities, each by itself."""
        return jax.nn.sigmoid(_logits(model, overlay(images), None, None))


def _logits(model: Any, images: Array, key: Array | None, axis_name: AxisName) -> Array:
    """What an ordinary network says, in float32; units are dropped if there is a key."""
    dropout_key = None if key is None else jax.random.fold_in(key, 2)
    return model(images, dropout_key=dropout_key, axis_name=axis_name).astype(jnp.float32)
