"""The paper's network in plain JAX: the baseline of `benchmark_training` without capsjax.

XLA's convolutions, votes stored by one einsum, gradients by autodiff. The outputs equal those of
`capsjax.models.CapsNet` for the same parameters, and no code is shared with it.

Shape letters are those of `capsjax.shapes`; the output capsules J are the classes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from experiments.benchmarks import contenders

Params = dict[str, Any]


def class_capsules(params: Params, images: Array, *, num_iterations: int = 3) -> Array:
    """Map images `[B, H, W, C]`, scaled to 0 … 1, to class capsules `[B, J, D]`."""
    features = jax.nn.relu(_convolve(params["convolution"], images, 1))
    weights = params["capsules"]["weights"]
    maps = _convolve(params["primary"]["convolution"], features, 2)
    return route(squash(maps.reshape(len(maps), *weights.shape[:2])), weights, num_iterations)


def route(poses: Array, weights: Array, num_iterations: int = 3) -> Array:
    """Route poses `[B, I, P]` to output capsules `[B, J, D]` with weights `[I, P, J, D]`."""
    votes = jnp.einsum("bip,ipjd->bijd", poses, weights)
    # Not jnp.zeros: XLA would fold the softmax of a constant, which takes it seconds.
    logits = 0 * votes[..., 0]
    for iteration in range(num_iterations):
        couplings = jax.nn.softmax(logits, axis=2)
        outputs = squash(jnp.einsum("bij,bijd->bjd", couplings, votes))
        if iteration + 1 < num_iterations:
            logits = logits + jnp.einsum("bijd,bjd->bij", votes, outputs)
    return outputs


def reconstruct(params: Params, capsules: Array, labels: Array) -> Array:
    """Reconstruct images `[B, H * W * C]` from the capsules of the labelled classes."""
    chosen = jax.nn.one_hot(labels, capsules.shape[1])
    x = (capsules * chosen[:, :, None]).reshape(len(capsules), -1)
    *hidden, last = (layer for _, layer in sorted(params["decoder"]["layers"].items()))
    for layer in hidden:
        x = jax.nn.relu(_linear(layer, x))
    return jax.nn.sigmoid(_linear(last, x))


def loss(params: Params, images: Array, labels: Array, *, reconstruction_weight: float) -> Array:
    """Return the batch mean of margin loss plus weighted reconstruction loss."""
    capsules = class_capsules(params, images)
    lengths = jnp.sqrt(jnp.sum(capsules**2, axis=2) + 1e-12)
    present = jax.nn.one_hot(labels, lengths.shape[1])
    missing, surplus = jax.nn.relu(0.9 - lengths) ** 2, jax.nn.relu(lengths - 0.1) ** 2
    margin = jnp.sum(present * missing + 0.5 * (1 - present) * surplus, axis=1)
    drawn = reconstruct(params, capsules, labels)
    squares = jnp.sum((drawn - images.reshape(drawn.shape)) ** 2, axis=1)
    return jnp.mean(margin + reconstruction_weight * squares)


class PlainTrainer:
    """Adam on the paper's loss, without the data augmentation of capsjax's training step."""

    def __init__(self, params: Params, *, reconstruction_weight: float) -> None:
        """Start from the parameters of a `CapsNet`, as nested dicts of arrays."""
        optimizer = optax.adam(1e-3)
        self.params = jax.tree.map(jnp.asarray, params)
        self.optimizer_state = optimizer.init(self.params)

        def step(params: Params, state: Any, images: Array, labels: Array) -> Any:
            pixels = _scale(images)
            gradient = jax.grad(loss)(
                params, pixels, labels, reconstruction_weight=reconstruction_weight
            )
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        self._step = jax.jit(step, donate_argnums=(0, 1))

    def step(self, images: np.ndarray, labels: np.ndarray) -> None:
        """Take a training step on bytes `[B, H, W, C]` and their classes `[B]`."""
        self.params, self.optimizer_state = self._step(
            self.params, self.optimizer_state, images, labels
        )
        jax.block_until_ready(self.params)


def contender(params: Params, images: np.ndarray, labels: np.ndarray) -> contenders.Contender:
    """Build the contender "plain_jax"."""
    trainer = PlainTrainer(params, reconstruction_weight=contenders.RECONSTRUCTION_WEIGHT)

    def rows() -> contenders.Rows:
        inference = jax.jit(lambda params, x: jnp.linalg.norm(class_capsules(params, x), axis=2))
        poses = jnp.full((len(images), *trainer.params["capsules"]["weights"].shape[:2]), 0.1)

        @jax.jit
        def routing(poses: Array, weights: Array) -> Any:
            capsules, vjp = jax.vjp(route, poses, weights)
            return vjp(capsules)

        return {
            "inference": lambda: np.asarray(inference(trainer.params, _scale(images))),
            "routing, with gradients": lambda: jax.block_until_ready(
                routing(poses, trainer.params["capsules"]["weights"])
            ),
        }

    return contenders.Contender(
        lambda: trainer.step(images, labels),
        lambda images: jax.jit(lambda params, x: class_capsules(params, _scale(x)))(params, images),
        rows,
    )


def _scale(images: Array | np.ndarray) -> Array:
    return jnp.asarray(images).astype(jnp.float32) / 255


def squash(x: Array) -> Array:
    """Squash vectors along the last axis: `|x|²/(1 + |x|²) · x/|x|`."""
    squares = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jnp.sqrt(squares + 1e-12) / (1 + squares)


def _convolve(params: Params, x: Array, stride: int) -> Array:
    y = lax.conv_general_dilated(
        x,
        params["kernel"],
        (stride, stride),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + params["bias"][None, None, None]


def _linear(params: Params, x: Array) -> Array:
    return x @ params["kernel"] + params["bias"][None]
