"""The paper's network as one first writes it in JAX, to be measured beside this project's.

XLA's own convolutions, votes stored by one einsum, gradients by autodiff. It computes what
`capsjax.models.CapsNet` computes, from the same parameters, and uses nothing of capsjax.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from experiments.benchmarks import programs

Params = dict[str, Any]


def class_capsules(params: Params, images: Array, *, num_iterations: int = 3) -> Array:
    """Maps images `[B, H, W, C]` in 0 … 1 to class capsules `[B, J, D]`."""
    features = jax.nn.relu(_convolved(params["convolution"], images, 1))
    weights = params["capsules"]["weights"]
    maps = _convolved(params["primary"]["convolution"], features, 2)
    return route(squash(maps.reshape(len(maps), *weights.shape[:2])), weights, num_iterations)


def route(poses: Array, weights: Array, num_iterations: int = 3) -> Array:
    """Routes poses `[B, I, P]` by weights `[I, P, J, D]`."""
    votes = jnp.einsum("bip,ipjd->bijd", poses, weights)
    # Not zeros: the compiler would fold a softmax over constants, for seconds.
    logits = 0 * votes[..., 0]
    for iteration in range(num_iterations):
        couplings = jax.nn.softmax(logits, axis=2)
        outputs = squash(jnp.einsum("bij,bijd->bjd", couplings, votes))
        if iteration + 1 < num_iterations:
            logits = logits + jnp.einsum("bijd,bjd->bij", votes, outputs)
    return outputs


def reconstruct(params: Params, capsules: Array, labels: Array) -> Array:
    """Draws the images `[B, H * W * C]` of one class each."""
    chosen = jax.nn.one_hot(labels, capsules.shape[1])
    x = (capsules * chosen[:, :, None]).reshape(len(capsules), -1)
    *hidden, last = (layer for _, layer in sorted(params["decoder"]["layers"].items()))
    for layer in hidden:
        x = jax.nn.relu(_linear(layer, x))
    return jax.nn.sigmoid(_linear(last, x))


def loss(params: Params, images: Array, labels: Array, *, reconstruction_weight: float) -> Array:
    """The mean of margin and reconstruction loss."""
    capsules = class_capsules(params, images)
    lengths = jnp.sqrt(jnp.sum(capsules**2, axis=2) + 1e-12)
    present = jax.nn.one_hot(labels, lengths.shape[1])
    missing, surplus = jax.nn.relu(0.9 - lengths) ** 2, jax.nn.relu(lengths - 0.1) ** 2
    margin = jnp.sum(present * missing + 0.5 * (1 - present) * surplus, axis=1)
    drawn = reconstruct(params, capsules, labels)
    squares = jnp.sum((drawn - images.reshape(drawn.shape)) ** 2, axis=1)
    return jnp.mean(margin + reconstruction_weight * squares)


class PlainTrainer:
    """Adam on the paper's loss, images being moved by no one: that work is capsjax's alone."""

    def __init__(self, params: Params, *, reconstruction_weight: float) -> None:
        """Starts from the parameters of a `CapsNet`, as nested dicts of arrays."""
        optimizer = optax.adam(1e-3)
        self.params = jax.tree.map(jnp.asarray, params)
        self.optimizer_state = optimizer.init(self.params)

        def step(params: Params, state: Any, images: Array, labels: Array) -> Any:
            pixels = _scaled(images)
            gradient = jax.grad(loss)(
                params, pixels, labels, reconstruction_weight=reconstruction_weight
            )
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        self._step = jax.jit(step, donate_argnums=(0, 1))

    def step(self, images: np.ndarray, labels: np.ndarray) -> None:
        """Trains on bytes `[B, H, W, C]` and their classes."""
        self.params, self.optimizer_state = self._step(
            self.params, self.optimizer_state, images, labels
        )
        jax.block_until_ready(self.params)


def program(params: Params, images: np.ndarray, labels: np.ndarray) -> programs.Program:
    """What there is to measure."""
    trainer = PlainTrainer(params, reconstruction_weight=programs.RECONSTRUCTION_WEIGHT)

    def rows() -> programs.Rows:
        inference = jax.jit(lambda params, x: jnp.linalg.norm(class_capsules(params, x), axis=2))
        poses = jnp.full((len(images), *trainer.params["capsules"]["weights"].shape[:2]), 0.1)

        @jax.jit
        def routing(poses: Array, weights: Array) -> Any:
            capsules, vjp = jax.vjp(route, poses, weights)
            return vjp(capsules)

        return {
            "inference": lambda: np.asarray(inference(trainer.params, _scaled(images))),
            "routing, with gradients": lambda: jax.block_until_ready(
                routing(poses, trainer.params["capsules"]["weights"])
            ),
        }

    return programs.Program(
        lambda: trainer.step(images, labels),
        lambda images: class_capsules(params, _scaled(images)),
        rows,
    )


def _scaled(images: Array | np.ndarray) -> Array:
    return jnp.asarray(images).astype(jnp.float32) / 255


def squash(x: Array) -> Array:
    """`|x|²/(1 + |x|²) · x/|x|` along the last axis."""
    squares = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jnp.sqrt(squares + 1e-12) / (1 + squares)


def _convolved(params: Params, x: Array, stride: int) -> Array:
    convolved = lax.conv_general_dilated(
        x,
        params["kernel"],
        (stride, stride),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return convolved + params["bias"][None, None, None]


def _linear(params: Params, x: Array) -> Array:
    return x @ params["kernel"] + params["bias"][None]
