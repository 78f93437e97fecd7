"""What networks are trained for: how images are moved, what is minimised, what counts as wrong."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import capsjax
from experiments.transforms import placed, shifted


class Objective(Protocol):
    """What the trainer asks of an objective; B examples, K classes, images in 0 … 1."""

    def augment(self, images: Array, key: Array) -> Array:
        """The training images `[B, H, W, C]`, moved at random."""

    def loss(
        self, model: Any, images: Array, labels: Array, key: Array | None
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

    def augment(self, images: Array, key: Array) -> Array:
        """Shifts by up to `shift` pixels, then places at random on the canvas."""
        moved = shifted(images, key, self.shift)
        return placed(moved, jax.random.fold_in(key, 1), self.canvas) if self.canvas else moved

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
        self, model: Any, images: Array, labels: Array, key: Array | None
    ) -> tuple[Array, Array]:
        """The decoder draws the true class in training, and that of the longest capsule in a test.

        So it learns before the classes do.
        """
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
        self, model: Any, images: Array, labels: Array, key: Array | None
    ) -> tuple[Array, Array]:
        """Drops units in training."""
        dropout_key = None if key is None else jax.random.fold_in(key, 2)
        logits = model(images, dropout_key=dropout_key).astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return loss, jax.nn.softmax(logits)

    def scores(self, model: Any, images: Array) -> Array:
        """The classes' probabilities."""
        return jax.nn.softmax(model(images).astype(jnp.float32))
