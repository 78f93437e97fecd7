"""Routing and gradient diagnostics that are logged during training.

Shape letters: B examples; T routing iterations; I input capsules (primary capsules); J output
capsules (class capsules); N capsules, either primary or class capsules.
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

EXAMPLES = 64  # their stored couplings take 12 MB per iteration for the MNIST CapsNet


def mean_coupling_entropy(couplings: Array) -> Array:
    """Return the mean entropy of the couplings in each iteration, in nats.

    The entropy of an input capsule's couplings is log(J) if they are uniform and 0 if they select a
    single output capsule.

    Args:
      couplings: `[T, B, I, J]`, summing to 1 over J.

    Returns:
      Means over examples and input capsules, `[T]`.
    """
    return capsjax.coupling_entropy(couplings).mean(axis=(1, 2))


def clear_parent_fraction(couplings: Array, *, threshold: float = 0.5) -> Array:
    """Return the fraction of input capsules with one coupling above a threshold, per iteration.

    A coupling above 0.5 exceeds the sum of the input capsule's other couplings.

    Args:
      couplings: `[T, B, I, J]`, summing to 1 over J.
      threshold: Couplings must be strictly greater.

    Returns:
      Fractions, `[T]`.
    """
    return (couplings.max(axis=-1) > threshold).mean(axis=(1, 2))


def dead_fraction(lengths: Array, *, threshold: float = 0.1) -> Array:
    """Return the fraction of capsules that never exceed a length threshold in a batch.

    The default is the margin loss's target length for absent classes, m⁻ = 0.1 in Sabour, Frosst
    and Hinton, "Dynamic Routing Between Capsules", equation 4, https://arxiv.org/abs/1710.09829.

    Args:
      lengths: Capsule lengths, `[B, N]`.
      threshold: A capsule is dead if all its lengths are at most this.

    Returns:
      The fraction of the N capsules, a scalar.
    """
    return (lengths.max(axis=0) <= threshold).mean()


def gradient_fractions(gradients: Mapping[str, Any]) -> dict[str, Array]:
    """Return each subtree's fraction of the squared gradient norm; all 0 for a zero gradient."""
    squares = {part: optax.tree.norm(tree, squared=True) for part, tree in gradients.items()}
    total = sum(squares.values(), jnp.zeros(()))
    return {part: square / jnp.where(total > 0, total, 1) for part, square in squares.items()}


def make_diagnostics(
    trainer: loop.Trainer, examples: datasets.Examples
) -> Callable[[loop.Params], dict[str, float]]:
    """Build a function that computes diagnostics of a network on a fixed batch.

    Args:
      trainer: The trainer of a `CapsNet`, with any objective.
      examples: Training examples. The batch is the first 64, augmented once.

    Returns:
      A function from parameters to metrics: `coupling_entropy_t` and `clear_parents_t` for t from 1
      to T, `dead_primary_capsules`, `dead_class_capsules`, `gradient_norm` of the training loss,
      and `gradient_share_M` for each module M with parameters (convolution, primary, capsules,
      decoder). All but entropy (nats) and norm are fractions.

    Raises:
      InputError: The network has no capsules.
    """
    if not isinstance(trainer.network, CapsNet):
        raise InputError("--diagnostics measures routing, but this --network has no capsules")
    raw, labels = examples.take(np.arange(min(EXAMPLES, examples.size)))
    key = jax.random.key(0)
    # NumPy arrays: a program takes them on whatever devices the parameters lie.
    images = np.asarray(trainer.objective.augment(scaled(jnp.asarray(raw)), key))

    def loss(params: loop.Params, images: Array) -> Array:
        targets = jnp.asarray(labels)
        losses, _ = trainer.objective.loss(trainer.model(params), images, targets, key)
        return losses.mean()

    @trainer.jit
    def compute(params: loop.Params, images: Array) -> dict[str, Array]:
        model = trainer.model(params)
        poses = model.primary_poses(trainer.objective.inputs(images))
        couplings = model.capsules.couplings(poses)
        gradients = jax.grad(loss)(params, images)
        row = {
            "dead_primary_capsules": dead_fraction(capsjax.lengths(poses)),
            "dead_class_capsules": dead_fraction(capsjax.lengths(model.capsules(poses))),
            "gradient_norm": optax.tree.norm(gradients),
        }
        for name, values in (
            ("coupling_entropy", mean_coupling_entropy(couplings)),
            ("clear_parents", clear_parent_fraction(couplings)),
        ):
            row |= {f"{name}_{t}": value for t, value in enumerate(values, 1)}
        fractions = gradient_fractions(gradients)
        return row | {f"gradient_share_{part}": value for part, value in fractions.items()}

    # Images are an argument, because XLA would constant-fold a closed-over array for seconds.
    return lambda params: {name: float(value) for name, value in compute(params, images).items()}
