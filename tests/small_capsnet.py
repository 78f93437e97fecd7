"""A small CapsNet with its outputs and gradients, which the contenders of a benchmark must equal.

Results are computed once a process, by one compiled program.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from capsjax.models import CapsNet
from experiments.benchmarks import contenders
from experiments.training.objectives import CapsuleClassification
from experiments.training.transforms import Augmentation, scaled

SMALL = partial(CapsNet, conv_channels=4, primary_types=2, hidden=(8,))
BATCH_SIZE, IMAGE_SIZE = 3, 20
TOLERANCE = 1e-4


@cache
def batch():
    """Return bytes and classes: those that `contender_process` draws for these sizes."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE, 1), np.uint8)
    return images, rng.integers(0, 10, BATCH_SIZE, np.int32)


def _structure():
    """Return the graph of the network, and the shapes of its parameters; compiles nothing."""
    shape = (IMAGE_SIZE, IMAGE_SIZE, 1)
    return nnx.split(nnx.eval_shape(lambda: SMALL(shape, rngs=nnx.Rngs(0))))


@cache
def params():
    """Return the parameters as nested dicts of NumPy arrays, with biases that are not 0."""
    rng = np.random.default_rng(0)
    shapes = nnx.to_pure_dict(_structure()[1])
    return jax.tree.map(lambda x: (0.1 * rng.normal(size=x.shape)).astype(x.dtype), shapes)


@cache
def expected():
    """Return capsjax's class capsules, reconstructions, mean loss and its gradients."""
    images, labels = batch()
    graph = _structure()[0]
    objective = CapsuleClassification(10, Augmentation(), contenders.RECONSTRUCTION_WEIGHT)

    def mean_loss(params):
        model, pixels = nnx.merge(graph, params), scaled(jnp.asarray(images))
        capsules = model(pixels)
        drawn = model.reconstruct(capsules, labels).reshape(len(images), -1)
        loss = objective.loss(model, pixels, labels, jax.random.key(0))[0].mean()
        return loss, (capsules, drawn)

    (loss, (capsules, drawn)), gradients = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(
        params()
    )
    return capsules, drawn, loss, gradients


def assert_close(actual, wanted):
    """Compare trees of arrays; the tolerance grows with the largest entry of an array above 1."""
    for a, w in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, w, atol=TOLERANCE * max(1, np.abs(w).max()))
