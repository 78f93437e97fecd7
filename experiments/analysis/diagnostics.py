"""What routing and its gradient do, in a few numbers that can be watched while training.

Shape letters: B examples; T routing iterations; I children (primary capsules); J parents (class
capsules); N capsules of either kind.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import capsjax
from capsjax.models import CapsNet
from experiments.data import datasets
from experiments.errors import InputError
from experiments.training import loop
from experiments.training.transforms import scaled

EXAMPLES = 64  # the couplings of so many are stored, and those of MNIST take 12 MB


def entropies(couplings: Array) -> Array:
    """The mean entropy in nats of each iteration's couplings `[T, B, I, J]`, as `[T]`.

    It is log(J) while children are undecided, and 0 once each has a single parent.
    """
    return capsjax.coupling_entropy(couplings).mean(axis=(1, 2))


def clear_parents(couplings: Array, *, threshold: float = 0.5) -> Array:
    """The share of children in `[T, B, I, J]` with a coupling above the threshold, as `[T]`.

    Above one half a child sends more to that parent than to all others together.
    """
    return (couplings.max(axis=-1) > threshold).mean(axis=(1, 2))


def dead(lengths: Array, *, threshold: float = 0.1) -> Array:
    """The share of capsules whose length in `[B, N]` exceeds the threshold in no example.

    The threshold is the margin loss's for an absent class (Sabour, Frosst and Hinton, "Dynamic
    Routing Between Capsules", equation 4): a shorter capsule says that its entity is not there.
    """
    return (lengths.max(axis=0) <= threshold).mean()


def gradient_shares(gradients: Mapping[str, Any]) -> dict[str, Array]:
    """Each part's share of the gradient's squared norm: they add up to 1, unless all is 0."""
    squares = {part: optax.tree.norm(tree, squared=True) for part, tree in gradients.items()}
    total = sum(squares.values(), jnp.zeros(()))
    return {part: square / jnp.where(total > 0, total, 1) for part, square in squares.items()}


def measurement(
    trainer: loop.Trainer, examples: datasets.Examples
) -> Callable[[loop.Params], dict[str, float]]:
    """Makes the function that measures a network on the same few training examples each time.

    Args:
      trainer: Of a `CapsNet`, with any objective.
      examples: Those trained on; the first 64 are moved once, as in a training step, and kept.

    Returns:
      From parameters to a part of a row of metrics: `coupling_entropy_1` … `coupling_entropy_T`,
      `clear_parents_1` … `clear_parents_T`, `dead_primary_capsules`, `dead_class_capsules`,
      `gradient_norm` of the training loss, and `gradient_share_` and the name of each part that
      has parameters (convolution, primary, capsules, decoder).

    Raises:
      InputError: The network has no capsules.
    """
    if not isinstance(trainer.network, CapsNet):
        raise InputError("--diagnostics are of routing, and this --network has no capsules")
    raw, labels = examples.take(np.arange(min(EXAMPLES, examples.size)))
    key = jax.random.key(0)
    # NumPy arrays: a program takes them on whatever devices the parameters lie.
    images = np.asarray(trainer.objective.augment(scaled(jnp.asarray(raw)), key))

    def loss(params: loop.Params, images: Array) -> Array:
        targets = jnp.asarray(labels)
        losses, _ = trainer.objective.loss(trainer.model(params), images, targets, key)
        return losses.mean()

    @trainer.jit
    def measured(params: loop.Params, images: Array) -> dict[str, Array]:
        model = trainer.model(params)
        poses = model.primary_poses(images)
        couplings = model.capsules.couplings(poses)
        gradients = jax.grad(loss)(params, images)
        row = {
            "dead_primary_capsules": dead(capsjax.lengths(poses)),
            "dead_class_capsules": dead(capsjax.lengths(model.capsules(poses))),
            "gradient_norm": optax.tree.norm(gradients),
        }
        for name, values in (
            ("coupling_entropy", entropies(couplings)),
            ("clear_parents", clear_parents(couplings)),
        ):
            row |= {f"{name}_{t}": value for t, value in enumerate(values, 1)}
        shares = gradient_shares(gradients)
        return row | {f"gradient_share_{part}": share for part, share in shares.items()}

    # Images that were constants of the program would be folded into it, for seconds.
    return lambda params: {name: float(value) for name, value in measured(params, images).items()}
