"""The contender "capsjax": training step, inference and the layers of a step, to be timed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import capsjax
from experiments.benchmarks import contenders
from experiments.data import datasets
from experiments.training import loop, mnist
from experiments.training.transforms import scaled

MATRIX = 2048  # side of the matrix product


def make_trainer(network: str, image_shape: tuple[int, int, int]) -> loop.Trainer:
    """Return the trainer of a network for images `[H, W, C]`, if its state fits.

    Raises:
      InputError: It needs more memory than there is, or the images are too small.
    """
    one = datasets.Split(np.zeros((1, *image_shape), np.uint8), np.zeros(1, np.int32))
    config = mnist.Config(network=network, num_epochs=1000, batch_size=1)
    trainer = mnist.build(config, datasets.Dataset("", 10, one, one, ""))
    loop.check_memory(trainer.abstract_state())
    return trainer


def contender(
    network: str, params: loop.Params, images: np.ndarray, labels: np.ndarray
) -> contenders.Contender:
    """Build the contender "capsjax"; training starts from new random parameters, not `params`."""
    height, width, channels = images.shape[1:]
    trainer = make_trainer(network, (height, width, channels))
    state = trainer.initial_state(0)
    trainer.compile_step(state, images, labels)

    def train() -> None:
        nonlocal state
        state = trainer.step(state, images, labels)
        jax.block_until_ready(state)

    @jax.jit
    def poses(params: loop.Params, images: jax.Array) -> jax.Array:
        found = trainer.model(params)(scaled(images))
        if network != "matrix_capsnet":
            return found
        return found[0].reshape(*found[0].shape[:2], -1)

    def rows() -> contenders.Rows:
        # A copy, because each training step donates its parameters.
        copied = jax.tree.map(jnp.copy, state.params)
        if network == "capsnet":
            return parts(trainer, copied, images)
        return {"inference": inference(trainer, copied, images), "matrix product": matrix_product()}

    return contenders.Contender(train, lambda images: poses(params, images), rows)


def bind(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """Compile a function, and return its call with these arguments."""
    compiled = jax.jit(function).lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments))


def inference(trainer: loop.Trainer, params: loop.Params, images: np.ndarray) -> Callable[[], Any]:
    """Compile the scores of images."""
    return bind(
        lambda params, x: trainer.objective.scores(trainer.model(params), scaled(x)), params, images
    )


def matrix_product() -> Callable[[], Any]:
    """Compile a product of two square matrices."""
    matrix = jnp.ones((MATRIX, MATRIX))
    return bind(jnp.matmul, matrix, matrix)


def parts(
    trainer: loop.Trainer, params: loop.Params, images: np.ndarray
) -> dict[str, Callable[[], Any]]:
    """Compile inference and the parts of a training step, by the names of their rows.

    A row "with gradients" is a layer's outputs and their VJP with respect to its parameters and its
    input; images are an input without a gradient.
    """

    @jax.jit
    def activations(params: loop.Params, images: jax.Array) -> tuple[jax.Array, ...]:
        model = trainer.model(params)
        pixels = scaled(images)
        features = jax.nn.relu(model.convolution(pixels))
        poses = model.primary(features)
        return pixels, features, poses, model.capsules(poses)

    pixels, features, poses, capsules = activations(params, images)
    weights = trainer.model(params).capsules.weights[...]
    chosen = jnp.argmax(capsjax.lengths(capsules), axis=1)

    # `inputs` have no gradient. They are arguments and not constants, because XLA would compute
    # whatever depends on constants alone while it compiles.
    def gradients(
        function: Callable[..., Any], *arguments: Any, inputs: tuple[Any, ...] = ()
    ) -> Callable[[], Any]:
        def run(arguments: tuple[Any, ...], inputs: tuple[Any, ...]) -> Any:
            outputs, vjp = jax.vjp(lambda *arguments: function(*arguments, *inputs), *arguments)
            return outputs, vjp(outputs)

        return bind(run, arguments, inputs)

    def layer(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, *inputs: function(trainer.model(params), *inputs)

    first = layer(lambda model, x: model.convolution(x))
    return {
        "inference": inference(trainer, params, images),
        "routing": bind(capsjax.dynamic_routing, poses, weights),
        "routing, with gradients": gradients(capsjax.dynamic_routing, poses, weights),
        "first convolution, with gradients": gradients(first, params, inputs=(pixels,)),
        "primary capsules, with gradients": gradients(
            layer(lambda model, x: model.primary(x)), params, features
        ),
        "decoder, with gradients": gradients(
            layer(lambda model, c: model.reconstruct(c, chosen)), params, capsules
        ),
        "matrix product": matrix_product(),
    }
